"""Land-use states of LUH2 and LUH3 as a scenario on the coarse grid.

A scenario is one float32 DataArray ``coarse`` (year, state, coarse_latitude, coarse_longitude) of shares of the cell, NaN
where the source has no data. :func:`open_states` reads LUH2 v2h (850-2015), v2f (2015-2100), LUH3 and files cut from them
by content, not by name: any latitude order, any longitude branch, several time encodings and units. It reads only the requested
years and cells.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from dask.delayed import delayed
from numpy.typing import NDArray

from ai4land.errors import DataError
from ai4land.grid import Grid
from ai4land.rasters.file import reading
from ai4land.scenario.coarse import HIGH, HUGE, as_scenario, blocks, check_shares, check_sums, open_source, to_shares
from ai4land.scenario.regrid import Footprint, find_centres, footprint
from ai4land.years import pick_years, years_in

_log = logging.getLogger(__name__)

STATES = ("primf", "primn", "secdf", "secdn", "pastr", "range", "urban", "c3ann", "c4ann", "c3per", "c4per", "c3nfx")
"""The states of LUH2."""
LUH3_STATES = (*STATES, "pltns")
"""The states of LUH3: those of LUH2 and planted forest."""
REDUCED_STATES = ("primf", "primn", "secdf", "secdn", "crops", "pastr", "urban")
"""States of files that sum the five crop types into ``crops``; ``range`` is optional."""

_BLOCK_BYTES = 128e6


@dataclass(frozen=True, eq=False)
class _StatesFile:
    """One open file: its states, the year of every step, the part that the grid needs, and 1 - icwtr there (NaN: unknown)."""

    path: Path
    dataset: xr.Dataset
    dims: tuple[Hashable, Hashable]
    names: tuple[str, ...]
    years: tuple[int, ...]
    cut: Footprint
    land: NDArray[np.float64] | None
    units: str | None
    cell_degrees: float | None

    def read(self, years: Sequence[int]) -> Iterator[tuple[list[int], NDArray[Any]]]:
        """Yield years and their checked shares ``(year, state, rows, cols)`` on the coarse grid, block by block."""
        steps_of_years = [self.years.index(y) for y in years]
        bytes_of_year = 4 * len(self.names) * self.cut.lat.size * self.cut.lon.size
        for steps in blocks(steps_of_years, max(1, int(_BLOCK_BYTES // bytes_of_year))):
            held = self.years[steps]
            shares = np.stack([self._state(name, steps) for name in self.names], axis=1)
            total = check_shares(shares, names=self.names, years=held, cut=self.cut, source=self.path)
            where: Any = {"years": held, "cut": self.cut, "source": self.path}
            if self.land is None:
                check_sums(total, want=1.0, what="at most", tolerance=HIGH - 1, above=True, **where)
            else:
                known = np.isfinite(self.land)
                check_sums(total, want=np.where(known, self.land, 1.0), what="1 - icwtr =", above=~known, **where)
            yield list(held), self.cut.to_box(shares)

    def _state(self, name: str, steps: slice) -> NDArray[np.float32]:
        variable = self.dataset[name]
        units = str(variable.attrs.get("units", "")) if self.units is None else self.units
        with reading(str(self.path), kind="NetCDF"):
            values = self.cut.cut(variable.isel(time=steps), dims=self.dims)
        where = f"{name} in {self.path}"
        return to_shares(values, units=units, lat=self.cut.lat, source=where, cell_degrees=self.cell_degrees)


def _schema(dataset: xr.Dataset, path: Path) -> tuple[str, ...]:
    reduced = "crops" in dataset
    known = (*REDUCED_STATES, "range") if reduced else LUH3_STATES
    lacking = [n for n in (REDUCED_STATES if reduced else STATES) if n not in dataset]
    twice = [n for n in STATES if n.startswith("c") and n in dataset] if reduced else []
    if lacking or twice:
        raise DataError(
            f"{path} lacks the states {lacking} and has {sorted(map(str, dataset.data_vars))}, expected {list(STATES)}, these and pltns, "
            f"or {list(REDUCED_STATES)}; complete the file" + (f", or drop crops, which counts {twice} twice" if twice else "")
        )
    return tuple(n for n in known if n in dataset)


def _ice_and_water(static: str | Path) -> xr.DataArray:
    """Read the ice and water share of each cell of the static file ``(lat, lon)``, NaN where missing."""
    with open_source(static) as dataset:
        if "icwtr" not in dataset:
            raise DataError(
                f"{static} holds {sorted(map(str, dataset.data_vars))}, expected icwtr; give staticData_quarterdeg.nc"
            )
        lat, lon = find_centres(dataset, source=static)
        with reading(str(static), kind="NetCDF"):
            share = dataset["icwtr"].squeeze(drop=True).transpose(lat, lon).load().astype(np.float64)
        return share.where(np.abs(share) < HUGE).rename({lat: "lat", lon: "lon"})


def _land(water: xr.DataArray, cut: Footprint, static: str | Path) -> NDArray[np.float64]:
    """Compute the land share of the cells of a cut, NaN where unknown."""
    far_lat = np.abs(water["lat"].values[:, None] - cut.lat)
    far_lon = np.abs((water["lon"].values[:, None] - cut.lon + 180) % 360 - 180)
    if max(far_lat.min(axis=0).max(), far_lon.min(axis=0).max()) > 1e-3:
        raise DataError(f"{static} has other cells than the states, expected the same grid; give the static file of the release")
    return 1 - np.asarray(water.values[np.ix_(far_lat.argmin(axis=0), far_lon.argmin(axis=0))])


def open_states(
    paths: str | Path | Sequence[str | Path],
    *,
    grid: Grid,
    static: str | Path | None = None,
    years: Iterable[int] | None = None,
    units: str | None = None,
    time_units: str | None = None,
    cell_degrees: float | None = None,
    years_at_once: int | None = None,
) -> xr.DataArray:
    """Read land-use states of LUH2 or LUH3 on the coarse cells of a grid.

    Parameters
    ----------
    paths
        One file, or several that follow one another in time. The last year of a file may be the first of the next
        (2015 in v2h and v2f): the later file wins. Other years held twice must agree.
    grid
        The grid; its coarse cells are filled, NaN where the files do not reach.
    static
        ``staticData_quarterdeg.nc``; with it the states must sum to 1 - icwtr, to at most 1 where it has no icwtr.
    years
        Years to read; all by default.
    units, time_units
        In place of those in the files.
    cell_degrees
        Side of the source cell that values in km2 are counted in, degrees.
    years_at_once
        Read so many years at a time, when they are asked for: the result is a Dask array with a chunk for each part, and the files
        stay open as long as it lives. By default all years are read now.

    Returns
    -------
    xarray.DataArray
        Scenario ``coarse`` (year, state, coarse_latitude, coarse_longitude), float32 shares of the cell.

    Raises
    ------
    DataError
        If a file is damaged or incomplete, in unknown units, out of range, without a wanted year, or does not overlap the
        grid; if the files hold different states or contradict each other. What is wrong with values shows when they are read.
    """
    listed = [paths] if isinstance(paths, str | Path) else list(paths)
    if not listed:
        raise DataError("paths is empty, expected one states file or more; give paths")
    water = None if static is None else _ice_and_water(static)
    with ExitStack() as stack:
        files: list[_StatesFile] = []
        for path in map(Path, listed):
            dataset = stack.enter_context(open_source(path))
            names = _schema(dataset, path)
            lat, lon = find_centres(dataset, source=path)
            if "time" not in dataset.coords or any(set(dataset[n].dims) != {"time", lat, lon} for n in names):
                raise DataError(
                    f"{path} has states over {dataset[names[0]].dims}, expected time, {lat}, {lon}; rename its dimensions"
                )
            cut = footprint(dataset[lat].values, dataset[lon].values, box=grid.coarse, source=path)
            land = None if water is None or static is None else _land(water, cut, static)
            steps = tuple(int(y) for y in years_in(dataset["time"], source=path, units=time_units))
            files.append(_StatesFile(path, dataset, (lat, lon), names, steps, cut, land, units, cell_degrees))
        files.sort(key=lambda f: min(f.years))
        names = files[0].names
        other = next((f for f in files if f.names != names), None)
        if other:
            raise DataError(
                f"{other.path} holds the states {list(other.names)}, expected those of {files[0].path}, {list(names)}; use one release"
            )
        wanted = pick_years([y for f in files for y in f.years], years, source=", ".join(str(f.path) for f in files))
        rows, cols = (int(v) for v in grid.coarse.shape)
        values: Any
        if years_at_once is None:
            values = _read(wanted, files=files, shape=(rows, cols))
        else:
            read = delayed(partial(_read, files=files, shape=(rows, cols)), pure=False, traverse=False)
            parts = [wanted[i : i + years_at_once] for i in range(0, len(wanted), years_at_once)]
            shapes = [(len(part), len(names), rows, cols) for part in parts]
            values = da.concatenate(
                [da.from_delayed(read(part), shape=s, dtype=np.float32) for part, s in zip(parts, shapes, strict=True)]
            )
            stack.pop_all()  # leaves the files open
    return as_scenario(values, years=wanted, states=names, grid=grid)


def _read(years: list[int], *, files: list[_StatesFile], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Read years ``(year, state, rows, cols)`` in order of time; if two files hold a year, the later file wins."""
    values = np.full((len(years), len(files[0].names), *shape), np.nan, dtype=np.float32)
    last = -(2**62)
    owner: dict[int, Path] = {}
    for file in files:
        for some, shares in file.read([y for y in years if y in file.years]):
            for year, new in zip(some, shares, strict=True):
                old = values[years.index(year)]
                if year in owner:
                    both = np.isnan(old) == np.isnan(new)
                    gap = float(np.where(both, np.nan_to_num(np.abs(old - new)), 1).max())
                    if gap > 1e-6 and not (year == last == min(file.years)):
                        raise DataError(
                            f"shares of {year} in {file.path} differ by {gap:g} from {owner[year]}, expected one value a year; "
                            "give only files that follow one another"
                        )
                    _log.log(
                        logging.WARNING if gap > 1e-6 else logging.INFO,
                        "%d is in %s and %s (largest difference %g): the latter is used",
                        *(year, owner[year], file.path, gap),
                    )
                old[:] = new
                owner[year] = file.path
        last = max(last, *file.years)
    return values
