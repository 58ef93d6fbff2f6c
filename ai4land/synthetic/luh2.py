"""States and static data of the synthetic planet as LUH2 v2h files.

They keep the quirks of the originals that readers must handle: years that no library decodes, 1e20 as missing value under a
mis-cased attribute, latitudes from north to south.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import netCDF4
import numpy as np
from numpy.typing import NDArray

from ai4land.grid import Grid, block_sum, cell_areas, centres
from ai4land.synthetic.files import TITLE, PlanetPaths

MISSING_VALUE = np.float32(1e20)
"""The value of LUH2 where there is no land."""

STATES = {
    "primf": "forested primary land",
    "primn": "non-forested primary land",
    "secdf": "potentially forested secondary land",
    "secdn": "potentially non-forested secondary land",
    "pastr": "managed pasture",
    "range": "rangeland",
    "urban": "urban land",
    "c3ann": "C3 annual crops",
    "c4ann": "C4 annual crops",
    "c3per": "C3 perennial crops",
    "c4per": "C4 perennial crops",
    "c3nfx": "C3 nitrogen-fixing crops",
}
"""LUH2 states and their long names."""

_CLASSES = np.array([0, 11, 22, 33, 44, 55, 66, 77])
_CROP_TYPES = np.array(
    [
        [0.30, 0.35, 0.15, 0.10, 0.10],
        [0.55, 0.20, 0.10, 0.05, 0.10],
        [0.60, 0.15, 0.10, 0.02, 0.13],
        [0.70, 0.10, 0.05, 0.00, 0.15],
        [0.80, 0.00, 0.10, 0.00, 0.10],
    ]
)
"""Shares of the five crop types in each climate zone."""
_MANAGED = np.array([0.5, 0.1, 0.8, 0.6, 0.0])
"""Share of managed pasture in each climate zone."""
_BIOMASS = {44: 14.0, 55: 2.5, 66: 0.2}
"""Carbon of natural vegetation in kg m-2, by class code."""


def _coarse_axes(file: Any, grid: Grid) -> None:
    """Define latitudes (from north to south) and longitudes in an LUH2 file."""
    names = (("lat", "latitude", "degrees_north", "Y"), ("lon", "longitude", "degrees_east", "X"))
    for (name, standard_name, units, axis), values in zip(names, centres(grid.coarse), strict=True):
        file.createDimension(name, len(values))
        variable = file.createVariable(name, "f8", (name,), fill_value=False)
        variable.setncatts({"standard_name": standard_name, "long_name": standard_name, "units": units, "axis": axis})
        variable[:] = values


def _coarse_variable(file: Any, name: str, dims: tuple[str, ...], attrs: Mapping[str, Any]) -> Any:
    variable = file.createVariable(name, "f4", dims, fill_value=False, compression="zlib", complevel=4)
    variable.setncatts({**attrs, "missing_value": MISSING_VALUE, "_Fillvalue": MISSING_VALUE})
    return variable


class StatesFile:
    """The LUH2 states of a planet, written year by year; a context manager.

    Each state is its area-weighted share of the whole coarse cell, so the states of a cell sum to 1 − icwtr (ocean and
    lakes). Natural land is primary until its first use.
    """

    def __init__(
        self,
        paths: PlanetPaths,
        *,
        climate_zone: NDArray[np.uint8],
        natural: NDArray[np.uint8],
        grid: Grid,
        years: Sequence[int],
    ) -> None:
        rows, cols = grid.coarse.shape
        self._areas = np.broadcast_to(grid.cell_areas()[:, None], grid.shape)
        row, col = np.indices(grid.shape) // grid.factor
        self._cell = row * cols + col
        self._zone = np.maximum(climate_zone.astype(np.int64), 1) - 1
        self._natural = natural
        self._shape = (rows, cols)
        self._first = years[0]
        self._dry = block_sum((natural != 0).astype(np.int64), grid.factor) == 0
        self._total = np.broadcast_to(cell_areas(grid.coarse)[:, None], self._shape)
        self._file: Any = netCDF4.Dataset(paths.states, "w", format="NETCDF4")
        self._file.setncatts(
            {
                "title": f"{TITLE}: land-use states",
                "Conventions": "CF-1.6",
                "source": "ai4land.synthetic.planet",
                "frequency": "yr",
            }
        )
        self._file.createDimension("time", None)
        time = self._file.createVariable("time", "f8", ("time",), fill_value=False)
        time.setncatts({"standard_name": "time", "units": "years since 850-01-01 0:0:0", "calendar": "noleap", "axis": "T"})
        _coarse_axes(self._file, grid)
        fraction = {"standard_name": "area_fraction", "units": "1", "cell_methods": "time: mean"}
        names: dict[str, dict[str, str]] = {name: {**fraction, "long_name": text} for name, text in STATES.items()}
        names["secma"] = {"long_name": "secondary mean age", "units": "years", "cell_methods": "time: mean"}
        names["secmb"] = {"long_name": "secondary mean biomass density", "units": "kg C m-2", "cell_methods": "time: mean"}
        self._variables = {
            name: _coarse_variable(self._file, name, ("time", "lat", "lon"), attrs) for name, attrs in names.items()
        }

    def __enter__(self) -> StatesFile:
        """Return the file itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the file."""
        self._file.close()

    def write(self, year: int, codes: NDArray[np.uint8], last_used: NDArray[np.int16]) -> None:
        """Append the states of a year."""
        used = last_used > self._first - 1000
        kind = np.searchsorted(_CLASSES, codes)
        key = ((self._cell * 8 + kind) * 5 + self._zone) * 2 + used
        total = self._shape[0] * self._shape[1]
        summed: NDArray[np.float64] = np.bincount(key.ravel(), self._areas.ravel(), total * 80).astype(np.float64)
        table = summed.reshape(total, 8, 5, 2) / self._total.reshape(-1, 1, 1, 1)
        by_zone, by_use = table.sum(axis=3), table.sum(axis=2)
        bare = by_use[:, 5] + by_use[:, 6]
        states = [
            by_use[:, 4, 0],
            bare[:, 0],
            by_use[:, 4, 1],
            bare[:, 1],
            by_zone[:, 3] @ _MANAGED,
            by_zone[:, 3] @ (1 - _MANAGED),
        ]
        states += [by_zone[:, 1].sum(axis=1), *(by_zone[:, 2] @ _CROP_TYPES).T]

        secondary = used & np.isin(codes, (44, 55, 66))
        age = np.where(secondary, year - last_used.astype(np.int64), 0)
        carbon = np.select([self._natural == code for code in _BIOMASS], list(_BIOMASS.values())) * (1 - np.exp(-age / 30))
        area = np.maximum(np.bincount(self._cell.ravel(), (self._areas * secondary).ravel(), total), 1e-9)
        states += [np.bincount(self._cell.ravel(), (self._areas * v).ravel(), total) / area for v in (age, carbon)]

        at = len(self._file.dimensions["time"])
        self._file["time"][at] = year - 850
        for variable, values in zip(self._variables.values(), states, strict=True):
            variable[at] = np.where(self._dry, MISSING_VALUE, values.reshape(self._shape).astype(np.float32))


def write_luh2_static(paths: PlanetPaths, natural: NDArray[np.uint8], *, grid: Grid, seed: int) -> None:
    """Write potential biomass, potential forest, cell area, share of ice and water, and country codes."""
    areas = np.broadcast_to(grid.cell_areas()[:, None], grid.shape)
    whole = np.broadcast_to(cell_areas(grid.coarse)[:, None], grid.coarse.shape)
    biomass = np.select([natural == code for code in _BIOMASS], list(_BIOMASS.values()))
    forest = block_sum(areas * (natural == 44), grid.factor) / whole
    water = block_sum(areas * np.isin(natural, (0, 77)), grid.factor) / whole
    lat, lon = (np.deg2rad(v) for v in np.meshgrid(*centres(grid.coarse), indexing="ij"))
    here = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1)
    capitals = np.random.default_rng([seed, 99]).standard_normal((24, 3))
    country = 1 + np.argmax(here @ (capitals / np.linalg.norm(capitals, axis=1, keepdims=True)).T, axis=-1)
    fields = {
        "ptbio": (block_sum(areas * biomass, grid.factor) / whole, "potential biomass carbon content", "kg C m-2"),
        "fstnf": (forest > 0.5 * (1 - water), "mask denoting forest (1) or non-forest (0)", "1"),
        "carea": (whole / 1e6, "area of grid cell", "km2"),
        "icwtr": (water, "ice/water fraction", "1"),
        "ccode": (np.where(water < 1, country, 0), "country codes", "1"),
    }
    with netCDF4.Dataset(paths.static_data, "w", format="NETCDF4") as file:
        file.setncatts({"title": f"{TITLE}: static data", "Conventions": "CF-1.6", "source": "ai4land.synthetic.planet"})
        _coarse_axes(file, grid)
        for name, (values, text, units) in fields.items():
            attrs = {"long_name": text, "units": units}
            _coarse_variable(file, name, ("lat", "lon"), attrs)[:] = np.asarray(values, dtype=np.float32)
