"""Yearly changes of class areas in coarse cells, added to a map, as a scenario.

A file gives km2 gained and lost by each class in its cells. The land that a cell represents is its *zone*: the land inside it,
and land of cells without data that the producer counted with it (coastal slivers). A zone may span several coarse cells. Its
change is spread over its parts so that no part loses more than it holds, and each gains what it loses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import xarray as xr
from affine import Affine
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from ai4land.errors import ConfigError, DataError
from ai4land.grid import FINE_DIMS, Grid, Window
from ai4land.legend import MISSING, Legend
from ai4land.scenario.coarse import EARTH_RADIUS_KM, as_scenario
from ai4land.scenario.regrid import cell_edges, sphere_areas
from ai4land.years import whole_year

_log = logging.getLogger(__name__)

LAND = "cell_area"
"""Band with the km2 of land that a cell represents."""


@dataclass(frozen=True, eq=False)
class _File:
    """One year's change: ``km2`` (class, rows, cols), ``data`` whether a cell has any, ``land`` km2 that it represents."""

    path: Path
    transform: Affine
    km2: NDArray[np.float64]
    data: NDArray[np.bool_]
    land: NDArray[np.float64] | None

    @property
    def layout(self) -> tuple[object, ...]:
        """Key of the zones: files of one layout have the same zones."""
        land = None if self.land is None else self.land[self.data].tobytes()
        return tuple(self.transform), self.data.shape, self.data.tobytes(), land


@dataclass(frozen=True, eq=False)
class _Parts:
    """Pieces of land of one coarse cell and one zone: ``cell`` (part), ``zone`` (part, layout), ``km2`` (part, class)."""

    cell: NDArray[np.int64]
    zone: NDArray[np.int64]
    km2: NDArray[np.float64]


def open_change(
    paths: Mapping[int, str | Path],
    *,
    base: Callable[[Window], NDArray[np.uint8]],
    base_year: int,
    legend: Legend,
    grid: Grid,
    merge: bool = True,
) -> xr.DataArray:
    """Add yearly changes of class areas to the map of a base year.

    A zone's loss of a class is taken from its parts in proportion to the area of the class that each holds; its gains are
    given to the parts in proportion to what each lost, so that every part stays as large as it is. Loss beyond what a
    zone holds is dropped, with gains of the same size.

    Parameters
    ----------
    paths
        GeoTIFF of every year after the base year: the change from the year before to this year in km2, a band a class,
        described ``LC<code>``, and possibly ``cell_area``, the km2 of land that a cell speaks for; other bands are
        ignored, NaN is no change. Its cells need not be those of the grid.
    base
        From a window of the fine grid to the map of the base year there, as class codes.
    base_year
        The first year of the result.
    legend
        The legend whose codes the map and the bands carry.
    grid
        The target, in degrees.
    merge
        Count land in cells without data with the cell whose centre is nearest in degrees (fine cell by fine cell), where
        this brings the land of that zone closer to ``cell_area``. Without such a band, or if false, it does not change.

    Returns
    -------
    xarray.DataArray
        Scenario ``coarse`` (year, state, coarse_latitude, coarse_longitude), states the class codes: shares of the mapped
        land by true area; NaN where there is none.

    Raises
    ------
    DataError
        If a file is damaged, not in degrees, without class bands, without overlap with the map, or its changes are
        greater than its cells; if a year is lacking.
    ConfigError
        If the grid is not in degrees.
    """
    if not grid.geographic:
        raise ConfigError(f"grid is in {grid.fine.crs}, expected degrees; files of change are in degrees")
    years = sorted(whole_year(y) for y in paths)
    if years != list(range(base_year + 1, base_year + 1 + len(years))) or not years:
        raise DataError(f"changes are for the years {years}, expected every year from {base_year + 1}; give the files that lack")
    read = {year: _read(Path(paths[year]), legend) for year in years}
    layouts = {file.layout: file for file in read.values()}
    parts = _split(base, list(layouts.values()), legend=legend, grid=grid, merge=merge)
    order = list(layouts)
    held, shape = parts.km2, (legend.n, int(grid.coarse.shape[0]), int(grid.coarse.shape[1]))
    values = np.empty((len(years) + 1, *shape), dtype=np.float32)
    values[0] = _shares(held, parts.cell, shape)
    for number, year in enumerate(years, start=1):
        file = read[year]
        zone = parts.zone[:, order.index(file.layout)]
        held, dropped = _spread(file.km2.reshape(legend.n, -1).T, zone, held)
        if dropped > 0:
            _log.info("%s: %.1f km2 of loss in %d exceeds what its zones hold and is dropped", file.path, dropped, year)
        values[number] = _shares(held, parts.cell, shape)
    return as_scenario(values, years=[base_year, *years], states=[str(c) for c in legend.codes], grid=grid)


def _read(path: Path, legend: Legend) -> _File:
    """Read and check one file."""
    try:
        with rasterio.open(path) as file:
            labels = [str(d or "") for d in file.descriptions]
            bands = {n: int(d[2:]) for n, d in enumerate(labels) if d.startswith("LC") and d[2:].isdigit()}
            a, crs, shape = file.transform, file.crs, file.shape
            km2 = file.read([n + 1 for n in bands], out_dtype="float64", masked=True).filled(np.nan) if bands else None
            area = file.read(labels.index(LAND) + 1, out_dtype="float64", masked=True).filled(np.nan) if LAND in labels else None
    except rasterio.errors.RasterioError as error:
        raise DataError(f"{path} is truncated or not a GeoTIFF ({error}), expected a whole file; download it again") from error
    if km2 is None:
        raise DataError(f"{path} has the bands {labels}, expected bands described LC<code>; describe its bands")
    if crs is None or not crs.is_geographic or a.b or a.d:
        raise DataError(f"{path} is in {crs}, expected a north-up latitude-longitude file; reproject it")
    finite = np.isfinite(km2)
    km2 = np.where(finite, km2, 0)
    lat = a.f + (np.arange(shape[0]) + 0.5) * a.e
    cells = np.broadcast_to(sphere_areas(cell_edges(lat), a.a, radius=EARTH_RADIUS_KM)[:, None], shape)
    most = float((np.abs(km2) / (cells if area is None else np.fmax(cells, area))).max())
    if most > 1.02:
        raise DataError(f"change in {path} reaches {most:.3g} times the area of its cell, expected km2; convert the file")
    out = np.zeros((legend.n, *shape))
    for klass, band in zip(legend.encode(np.array(list(bands.values())), source=str(path)), km2, strict=True):
        if klass != MISSING:
            out[klass] += band
    return _File(path, a, out, finite.any(axis=0), area)


def _split(base: Callable[[Window], NDArray[np.uint8]], files: list[_File], *, legend: Legend, grid: Grid, merge: bool) -> _Parts:
    """Cut the land of a map into parts, one per coarse cell and zone, for all layouts at once."""
    coords = grid.coords()
    lat, lon = (np.asarray(coords[d]) for d in FINE_DIMS)
    areas, n, f = grid.cell_areas() / 1e6, legend.n, grid.factor
    cols = int(grid.coarse.shape[1])
    found: list[_Parts] = []
    for w in grid.shards():
        index = legend.encode(base(w), source="base map")
        r, c = np.nonzero(index != MISSING)
        if not r.size:
            continue
        row, col = r + w.row, c + w.col
        cell = (row // f) * cols + col // f
        places = [_zones(file, lat[row], lon[col], merge) for file in files]
        first, part = np.unique(cell, return_inverse=True)
        for place in places:
            first, part = np.unique(part * (place.max() + 1) + place, return_inverse=True)
        _, first = np.unique(part, return_index=True)
        km2 = np.bincount(part * n + index[r, c], weights=areas[row], minlength=len(first) * n).reshape(-1, n)
        found.append(_Parts(cell[first], np.stack(places, axis=1)[first], km2.astype(np.float64)))
    if not found:
        raise DataError(f"base map has no class anywhere in {grid.bounds}, expected land; look at the grid and the file")
    cell, zones, held = (np.concatenate([getattr(p, name) for p in found]) for name in ("cell", "zone", "km2"))
    return _Parts(cell, np.stack([_choose(file, z, held) for file, z in zip(files, zones.T, strict=True)], axis=1), held)


def _zones(file: _File, lat: NDArray[np.float64], lon: NDArray[np.float64], merge: bool) -> NDArray[np.int64]:
    """Zone of each place: the cell with data that it lies in, ``size`` + the one with the nearest centre, or 2 ``size``."""
    a, (rows, cols), size = file.transform, file.data.shape, file.data.size
    row = np.floor((lat - a.f) / a.e).astype(np.int64)
    col = np.floor(((lon - a.c) % 360) / a.a).astype(np.int64)
    inside = (row >= 0) & (row < rows) & (col < cols)
    inside[inside] = file.data[row[inside], col[inside]]
    zone = np.where(inside, row * cols + col, 2 * size)
    if merge and file.land is not None and file.data.any() and not inside.all():
        r, c = np.nonzero(file.data)
        y, x = a.f + (r + 0.5) * a.e, a.c + (c + 0.5) * a.a
        centres = np.concatenate([np.stack([y, x + turn], axis=1) for turn in (-360.0, 0.0, 360.0)])
        pick = cKDTree(centres).query(np.stack([lat, lon], axis=1)[~inside])[1] % len(r)
        zone[~inside] = size + r[pick] * cols + c[pick]
    return zone


def _choose(file: _File, zone: NDArray[np.int64], km2: NDArray[np.float64]) -> NDArray[np.int64]:
    """Settle the zone of each part: its own, else the nearest where the file's land says that it was counted there; else -1."""
    size = file.data.size
    land = np.bincount(zone, weights=km2.sum(axis=1), minlength=2 * size + 1)
    inside, beside = land[:size], land[size : 2 * size]
    if not inside.any():
        raise DataError(f"{file.path} has no data where the map has land, expected some overlap; choose another region or file")
    wanted = np.zeros(size) if file.land is None else np.nan_to_num(file.land.ravel())
    merged = np.abs(inside + beside - wanted) < np.abs(inside - wanted)
    if beside.any():
        _log.info(
            "%s: %.0f of %.0f km2 of land in cells without data are counted with the nearest cell; land of all zones is %.0f km2, "
            "the file says %.0f",
            *(file.path, beside[merged].sum(), land[size:].sum(), inside.sum() + beside[merged].sum(), wanted.sum()),
        )
    taken = (zone >= size) & (zone < 2 * size)
    taken[taken] = merged[zone[taken] - size]
    return np.where(zone < size, zone, np.where(taken, zone - size, -1))


def _spread(change: NDArray[np.float64], zone: NDArray[np.int64], held: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Spread the change of zones ``(zone, class)`` over parts with km2 ``(part, class)``; also return the dropped loss."""
    at = zone >= 0
    z, have = zone[at], held[at]

    def total(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack([np.bincount(z, weights=v, minlength=len(change)) for v in values.T], axis=1)

    holds = total(have)
    wanted, gain = np.clip(-change, 0, None), np.clip(change, 0, None)
    wanted[holds.sum(axis=1) == 0], gain[holds.sum(axis=1) == 0] = 0, 0
    loss = np.minimum(wanted, holds)
    part_loss = have * _ratio(loss, holds)[z]
    gain *= np.where(wanted.sum(axis=1) > 0, _ratio(loss.sum(axis=1), wanted.sum(axis=1)), 1)[:, None]
    lost = part_loss.sum(axis=1)
    # A zone that gains without losing anything gains by area; the rest of its classes make room below.
    weight = np.where(loss.sum(axis=1)[z] > 0, _ratio(lost, loss.sum(axis=1)[z]), _ratio(have.sum(axis=1), holds.sum(axis=1)[z]))
    after = np.clip(have - part_loss, 0, None) + gain[z] * weight[:, None]
    out = held.copy()
    out[at] = after * _ratio(have.sum(axis=1), after.sum(axis=1))[:, None]
    return out, float((wanted - loss).sum())


def _ratio(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide, giving 0 where the divisor is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape)), where=b > 0)


def _shares(km2: NDArray[np.float64], cell: NDArray[np.int64], shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """Compute class shares ``(class, rows, cols)`` of the coarse cells, NaN without land."""
    size = shape[1] * shape[2]
    by_class = np.stack([np.bincount(cell, weights=v, minlength=size) for v in km2.T])
    land = by_class.sum(axis=0)
    return np.divide(by_class, land, out=np.full_like(by_class, np.nan), where=land > 0).reshape(shape)
