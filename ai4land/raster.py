"""Any gridded file onto the fine grid, with its place checked.

:func:`open_raster` reads one layer of a GeoTIFF or of a NetCDF or Zarr variable, in any coordinate reference system, and
gives exactly the cells of the grid. It works in strips of rows: of each it reads the source cells that are needed, at full
resolution (never an overview), and warps them in memory. What would end in a silently shifted, empty or half-empty map is
refused: pixel-is-point files, longitudes of 0..360, boxes that do not meet, truncated files.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rasterio.errors
import rasterio.warp
import xarray as xr
from affine import Affine
from numpy.typing import DTypeLike, NDArray
from odc.geo.crs import CRS

from ai4land.errors import ConfigError, DataError
from ai4land.gaps import check_any
from ai4land.grid import FINE_DIMS, Grid, Window, edges, read_window
from ai4land.rasterfile import RasterLayer, open_layer, reading

_log = logging.getLogger(__name__)
Resampling = Literal["exact", "nearest", "bilinear", "average", "mode", "min", "max"]
Bounds = tuple[float, float, float, float]
Recode = Callable[[NDArray[Any]], NDArray[Any]]
SIZE_TOLERANCE = 1e-5
"""Relative difference of cell sizes that counts as none."""
OFFSET_TOLERANCE = 0.02
"""Distance from the lattice, in cells, that counts as none."""
_DRIFT_TOLERANCE = 0.25
_STRIP_CELLS = 2**24
_PLANE = "EPSG:3857"
MOST_CELLS = 2**31
"""Cells of a source that are held at once, under a row of the grid or under a shard."""


@dataclass(frozen=True)
class _Values:
    """A layer as an array that is cut by slices, with its missing cells marked: ``nodata`` in codes, else NaN."""

    layer: RasterLayer
    codes: np.dtype[Any] | None
    nodata: float
    recode: Recode | None
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.shape

    def __getitem__(self, key: Any) -> NDArray[Any]:
        layer = self.layer
        with reading(layer.source):
            values, valid = layer.read(key[-2], key[-1])
        if self.codes is None:
            out = values.astype(self.dtype)
            if (layer.scale, layer.offset) != (1, 0):
                out = (values.astype(np.float64) * layer.scale + layer.offset).astype(self.dtype)
            out[~valid] = np.nan
            return out
        codes = _whole(values, valid, self.codes, layer.source)
        codes[~valid] = self.nodata
        if self.recode is not None:
            codes = self.recode(codes)
        return codes if self.dtype == self.codes else np.where(codes == self.nodata, np.nan, codes).astype(self.dtype)


def open_raster(
    path: str | Path,
    *,
    grid: Grid,
    resampling: Resampling,
    band: int | str | None = None,
    variable: str | None = None,
    dtype: DTypeLike = "float32",
    nodata: int | None = None,
    recode: Recode | None = None,
) -> xr.DataArray:
    """Read one layer of a file onto the fine cells of the grid.

    Parameters
    ----------
    path
        GeoTIFF (or any other raster of GDAL), NetCDF file or Zarr group. A NetCDF or Zarr variable has 1-D latitude and
        longitude, or y and x with a grid mapping; in either order, rows from the north or from the south.
    grid
        The target.
    resampling
        ``exact`` cuts and pads and changes no value: the source must lie on the lattice of the grid. The others are those
        of GDAL; missing cells of the source take no part. Averages are of the source's cells, weighted by overlap.
    band
        Number from 1, or description, of a GeoTIFF's band; number or label along the third dimension of a variable.
    variable
        Name of the NetCDF or Zarr variable; needed where there are several.
    dtype
        Of the result. Scale and offset of the file are applied to floats. Whole numbers are codes: they are never averaged,
        and signed bytes are read as the unsigned ones they stand for (-126 is 130).
    nodata
        Value of missing cells of a result of whole numbers; 255 or the largest number of ``dtype`` if not given.
    recode
        Maps codes to codes, before any resampling.

    Returns
    -------
    xarray.DataArray
        ``(latitude, longitude)`` with the coordinates of the grid, NaN or ``nodata`` (also in ``attrs``) where the source
        has no value.

    Raises
    ------
    DataError
        If the file is absent, truncated or without reference system, its layer is not clear, its longitudes run over
        0..360 where the grid needs negative ones, it does not meet the grid, does not lie on its lattice (``exact``),
        or has no valid cell there.
    ConfigError
        If codes are to be averaged.
    """
    kind = np.dtype(dtype)
    codes = None if kind.kind == "f" else kind
    if codes is not None and resampling in ("bilinear", "average"):
        raise ConfigError(
            f"resampling of {path} is {resampling}, expected exact, nearest, mode, min or max for whole numbers ({kind}); choose one"
        )
    missing = np.nan if codes is None else int(np.iinfo(codes).max if nodata is None else nodata)
    with open_layer(path, band=band, variable=variable) as source:
        if codes is not None and (source.scale, source.offset) != (1, 0):
            raise DataError(
                f"{source.source} has scale {source.scale:g} and offset {source.offset:g}, expected 1 and 0 for {kind}; read floats"
            )
        _check_place(source, grid)
        work = kind
        if resampling == "exact":
            _check_crs(source, grid)
            check_lattice(source.transform, grid, source=source.source)
        elif codes is not None:
            work = np.dtype(np.float32 if kind.itemsize <= 2 else np.float64)
        _log.debug("%s: %s cells, %s, %s", source.source, source.shape, source.crs, resampling)
        values = _Values(source, codes, missing, recode, work)
        out = np.full(grid.shape, missing, dtype=kind)
        for strip in _strips(source, grid):
            part = _cut(values, grid, strip) if resampling == "exact" else _warp(values, grid, strip, resampling)
            if part is not None:
                out[strip.slices] = part if part.dtype == kind else np.where(np.isnan(part), missing, part)
        attrs = {**source.attrs, **({} if codes is None else {"nodata": int(missing)})}
        coords = {d: grid.coords()[d] for d in FINE_DIMS}
        field = xr.DataArray(out, dims=FINE_DIMS, coords=coords, name=source.name, attrs=attrs)
    check_any(source.source, field, nodata=missing)
    return field


# -- checks -------------------------------------------------------------------------------------------------------------


def check_lattice(transform: Affine, grid: Grid, *, source: str, exact: bool = True) -> None:
    """Check that a source's cells are cells of the grid's lattice.

    Parameters
    ----------
    transform
        From column and row to the upper-left corner of a cell, in the reference system of the grid.
    grid
        The target.
    source
        Its name for the message.
    exact
        If false, only a shift by half a cell at the grid's cell size is refused (the mark of a pixel-is-point file).

    Raises
    ------
    DataError
        If they are not.
    """
    a, t = grid.fine.affine, transform
    sizes = f"cells of {t.a:.9g} x {abs(t.e):.9g}, expected {a.a:.9g} x {-a.e:.9g} as in the grid"
    same = not (t.b or t.d) and math.isclose(t.a, a.a, rel_tol=SIZE_TOLERANCE)
    if not (same and math.isclose(abs(t.e), -a.e, rel_tol=SIZE_TOLERANCE)):
        if exact:
            ways = "average or mode (classes)" if t.a < a.a * 0.67 else "nearest or bilinear"
            raise DataError(f"{source} has {sizes}; it can not be cut without resampling, choose resampling {ways}")
        return
    start = ((t.c - a.c) / a.a, (t.f - a.f) / a.e)
    off = [abs(v - round(v)) for v in start]
    if any(abs(v - 0.5) < 0.05 for v in off):
        raise DataError(
            f"{source} lies {off[0]:.2f} x {off[1]:.2f} cells off the lattice of the grid, expected 0: half-pixel shift "
            "(pixel-is-point file?); correct its corner by half a cell (gdal_translate -a_ullr, gdal_edit.py -a_ullr)"
        )
    drift = max(abs(t.a / a.a - 1) * grid.shape[1], abs(abs(t.e) / -a.e - 1) * grid.shape[0])
    if exact and (max(off) > OFFSET_TOLERANCE or drift > _DRIFT_TOLERANCE):
        raise DataError(
            f"{source} has {sizes}, and lies {off[0]:.3g} x {off[1]:.3g} cells off its lattice, expected 0; "
            "choose resampling nearest or bilinear, or another origin of the grid"
        )


def check_longitudes(bounds: Bounds, grid: Grid, *, cell: float, source: str) -> None:
    """Refuse longitudes of 0..360 where the grid needs negative ones; ``bounds`` and ``cell`` are in degrees."""
    west, east = bounds[0], bounds[2]
    if west >= -cell and east > 180 + cell and grid.bounds[0] < west - 1e-6:
        raise DataError(
            f"longitudes run 0..360 in {source} ({west:g}..{east:g}), expected -180..180 (the grid starts at {grid.bounds[0]:g}); "
            'roll them: ds.assign_coords(lon=(ds.lon + 180) % 360 - 180).sortby("lon"), or cdo sellonlatbox,-180,180,-90,90'
        )


def check_cells(transform: Affine, shape: tuple[int, int], crs: CRS, grid: Grid, *, source: str) -> None:
    """Refuse a source with so many cells under a shard of the grid that they would fill the memory, whatever is in them.

    Raises
    ------
    DataError
        If it has.
    """
    under = float(shape[0]) * float(shape[1])
    if grid.fine.crs is not None and same_crs(crs, grid.fine.crs) and transform.determinant:
        under = min(under, grid.shard**2 * abs(grid.fine.affine.determinant / transform.determinant))
    if under > MOST_CELLS:
        raise _too_many(source, under, f"a shard of {grid.shard} x {grid.shard} cells")


def _too_many(source: str, cells: float, under: str) -> DataError:
    return DataError(
        f"{source} has {cells:.3g} cells under {under} of the grid, expected at most {MOST_CELLS:.3g}; "
        "make it coarser (gdalwarp -tr), or check its header"
    )


def _check_place(source: RasterLayer, grid: Grid) -> None:
    box = source.bounds
    if source.crs.geographic:
        check_longitudes(box, grid, cell=source.transform.a, source=source.source)
        if box[1] < -90 - source.transform.a or box[3] > 90 + source.transform.a:
            raise DataError(f"latitudes of {source.source} run {box[1]:g}..{box[3]:g}, expected -90..90; look at its corner")
    try:
        there = _transform_bounds(source.crs, _crs(grid), box)
    except rasterio.errors.RasterioError:
        return
    west, south, east, north = grid.bounds
    apart = not source.wraps and there[0] < there[2] and (there[0] >= east or there[2] <= west)
    if apart or there[1] >= north or there[3] <= south:
        raise DataError(
            f"{source.source} does not meet the grid: it covers {_box(there)}, expected an overlap with {_box(grid.bounds)} "
            "(west, south, east, north); choose another file or another grid.bbox"
        )


def _check_crs(source: RasterLayer, grid: Grid) -> None:
    if not same_crs(source.crs, _crs(grid)):
        raise DataError(
            f"reference system of {source.source} is {source.crs.proj.name}, expected {_crs(grid).proj.name} for resampling exact; "
            "choose resampling nearest or bilinear, average or mode"
        )


def _crs(grid: Grid) -> CRS:
    if grid.fine.crs is None:
        raise ConfigError("grid has no coordinate reference system, expected one; give for example crs=EPSG:4326")
    return grid.fine.crs


def _box(bounds: Bounds) -> str:
    return "(" + ", ".join(f"{v:g}" for v in bounds) + ")"


def same_crs(source: CRS, target: CRS) -> bool:
    """Whether two reference systems are one, whatever the order of axes; degrees on an unnamed datum count as any degrees."""
    if source == target or source.proj.equals(target.proj, ignore_axis_order=True):
        return True
    datum = source.proj.datum
    unknown = datum is None or datum.name.lower().replace("_", " ").startswith(("unknown", "not specified"))
    return bool(source.geographic and target.geographic and unknown)


# -- onto the grid ------------------------------------------------------------------------------------------------------


def _transform_bounds(source: CRS, target: CRS, box: Bounds) -> Bounds:
    if same_crs(source, target):
        return box
    if source.geographic:
        box = (box[0], max(box[1], -90.0), box[2], min(box[3], 90.0))
    west, south, east, north = rasterio.warp.transform_bounds(source.to_wkt(), target.to_wkt(), *box, densify_pts=101)
    return west, south, east, north


def _strips(source: RasterLayer, grid: Grid) -> Iterator[Window]:
    """Strips of rows, each of so many that neither its own nor the source's cells fill the memory."""
    rows, cols = grid.shape
    ahead = _source_window(source, grid, Window(0, 0, rows, cols))
    cost = max(cols, 0 if ahead is None else ahead.height * ahead.width // rows)
    if cost > MOST_CELLS:
        raise _too_many(source.source, cost, "a row")
    height = max(1, min(rows, _STRIP_CELLS // max(cost, 1)))
    for row in range(0, rows, height):
        yield Window(row, 0, min(height, rows - row), cols)


def _source_window(source: RasterLayer, grid: Grid, strip: Window) -> Window | None:
    """Find the source cells around a strip; columns may reach beyond a source that wraps."""
    t, (rows, cols) = source.transform, source.shape
    try:
        west, south, east, north = _transform_bounds(_crs(grid), source.crs, edges(grid.fine[strip.slices]))
    except rasterio.errors.RasterioError:
        west, south, east, north = source.bounds
    if not all(map(math.isfinite, (west, south, east, north))) or west >= east:
        west, south, east, north = source.bounds
    top, bottom, left, right = (north - t.f) / t.e, (south - t.f) / t.e, (west - t.c) / t.a, (east - t.c) / t.a
    pad = 3 + 2 * math.ceil(max((bottom - top) / strip.height, (right - left) / strip.width))
    top, bottom = max(math.floor(top) - pad, 0), min(math.ceil(bottom) + pad, rows)
    left, right = math.floor(left) - pad, math.ceil(right) + pad
    if not source.wraps:
        left, right = max(left, 0), min(right, cols)
    return Window(top, left, bottom - top, right - left) if top < bottom and left < right else None


def _cut(values: _Values, grid: Grid, strip: Window) -> NDArray[Any]:
    a, t = grid.fine.affine, values.layer.transform
    row, col = round((a.f - t.f) / t.e) + strip.row, round((a.c - t.c) / t.a) + strip.col
    fill = values.nodata if values.codes is not None else np.nan
    return read_window(values, Window(row, col, strip.height, strip.width), fill=fill, wrap=values.layer.wraps)


def _warp(values: _Values, grid: Grid, strip: Window, resampling: str) -> NDArray[Any] | None:
    source = values.layer
    window = _source_window(source, grid, strip)
    if window is None:
        return None
    cells = read_window(values, window, fill=np.nan, wrap=source.wraps)
    out = np.full((strip.height, strip.width), np.nan, dtype=values.dtype)
    from_cells = source.transform * Affine.translation(window.col, window.row)
    to_cells = grid.fine.affine * Affine.translation(strip.col, strip.row)
    from_crs, to_crs = source.crs.to_wkt(), _crs(grid).to_wkt()
    if same_crs(source.crs, _crs(grid)):
        from_cells, to_cells, from_crs, to_crs = *_in_cells(from_cells, to_cells), _PLANE, _PLANE
        options = {}
    else:
        scale = _scale(source, grid, strip)
        options = {"XSCALE": scale, "YSCALE": scale}
    rasterio.warp.reproject(
        cells,
        out,
        src_transform=from_cells,
        src_crs=from_crs,
        src_nodata=np.nan,
        dst_transform=to_cells,
        dst_crs=to_crs,
        dst_nodata=np.nan,
        resampling=rasterio.warp.Resampling[resampling],
        **options,
    )
    return out


def _scale(source: RasterLayer, grid: Grid, strip: Window) -> float:
    """Cells of the grid per source cell along a side, at the middle of a strip; at most 1.

    GDAL smooths by the ratio of the two whole windows, which says nothing where meridians meet.
    """
    a = grid.fine.affine
    x, y = a * (strip.col + strip.width / 2, strip.row + strip.height / 2)
    there = rasterio.warp.transform(_crs(grid).to_wkt(), source.crs.to_wkt(), [x, x + a.a, x], [y, y, y + a.e])
    (x0, x1, x2), (y0, y1, y2) = there
    cells = abs((x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)) / abs(source.transform.a * source.transform.e)
    return min(1.0, cells**-0.5) if math.isfinite(cells) and cells > 0 else 1.0


def _in_cells(source: Affine, target: Affine) -> tuple[Affine, Affine]:
    """Express both transforms in cells of the target, rounded, so that cells that coincide coincide exactly.

    A cell measures 2 units, since GDAL takes a transform of size 1 at the origin for none at all.
    """
    t, scale = ~target * source, Affine.scale(2, -2)
    return scale * Affine(round(t.a, 12), 0, round(t.c, 7), 0, round(t.e, 12), round(t.f, 7)), scale


def _whole(values: NDArray[Any], valid: NDArray[np.bool_], dtype: np.dtype[Any], source: str) -> NDArray[Any]:
    """Turn stored values into whole numbers of ``dtype``, or say which one can not be."""
    if values.dtype == np.int8 and dtype == np.uint8:
        return values.view(np.uint8).copy()
    info = np.iinfo(dtype)
    if not np.can_cast(values.dtype, dtype):
        with np.errstate(invalid="ignore"):
            bad = valid & ~((values >= info.min) & (values <= info.max) & (values == np.floor(values)))
        if bad.any():
            raise DataError(
                f"{source} holds {values[bad][0]:g} in {int(bad.sum())} cells, expected whole numbers of {info.min}..{info.max}; "
                "look at its nodata value and its layer"
            )
        values = np.where(valid, values, 0)
    return values.astype(dtype)
