"""Cells without a value: finding them, and filling them from the nearest one that has a value."""

from __future__ import annotations

import math
from typing import Any, overload

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ai4land.errors import DataError
from ai4land.grid import FINE_DIMS, Grid


def check_any(name: str, field: xr.DataArray, *, nodata: float = math.nan) -> None:
    """Raise DataError if a field has no valid cell: all NaN or all ``nodata``."""
    values = np.asarray(field.values)
    if not (np.isfinite(values) if np.isnan(nodata) else values != nodata).any():
        raise DataError(f"{name} is all nodata on the grid, expected values; look at the file's nodata value, bounds and layer")


def check_finite(
    name: str, field: xr.DataArray | NDArray[Any], mask: NDArray[np.bool_] | xr.DataArray, *, grid: Grid | None = None
) -> None:
    """Raise DataError if NaN or infinity is left inside ``mask``, with the count and the place of the first cell.

    The place comes from the coordinates of ``field``, or from ``grid`` if it is a plain array; rows and columns otherwise.
    """
    bad = ~np.isfinite(np.asarray(field)) & np.asarray(mask)
    if not bad.any():
        return
    row, col = (int(v) for v in np.argwhere(bad)[0])
    place = f"row {row}, column {col}"
    coords = field.coords if isinstance(field, xr.DataArray) else None if grid is None else grid.coords()
    if coords is not None and all(d in coords for d in FINE_DIMS):
        lat, lon = (float(np.asarray(coords[d])[i]) for d, i in zip(FINE_DIMS, (row, col), strict=True))
        place = f"{FINE_DIMS[1]} {lon:.5g}, {FINE_DIMS[0]} {lat:.5g}"
    raise DataError(
        f"{name} is NaN or infinite in {int(bad.sum())} of {int(np.asarray(mask).sum())} cells of the mask (first at {place}), "
        "expected a value in each; fill the gaps, or take a layer that covers the region"
    )


@overload
def fill_gaps(
    field: xr.DataArray, *, mask: NDArray[np.bool_] | xr.DataArray, max_distance: int | None = None
) -> tuple[xr.DataArray, float]: ...


@overload
def fill_gaps(
    field: NDArray[Any], *, mask: NDArray[np.bool_] | xr.DataArray, max_distance: int | None = None
) -> tuple[NDArray[Any], float]: ...


def fill_gaps(
    field: xr.DataArray | NDArray[Any], *, mask: NDArray[np.bool_] | xr.DataArray, max_distance: int | None = None
) -> tuple[xr.DataArray | NDArray[Any], float]:
    """Fill missing cells inside ``mask`` with the nearest valid value.

    Coarse land-only fields lack cells along the coasts. Distance is counted in cells, without wrapping at the dateline.

    Parameters
    ----------
    field
        Floats (latitude, longitude), NaN or infinite where missing.
    mask
        Cells that need a value, same shape.
    max_distance
        Cells further than this from a valid one stay missing; no limit if None.

    Returns
    -------
    filled
        Like ``field``; cells outside ``mask`` are as they were.
    share_filled
        Cells filled, as a share of the mask.

    Raises
    ------
    DataError
        If there are gaps but not one valid cell.

    Examples
    --------
    >>> fill_gaps(np.array([[1.0, np.nan, np.nan]]), mask=np.array([[True, True, False]]))
    (array([[ 1.,  1., nan]]), 0.5)
    """
    values, inside = np.asarray(field), np.asarray(mask)
    valid = np.isfinite(values)
    gaps = inside & ~valid
    if not gaps.any():
        return field, 0.0
    if not valid.any():
        raise DataError("field to fill is all NaN, expected some valid cells; look at the file's bounds and nodata value")
    from scipy import ndimage  # here, as SciPy loads slowly and training does not need it

    index = ndimage.distance_transform_edt(~valid, return_distances=False, return_indices=True)[:, gaps]
    if max_distance is not None:
        near = np.hypot(*(index - np.nonzero(gaps))) <= max_distance
        gaps[gaps] = near
        index = index[:, near]
    filled = values.copy()
    filled[gaps] = values[tuple(index)]
    share = float(gaps.sum() / inside.sum())
    return (field.copy(data=filled) if isinstance(field, xr.DataArray) else filled), share
