"""From any latitude-longitude file to the coarse cells of a grid.

Where the cells of the source are those of the target, they are only picked (:func:`nested_index`); everywhere else the
source is averaged by the area of the overlap: first-order conservative regridding (Jones 1999, Monthly Weather Review
127:2204, eq. 2 and 5). A :class:`Footprint` holds the part of a
source that a grid needs, so that only this part is read. Longitudes may run 0..360, -180..180 or start anywhere, latitudes
in either order. Overlaps are those of a sphere: sin(latitude) difference times longitude difference, so that they separate
into a matrix of rows and a matrix of columns.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from scipy import sparse

from ai4land.errors import ConfigError, DataError
from ai4land.grid import centres

MIN_SHARE = 1e-6
"""A target cell whose valid share is smaller than this is NaN."""
NEST_TOLERANCE = 1e-3
"""Cells are equal if centre and step differ by less than this fraction of a cell."""
_ROUNDING = 1e-12
_LATITUDES = ("lat", "latitude", "coarse_latitude", "y")
_LONGITUDES = ("lon", "longitude", "coarse_longitude", "x")


def find_centres(dataset: xr.Dataset, *, source: str | Path) -> tuple[Hashable, Hashable]:
    """Find the names of the latitude and of the longitude dimension.

    Raises
    ------
    DataError
        If there is none, or it has no coordinate in degrees.
    """
    found: list[Hashable] = []
    for what, names, limit in (("latitude", _LATITUDES, 90.0), ("longitude", _LONGITUDES, 360.0)):
        name = next((n for n in names if n in dataset.coords and dataset[n].dims == (n,)), None)
        if name is None:
            raise DataError(
                f"{source} has the coordinates {sorted(map(str, dataset.coords))}, expected a {what} named one of {list(names)}; "
                "rename it, and reproject a projected or curvilinear file to a regular latitude-longitude grid first"
            )
        worst = float(np.abs(dataset[name].values).max(initial=0.0))
        if not worst <= limit + 1e-3:
            raise DataError(f"{what} of {source} reaches {worst:g}, expected degrees up to {limit:g}; reproject it to degrees")
        found.append(name)
    return found[0], found[1]


def cell_edges(centre: NDArray[Any]) -> NDArray[np.float64]:
    """Find the edges of cells from their regular centres, shape ``(n + 1,)`` in the order of the centres.

    Raises
    ------
    DataError
        If there is one centre alone, or a step differs from the mean step by more than 1 %.

    >>> cell_edges(np.array([0.25, 0.75, 1.25])).tolist()
    [0.0, 0.5, 1.0, 1.5]
    """
    values = np.asarray(centre, dtype=np.float64)
    if values.ndim != 1 or values.size < 2:
        raise DataError(
            f"coordinate has shape {values.shape}, expected two or more cell centres; keep neighbours when cutting a file"
        )
    step = (values[-1] - values[0]) / (values.size - 1)
    worst = float(np.abs(np.diff(values) - step).max())
    if not worst <= 0.01 * abs(step) or step == 0:
        raise DataError(
            f"coordinate has steps that differ by {worst:g} from {step:g}, expected a regular one; regrid the file first"
        )
    return values[0] + (np.arange(values.size + 1) - 0.5) * step


def _match(source: NDArray[np.float64], target: NDArray[np.float64], *, period: float | None) -> NDArray[np.int64] | None:
    """Find the source index of each target cell, -1 beyond the source; None if the cells differ."""
    step = (source[-1] - source[0]) / (source.size - 1)
    want = (target[-1] - target[0]) / (target.size - 1) if target.size > 1 else step
    if abs(abs(step) - abs(want)) > NEST_TOLERANCE * abs(want):
        return None
    place = (target - source[0]) / step
    if period is not None:
        around = period / abs(step)
        place = (place + 0.5) % around - 0.5
    index = np.rint(place).astype(np.int64)
    inside = (index >= 0) & (index < source.size)
    if not inside.any():
        return None
    gap = source[index[inside]] - target[inside]
    if period is not None:
        gap = (gap + period / 2) % period - period / 2
    if np.abs(gap).max() > NEST_TOLERANCE * abs(step):
        return None
    return np.where(inside, index, -1)


def nested_index(lat: NDArray[Any], lon: NDArray[Any], box: GeoBox) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Find which source cells the cells of a GeoBox are, if they are the same cells.

    Parameters
    ----------
    lat, lon
        Cell centres of the source in degrees, in either order and on either branch of the circle.
    box
        North-up GeoBox in degrees.

    Returns
    -------
    tuple of arrays, or None
        Source row of every row and source column of every column of the box, -1 where the source does not reach. None
        where centres or steps differ by more than 1e-3 of a cell: the cells are not the same ones.

    >>> from ai4land.grid import make_grid
    >>> box = make_grid((-1, 0, 1, 1), coarse_cell=0.5, factor=1, shard=2).coarse
    >>> rows, cols = nested_index(np.arange(-89.75, 90, 0.5), np.arange(0.25, 360, 0.5), box)
    >>> rows.tolist(), cols.tolist()
    ([181, 180], [718, 719, 0, 1])
    """
    north_south, west_east = centres(box)
    cell_edges(lat), cell_edges(lon)
    rows = _match(np.asarray(lat, np.float64), north_south, period=None)
    cols = _match(np.asarray(lon, np.float64), west_east, period=360.0)
    return None if rows is None or cols is None else (rows, cols)


def _overlap(source: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the overlap of each target with each source interval, as a fraction of the target."""
    low, high = np.minimum(source[:-1], source[1:]), np.maximum(source[:-1], source[1:])
    left, right = np.minimum(target[:-1], target[1:])[:, None], np.maximum(target[:-1], target[1:])[:, None]
    share: NDArray[np.float64] = (np.minimum(right, high) - np.maximum(left, low)) / (right - left)
    share[share < _ROUNDING] = 0
    return share


def _weights(lat_edges: NDArray[Any], lon_edges: NDArray[Any], box: GeoBox) -> tuple[sparse.csr_array, sparse.csr_array]:
    """Overlap matrices ``(row, source row)`` and ``(column, source column)``; full rows sum to 1."""
    if box.crs is None or not box.crs.geographic:
        raise ConfigError(f"grid is in {box.crs}, expected degrees; a latitude-longitude source needs a geographic grid")
    lat = np.clip(np.asarray(lat_edges, np.float64), -90.0, 90.0)
    lon = np.asarray(lon_edges, np.float64)
    span = abs(float(lon[-1] - lon[0]))
    if span > 360 + 1e-3 * span / (lon.size - 1):
        raise DataError(f"source spans {span:g} degrees of longitude, expected at most 360; drop the repeated column")
    a = box.affine
    north_south = a.f + np.arange(box.shape[0] + 1) * a.e
    west_east = a.c + np.arange(box.shape[1] + 1) * a.a
    rows = _overlap(np.sin(np.deg2rad(lat)), np.sin(np.deg2rad(np.clip(north_south, -90.0, 90.0))))
    first = int(np.floor((west_east[0] - lon.max()) / 360))
    last = int(np.ceil((west_east[-1] - lon.min()) / 360))
    cols = np.sum([_overlap(lon + 360.0 * turn, west_east) for turn in range(first, last + 1)], axis=0)
    return sparse.csr_array(rows), sparse.csr_array(cols)


def _spread(plane: NDArray[np.float64], rows: sparse.csr_array, cols: sparse.csr_array) -> NDArray[np.float64]:
    return np.asarray((cols @ (rows @ plane).T).T)


def _average(values: NDArray[Any], rows: sparse.csr_array, cols: sparse.csr_array) -> NDArray[np.float64]:
    planes = values.reshape(-1, *values.shape[-2:])
    out = np.empty((len(planes), rows.shape[0], cols.shape[0]))
    known: NDArray[np.bool_] | None = None
    share = np.empty(0)
    for number, plane in enumerate(planes):
        valid = np.isfinite(plane)
        if known is None or not np.array_equal(valid, known):
            known, share = valid, _spread(valid.astype(np.float64), rows, cols)
            share[share < MIN_SHARE] = np.nan
        out[number] = _spread(np.where(valid, plane, 0).astype(np.float64), rows, cols) / share
    return out.reshape(*values.shape[:-2], *out.shape[-2:])


def sphere_areas(lat_edges: NDArray[Any], lon_step: float, *, radius: float) -> NDArray[np.float64]:
    """Area of one cell of each row on a sphere, in the square of the unit of ``radius``, shape ``(lat,)``.

    >>> round(float(sphere_areas(np.array([-90, 0, 90]), 360, radius=6371.0).sum()) / 1e6, 3)
    510.064
    """
    sin = np.sin(np.deg2rad(np.clip(np.asarray(lat_edges, np.float64), -90.0, 90.0)))
    return np.abs(np.diff(sin)) * np.deg2rad(abs(lon_step)) * radius**2


@dataclass(frozen=True, eq=False)
class Footprint:
    """The part of a latitude-longitude source that a GeoBox needs. Made by :func:`footprint`.

    Attributes
    ----------
    rows
        Rows of the source to read.
    cols
        Runs of columns of the source to read: one, or two where the part crosses the seam of the source.
    lat, lon
        Centres of the cells that are read.
    nested
        Whether source and target cells are the same, so that values pass unchanged.
    """

    rows: slice
    cols: tuple[slice, ...]
    lat: NDArray[np.float64]
    lon: NDArray[np.float64]
    nested: bool
    _to_rows: Any
    _to_cols: Any

    def cut(self, array: xr.DataArray, *, dims: tuple[Hashable, Hashable]) -> NDArray[Any]:
        """Read the part of an array over ``dims``, its latitude and longitude, which come last in the result."""
        lat, lon = dims
        parts = [array.isel({lat: self.rows, lon: run}).load().transpose(..., lat, lon).values for run in self.cols]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    def to_box(self, values: NDArray[Any]) -> NDArray[Any]:
        """Bring values ``(..., lat, lon)`` of this part to the GeoBox ``(..., rows, cols)``; NaN where missing."""
        if not self.nested:
            return _average(values, self._to_rows, self._to_cols)
        out = values[..., self._to_rows, :][..., self._to_cols]
        out[..., self._to_rows < 0, :] = np.nan
        out[..., self._to_cols < 0] = np.nan
        return out


def _runs(needed: NDArray[np.bool_]) -> tuple[slice, ...]:
    index = np.flatnonzero(needed)
    return tuple(slice(int(run[0]), int(run[-1]) + 1) for run in np.split(index, np.flatnonzero(np.diff(index) > 1) + 1))


def footprint(lat: NDArray[Any], lon: NDArray[Any], *, box: GeoBox, source: str | Path) -> Footprint:
    """Find the part of a source that a GeoBox needs, and how its cells become those of the box.

    Parameters
    ----------
    lat, lon
        Cell centres of the source in degrees.
    box
        North-up GeoBox in degrees.
    source
        Name of the source for messages.

    Raises
    ------
    ConfigError
        If the GeoBox is not in degrees.
    DataError
        If the source is irregular or does not overlap the box at all.
    """
    lat, lon = np.asarray(lat, np.float64), np.unwrap(np.asarray(lon, np.float64), period=360.0)
    try:
        rows, cols = _weights(cell_edges(lat), cell_edges(lon), box)
    except DataError as error:
        raise DataError(f"grid of {source} is not usable: {error}") from error
    use_rows, use_cols = (np.asarray(m.sum(axis=0)) > 0 for m in (rows, cols))
    if not (use_rows.any() and use_cols.any()):
        a, (height, width) = box.affine, box.shape
        raise DataError(
            f"{source} covers {lat.min():g}..{lat.max():g} N and {lon.min():g}..{lon.max():g} E, expected some overlap with the region "
            f"{a.f + height * a.e:g}..{a.f:g} N and {a.c:g}..{a.c + width * a.a:g} E; choose another region or file"
        )
    index = nested_index(lat, lon, box)
    if index is not None:
        use_rows = np.isin(np.arange(lat.size), index[0])
        use_cols = np.isin(np.arange(lon.size), index[1])
    row_run = slice(int(np.flatnonzero(use_rows)[0]), int(np.flatnonzero(use_rows)[-1]) + 1)
    col_runs = _runs(use_cols)
    picked = np.concatenate([np.arange(run.start, run.stop) for run in col_runs])
    if index is None:
        return Footprint(row_run, col_runs, lat[row_run], lon[picked], False, rows[:, row_run], cols[:, picked])
    to_rows = np.where(index[0] < 0, -1, index[0] - row_run.start)
    to_cols = np.where(index[1] < 0, -1, np.searchsorted(picked, index[1]))
    return Footprint(row_run, col_runs, lat[row_run], lon[picked], True, to_rows, to_cols)
