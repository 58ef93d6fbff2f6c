"""Find and fill cells without a value.

Coarse land-only fields lack cells along coasts, and whole islands. :func:`fill_near` copies the nearest valid cell within
reach, so a block of the grid needs only a margin of that width. Cells farther away take the stand-in of the nearest coarse
cell that has one (:func:`stand_ins`, :func:`fill_far`). Neither depends on how the grid is split into blocks.
"""

from __future__ import annotations

import math

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ai4land.errors import DataError


def check_any(name: str, field: xr.DataArray, *, nodata: float = math.nan) -> None:
    """Raise DataError if every cell of a field is NaN or ``nodata``."""
    values = np.asarray(field.values)
    if not (np.isfinite(values) if np.isnan(nodata) else values != nodata).any():
        raise DataError(f"{name} is all nodata on the grid, expected values; look at the file's nodata value, bounds and layer")


def fill_near(
    field: NDArray[np.float32], *, mask: NDArray[np.bool_], reach: float = math.inf, wrap: bool = False
) -> NDArray[np.float32]:
    """Fill missing cells inside ``mask`` with the nearest valid value.

    Parameters
    ----------
    field
        Floats (rows, columns), NaN or infinite where missing.
    mask
        Cells that need a value, same shape.
    reach
        Largest distance to a valid cell, in cells between centres; cells farther away stay missing.
    wrap
        Whether the first and last columns are neighbours, as on a whole globe.

    Returns
    -------
    array
        ``field`` itself if there is nothing to fill, else a filled copy; cells outside ``mask`` are unchanged.

    Examples
    --------
    >>> fill_near(np.array([[1.0, np.nan, np.nan]]), mask=np.array([[True, True, True]]), reach=1)
    array([[ 1.,  1., nan]])
    """
    valid = np.isfinite(field)
    gaps = mask & ~valid
    if not gaps.any() or not valid.any():
        return field
    if wrap:
        cols = field.shape[1]
        beyond = ((0, 0), (cols // 2, cols // 2))
        wide = fill_near(np.pad(field, beyond, mode="wrap"), mask=np.pad(mask, beyond, mode="wrap"), reach=reach)
        return wide[:, cols // 2 : cols // 2 + cols]
    from scipy import ndimage  # imported late: SciPy loads slowly, and training does not need it

    index = ndimage.distance_transform_edt(~valid, return_distances=False, return_indices=True)[:, gaps]
    near = np.hypot(*(index - np.nonzero(gaps))) <= reach
    gaps[gaps] = near
    filled = field.copy()
    filled[gaps] = field[tuple(index[:, near])]
    return filled


def stand_ins(field: NDArray[np.float32], *, mask: NDArray[np.bool_], factor: int) -> NDArray[np.float32]:
    """Represent each coarse cell by the valid cell inside ``mask`` nearest to its centre, so that codes stay codes.

    Parameters
    ----------
    field, mask
        ``(rows, columns)``, as in :func:`fill_near`, covering whole coarse cells.
    factor
        Fine cells along one side of a coarse cell.

    Returns
    -------
    array
        ``(rows / factor, columns / factor)``, NaN for coarse cells without a valid mapped cell.

    Examples
    --------
    >>> stand_ins(np.array([[1.0, 2.0], [3.0, 4.0]]), mask=np.array([[False, False], [False, True]]), factor=2)
    array([[4.]])
    """
    rows, cols = (n // factor for n in field.shape)
    middle = np.arange(factor) - (factor - 1) / 2
    inwards = np.argsort((middle[:, None] ** 2 + middle**2).ravel(), kind="stable")
    values = np.where(mask & np.isfinite(field), field, np.nan)
    cells = values.reshape(rows, factor, cols, factor).transpose(0, 2, 1, 3).reshape(rows, cols, -1)[..., inwards]
    first = np.isfinite(cells).argmax(axis=-1, keepdims=True)
    return np.take_along_axis(cells, first, axis=-1)[..., 0]


def fill_far(
    field: NDArray[np.float32], *, mask: NDArray[np.bool_], stand_in: NDArray[np.float32], factor: int
) -> NDArray[np.float32]:
    """Fill missing cells inside ``mask`` with the stand-ins of their coarse cells.

    Parameters
    ----------
    field, mask, factor
        As in :func:`stand_ins`.
    stand_in
        ``(rows / factor, columns / factor)``, from :func:`stand_ins` and filled by :func:`fill_near`.
    """
    gaps = mask & ~np.isfinite(field)
    row, col = np.nonzero(gaps)
    filled = field.copy()
    filled[gaps] = stand_in[row // factor, col // factor]
    return filled
