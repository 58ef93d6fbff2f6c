"""Read any gridded file onto the fine grid, and check its location.

:func:`open_raster` reads one layer of a GeoTIFF, NetCDF or Zarr file, in any reference system, onto the grid's cells. For
each strip of rows it reads the source cells needed, at full resolution (never an overview), and warps them in memory. It
refuses files that would give a shifted, empty or half-empty map: pixel-is-point files, longitudes of 0..360, extents that do
not overlap the grid, truncated files.
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

from ai4land.errors import ConfigError, DataError
from ai4land.grid import FINE_DIMS, Grid, Window, edges, read_window
from ai4land.rasters import lattice
from ai4land.rasters.file import RasterLayer, open_layer, reading
from ai4land.rasters.gaps import check_any
from ai4land.rasters.lattice import check_crs, check_lattice, check_place, crs_of, same_crs, spread, too_many, transform_bounds

_log = logging.getLogger(__name__)
Resampling = Literal["exact", "nearest", "bilinear", "average", "mode", "min", "max"]
Recode = Callable[[NDArray[Any]], NDArray[Any]]
_STRIP_CELLS = 2**24
_MOST_AT_ONCE = 4
"""Source cells of a piece, in units of ``_STRIP_CELLS``, above which the piece is halved."""
_PLANE = "EPSG:3857"


@dataclass(frozen=True)
class _Values:
    """A layer as a sliceable array; missing cells hold ``nodata`` in codes, NaN otherwise."""

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
    window: Window | None = None,
) -> xr.DataArray:
    """Read one layer of a file onto the fine cells of the grid.

    Parameters
    ----------
    path
        GeoTIFF (or another GDAL raster), NetCDF file or Zarr group. A NetCDF or Zarr variable needs 1-D latitude and
        longitude, or y and x with a grid mapping, in either order; rows may run from the north or the south.
    resampling
        ``exact`` cuts and pads without changing a value, so the source must lie on the grid's lattice. The others are GDAL's
        and ignore missing cells; ``average`` weights source cells by overlap.
    band, variable
        As in :func:`ai4land.rasters.file.open_layer`.
    dtype
        Floats get the file's scale and offset. Integers are codes: they are never averaged, and with ``uint8`` signed bytes
        are read as unsigned (-126 is 130).
    nodata
        Value of missing cells in an integer result; the largest number of ``dtype`` by default.
    recode
        Maps codes to codes before any resampling.
    window
        Cells of the grid to read; the whole grid if None. Values equal those of the whole grid, up to rounding where
        interpolated. From another reference system they are placed within an eighth of a source cell (GDAL's tolerance) and
        smoothed according to the cell size in the middle of each piece.

    Returns
    -------
    xarray.DataArray
        ``(latitude, longitude)`` on the grid or window; NaN or ``nodata`` (also in ``attrs``) where the source has no value.

    Raises
    ------
    DataError
        If the file is missing, truncated or has no reference system, the layer is ambiguous, longitudes run over 0..360
        where the grid needs negative ones, or the file does not overlap the grid, is off its lattice (``exact``) or has no
        valid cell on it (a window may have none).
    ConfigError
        If integers are to be averaged.
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
        check_place(source, grid)
        work = kind
        if resampling == "exact":
            check_crs(source, grid)
            check_lattice(source.transform, grid, source=source.source)
        elif codes is not None:
            work = np.dtype(np.float32 if kind.itemsize <= 2 else np.float64)
        _log.debug("%s: %s cells, %s, %s", source.source, source.shape, source.crs, resampling)
        values = _Values(source, codes, missing, recode, work)
        whole = window or Window(0, 0, *grid.shape)
        out = np.full((whole.height, whole.width), missing, dtype=kind)
        for strip in _strips(source, grid, whole):
            part = _cut(values, grid, strip) if resampling == "exact" else _warp(values, grid, strip, resampling)
            if part is not None:
                out[strip.row - whole.row :][: strip.height] = (
                    part if part.dtype == kind else np.where(np.isnan(part), missing, part)
                )
        attrs = {**source.attrs, **({} if codes is None else {"nodata": int(missing)})}
        coords = {d: grid.coords()[d][along] for d, along in zip(FINE_DIMS, whole.slices, strict=True)}
        field = xr.DataArray(out, dims=FINE_DIMS, coords=coords, name=source.name, attrs=attrs)
    if window is None:
        check_any(source.source, field, nodata=missing)
    return field


def _strips(source: RasterLayer, grid: Grid, window: Window) -> Iterator[Window]:
    """Split a window into strips of rows small enough for their own and the source's cells to fit in memory."""
    rows, cols = window.height, window.width
    ahead = _source_window(source, grid, window)
    cost = max(cols, sum(w.height * w.width for w in _within(source, ahead)) // rows)
    if cost > lattice.MOST_CELLS:
        raise too_many(source.source, cost, "a row")
    height = max(1, min(rows, _STRIP_CELLS // max(cost, 1)))
    for row in range(0, rows, height):
        yield Window(window.row + row, window.col, min(height, rows - row), cols)


def _source_window(source: RasterLayer, grid: Grid, strip: Window) -> Window | None:
    """Return the source cells around a strip; columns may extend past the source's edges or the dateline."""
    t = source.transform
    box = edges(grid.fine[strip.slices])
    try:
        west, south, east, north = transform_bounds(crs_of(grid), source.crs, box)
    except rasterio.errors.RasterioError:
        west = math.nan
    if not all(map(math.isfinite, (west, south, east, north))):
        found = spread(crs_of(grid), source.crs, box)
        if found is None:
            return None
        west, south, east, north = found
    if source.crs.geographic and west >= east:
        east += 360.0
    top, bottom, left, right = (north - t.f) / t.e, (south - t.f) / t.e, (west - t.c) / t.a, (east - t.c) / t.a
    pad = 3 + 2 * math.ceil(max((bottom - top) / strip.height, (right - left) / strip.width))
    top, bottom = max(math.floor(top) - pad, 0), min(math.ceil(bottom) + pad, source.shape[0])
    left, right = math.floor(left) - pad, math.ceil(right) + pad
    return Window(top, left, bottom - top, right - left) if top < bottom and left < right else None


def _within(source: RasterLayer, window: Window | None) -> list[Window]:
    """Clip a window to the source's columns on both sides of the dateline; a source that wraps is not clipped."""
    if window is None or source.wraps:
        return [] if window is None else [window]
    turns = (-360.0, 0.0, 360.0) if source.crs.geographic else (0.0,)
    cuts = []
    for turn in turns:
        start = window.col + round(turn / source.transform.a)
        left, right = max(start, 0), min(start + window.width, source.shape[1])
        if left < right:
            cuts.append(Window(window.row, left, window.height, right - left))
    return cuts


def _pieces(source: RasterLayer, grid: Grid, strip: Window) -> Iterator[tuple[Window, list[Window]]]:
    """Yield the pieces of a strip that a source in another reference system covers, each with its source windows."""
    found = spread(source.crs, crs_of(grid), source.bounds)
    a = grid.fine.affine
    columns, rows = {(0, strip.width)}, (0, strip.height)
    if found is not None:
        west, south, east, north = found
        rows = max(math.floor((north - a.f) / a.e) - strip.row, 0), min(math.ceil((south - a.f) / a.e) - strip.row, strip.height)
        columns = set()
        for turn in (-360.0, 0.0, 360.0) if grid.geographic and east - west < 360 else (0.0,):
            left, right = ((v + turn - a.c) / a.a - strip.col for v in (west, east))
            columns.add((max(math.floor(left), 0), min(math.ceil(right), strip.width)))
    todo = [
        Window(strip.row + rows[0], strip.col + left, rows[1] - rows[0], right - left)
        for left, right in sorted(columns)
        if rows[0] < rows[1] and left < right
    ]
    while todo:
        piece = todo.pop()
        windows = _within(source, _source_window(source, grid, piece))
        if sum(w.height * w.width for w in windows) > _MOST_AT_ONCE * _STRIP_CELLS and piece.height * piece.width > 1:
            todo += _halves(piece)
        elif windows:
            yield piece, windows


def _halves(w: Window) -> tuple[Window, Window]:
    """Halve a window across its longer side."""
    if w.width >= w.height:
        half = w.width // 2
        return Window(w.row, w.col, w.height, half), Window(w.row, w.col + half, w.height, w.width - half)
    half = w.height // 2
    return Window(w.row, w.col, half, w.width), Window(w.row + half, w.col, w.height - half, w.width)


def _cut(values: _Values, grid: Grid, strip: Window) -> NDArray[Any]:
    a, t = grid.fine.affine, values.layer.transform
    row, col = round((a.f - t.f) / t.e) + strip.row, round((a.c - t.c) / t.a) + strip.col
    fill = values.nodata if values.codes is not None else np.nan
    return read_window(values, Window(row, col, strip.height, strip.width), fill=fill, wrap=values.layer.wraps)


def _warp(values: _Values, grid: Grid, strip: Window, resampling: str) -> NDArray[Any] | None:
    """Resample onto a strip; None if the source has no cells there."""
    source = values.layer
    if same_crs(source.crs, crs_of(grid)):
        windows = _within(source, _source_window(source, grid, strip))
        pieces = [(strip, windows)] if windows else []
    else:
        pieces = list(_pieces(source, grid, strip))
    if not pieces:
        return None
    out = np.full((strip.height, strip.width), np.nan, dtype=values.dtype)
    for piece, windows in pieces:
        own = out[piece.row - strip.row :][: piece.height, piece.col - strip.col :][:, : piece.width]
        for window in windows:
            cells = _resample(values, grid, piece, window, resampling)
            np.copyto(own, cells, where=np.isnan(own))
    return out


def _resample(values: _Values, grid: Grid, piece: Window, window: Window, resampling: str) -> NDArray[Any]:
    """Resample a source window onto a piece of the grid with GDAL."""
    source = values.layer
    cells = read_window(values, window, fill=np.nan, wrap=source.wraps)
    out = np.full((piece.height, piece.width), np.nan, dtype=values.dtype)
    from_cells = source.transform * Affine.translation(window.col, window.row)
    to_cells = grid.fine.affine * Affine.translation(piece.col, piece.row)
    from_crs, to_crs = source.crs.to_wkt(), crs_of(grid).to_wkt()
    if same_crs(source.crs, crs_of(grid)):
        from_cells, to_cells, from_crs, to_crs = *_in_cells(from_cells, to_cells), _PLANE, _PLANE
        across, down = min(1.0, from_cells.a / to_cells.a), min(1.0, from_cells.e / to_cells.e)
    else:
        across = down = _scale(source, grid, piece)
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
        # GDAL would take the ratio of the two windows, which is wrong for small windows and where meridians meet.
        XSCALE=across,
        YSCALE=down,
    )
    return out


def _scale(source: RasterLayer, grid: Grid, strip: Window) -> float:
    """Return grid cells per source cell along one side at the middle of a strip, at most 1."""
    a = grid.fine.affine
    x, y = a * (strip.col + strip.width / 2, strip.row + strip.height / 2)
    there = rasterio.warp.transform(crs_of(grid).to_wkt(), source.crs.to_wkt(), [x, x + a.a, x], [y, y, y + a.e])
    (x0, x1, x2), (y0, y1, y2) = there
    cells = abs((x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)) / abs(source.transform.a * source.transform.e)
    return min(1.0, cells**-0.5) if math.isfinite(cells) and cells > 0 else 1.0


def _in_cells(source: Affine, target: Affine) -> tuple[Affine, Affine]:
    """Express both transforms in target cells, rounded so that coinciding cells match exactly.

    Shift the origin and scale by 2, because GDAL treats a unit transform at the origin as no transform.
    """
    t, scale = ~target * source, Affine.translation(2**12, 2**12) * Affine.scale(2, -2)
    return scale * Affine(round(t.a, 12), 0, round(t.c, 7), 0, round(t.e, 12), round(t.f, 7)), scale


def _whole(values: NDArray[Any], valid: NDArray[np.bool_], dtype: np.dtype[Any], source: str) -> NDArray[Any]:
    """Convert stored values to integers of ``dtype``; raise DataError for valid values that do not fit."""
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
