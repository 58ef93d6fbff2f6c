"""Check a gridded file against a grid: lattice, longitudes, extent, number of cells and reference system."""

from __future__ import annotations

import math
from contextlib import suppress

import numpy as np
import rasterio.errors
import rasterio.warp
from affine import Affine
from odc.geo.crs import CRS

from ai4land.errors import ConfigError, DataError
from ai4land.grid import Bounds, Grid
from ai4land.rasters.file import RasterLayer

SIZE_TOLERANCE = 1e-5
"""Relative difference below which cell sizes count as equal."""
OFFSET_TOLERANCE = 0.02
"""Offset, in cells, below which a source counts as on the lattice."""
_DRIFT_TOLERANCE = 0.25
_POINTS = 65
MOST_CELLS = 2**31
"""Most source cells held at once, under one row or one shard of the grid."""


def check_lattice(transform: Affine, grid: Grid, *, source: str, exact: bool = True) -> None:
    """Raise DataError if a source's cells do not lie on the grid's lattice.

    Parameters
    ----------
    transform
        From column and row to a cell's upper-left corner, in the grid's reference system.
    exact
        If false, refuse only a half-cell shift at the grid's cell size, which marks a pixel-is-point file.
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
    """Raise DataError if longitudes run over 0..360 and the grid needs negative ones; ``bounds`` and ``cell`` in degrees."""
    west, east = bounds[0], bounds[2]
    if west >= -cell and east > 180 + cell and grid.bounds[0] < west - 1e-6:
        raise DataError(
            f"longitudes run 0..360 in {source} ({west:g}..{east:g}), expected -180..180 (the grid starts at {grid.bounds[0]:g}); "
            'roll them: ds.assign_coords(lon=(ds.lon + 180) % 360 - 180).sortby("lon"), or cdo sellonlatbox,-180,180,-90,90'
        )


def check_cells(transform: Affine, shape: tuple[int, int], crs: CRS, grid: Grid, *, source: str) -> None:
    """Raise DataError if a source has more than ``MOST_CELLS`` cells under one shard of the grid."""
    under = float(shape[0]) * float(shape[1])
    if grid.fine.crs is not None and same_crs(crs, grid.fine.crs) and transform.determinant:
        under = min(under, grid.shard**2 * abs(grid.fine.affine.determinant / transform.determinant))
    if under > MOST_CELLS:
        raise too_many(source, under, f"a shard of {grid.shard} x {grid.shard} cells")


def too_many(source: str, cells: float, under: str) -> DataError:
    """Build the error for a source with too many cells ``under`` a part of the grid."""
    return DataError(
        f"{source} has {cells:.3g} cells under {under} of the grid, expected at most {MOST_CELLS:.3g}; "
        "make it coarser (gdalwarp -tr), or check its header"
    )


def check_place(source: RasterLayer, grid: Grid) -> None:
    """Raise DataError if a source does not overlap the grid, or its longitudes or latitudes are out of range."""
    box = source.bounds
    if source.crs.geographic:
        check_longitudes(box, grid, cell=source.transform.a, source=source.source)
        if box[1] < -90 - source.transform.a or box[3] > 90 + source.transform.a:
            raise DataError(f"latitudes of {source.source} run {box[1]:g}..{box[3]:g}, expected -90..90; look at its corner")
    there: Bounds | None = None
    with suppress(rasterio.errors.RasterioError):
        there = transform_bounds(source.crs, crs_of(grid), box)
    if there is None or not all(map(math.isfinite, there)):
        there = spread(source.crs, crs_of(grid), box)
    if there is None:
        return
    west, south, east, north = grid.bounds
    apart = not source.wraps and there[0] < there[2] and (there[0] >= east or there[2] <= west)
    if apart or there[1] >= north or there[3] <= south:
        raise DataError(
            f"{source.source} does not meet the grid: it covers {_box(there)}, expected an overlap with {_box(grid.bounds)} "
            "(west, south, east, north); choose another file or another grid.bbox"
        )


def check_crs(source: RasterLayer, grid: Grid) -> None:
    """Raise DataError if a source's reference system is not the grid's."""
    if not same_crs(source.crs, crs_of(grid)):
        raise DataError(
            f"reference system of {source.source} is {source.crs.proj.name}, expected {crs_of(grid).proj.name} for resampling exact; "
            "choose resampling nearest or bilinear, average or mode"
        )


def crs_of(grid: Grid) -> CRS:
    """Return a grid's reference system; raise ConfigError if it has none."""
    if grid.fine.crs is None:
        raise ConfigError("grid has no coordinate reference system, expected one; give for example crs=EPSG:4326")
    return grid.fine.crs


def _box(bounds: Bounds) -> str:
    return "(" + ", ".join(f"{v:g}" for v in bounds) + ")"


def same_crs(source: CRS, target: CRS) -> bool:
    """Whether two reference systems match, ignoring axis order; degrees on an unnamed datum match any degrees."""
    if source == target or source.proj.equals(target.proj, ignore_axis_order=True):
        return True
    datum = source.proj.datum
    unknown = datum is None or datum.name.lower().replace("_", " ").startswith(("unknown", "not specified"))
    return bool(source.geographic and target.geographic and unknown)


def transform_bounds(source: CRS, target: CRS, box: Bounds) -> Bounds:
    """Transform a box to its bounding box in the target system; may raise a RasterioError."""
    if same_crs(source, target):
        return box
    if source.geographic:
        box = (box[0], max(box[1], -90.0), box[2], min(box[3], 90.0))
    west, south, east, north = rasterio.warp.transform_bounds(source.to_wkt(), target.to_wkt(), *box, densify_pts=101)
    return west, south, east, north


def spread(source: CRS, target: CRS, box: Bounds) -> Bounds | None:
    """Bound, in the target system, the part of a box that can be transformed; None if no point can be.

    Transforms a lattice of points over the box and pads their bounds by the largest spacing of neighbours. A result in
    degrees that crosses the dateline has ``east > 180`` or ``west < -180``.
    """
    west, south, east, north = box
    x, y = np.meshgrid(np.linspace(west, east, _POINTS), np.linspace(south, north, _POINTS))
    if source.geographic:
        y = np.clip(y, -90.0, 90.0)
    there = rasterio.warp.transform(source.to_wkt(), target.to_wkt(), x.ravel(), y.ravel())
    u, v = (np.asarray(axis, dtype=np.float64).reshape(x.shape) for axis in there)
    found = np.isfinite(u) & np.isfinite(v)
    if not found.any():
        return None
    u[~found] = v[~found] = np.nan
    steps = [np.diff(values, axis=axis) for values in (u, v) for axis in (0, 1)]
    if target.geographic:
        steps[:2] = [(step + 180) % 360 - 180 for step in steps[:2]]
        first = u[found][0]
        u = first + (u - first + 180) % 360 - 180  # each within 180 degrees of the first
    pads = [
        max((float(np.nanmax(np.abs(s))) for s in pair if np.isfinite(s).any()), default=0.0) for pair in (steps[:2], steps[2:])
    ]
    return (
        float(np.nanmin(u)) - pads[0],
        float(np.nanmin(v)) - pads[1],
        float(np.nanmax(u)) + pads[0],
        float(np.nanmax(v)) + pads[1],
    )
