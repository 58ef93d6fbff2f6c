"""Whole-number quotas: how many cells of each class a coarse cell must have.

Shares become whole cells by largest remainder (:func:`level_quotas`), or their change is added to the cells of a map
(:func:`class_quotas`). Either way the quotas of a coarse cell sum to its mapped cells.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ai4land.errors import DataError


def integer_quotas(counts: NDArray[np.floating]) -> NDArray[np.int64]:
    """Round along the first axis by largest remainder, which preserves the sums.

    Every number is rounded down; then those with the largest remainders get one more each until the sum is that of ``counts``,
    rounded (Hamilton's method of apportionment). Of equal remainders the first wins.

    Parameters
    ----------
    counts
        ``(class, ...)``, finite and not negative.

    Returns
    -------
    numpy.ndarray
        Whole numbers of the same shape, each ``floor(counts)`` or ``ceil(counts)``.

    >>> integer_quotas(np.array([1.4, 2.5, 0.1, 4.0])).tolist()
    [1, 3, 0, 4]
    """
    values = counts.astype(np.float64)
    if not (np.isfinite(values) & (values >= 0)).all():
        raise DataError("counts hold negative or missing numbers, expected finite ones of 0 or more; clip them first")
    low = np.floor(values)
    rest = values - low
    more = np.rint(rest.sum(axis=0))
    order = np.argsort(-rest, axis=0, kind="stable")
    rank = np.empty_like(order)
    places = np.arange(values.shape[0]).reshape(-1, *[1] * (values.ndim - 1))
    np.put_along_axis(rank, order, np.broadcast_to(places, order.shape), axis=0)
    return low.astype(np.int64) + (rank < more)


def add_change(held: NDArray[np.floating], change: NDArray[np.floating]) -> NDArray[np.float64]:
    """Add a change to the class amounts of a map, preserving their sum.

    A class loses at most what it has. Where total loss and total gain differ, the larger is reduced to the smaller, in
    proportion over its classes. A class with no change keeps its amount.

    Parameters
    ----------
    held
        Amounts of the classes, such as shares or cells, ``(class, ...)``.
    change
        Change of the amounts, same shape. A NaN in any class makes all classes unknown.

    Returns
    -------
    numpy.ndarray
        Amounts with the sum of ``held``; NaN where unknown.

    >>> add_change(np.array([0.2, 0.7, 0.1]), np.array([-0.3, 0.2, 0.1])).round(3).tolist()
    [0.0, 0.833, 0.167]
    """
    known = np.isfinite(held).all(axis=0) & np.isfinite(change).all(axis=0)
    step = np.where(known, change, 0.0)
    loss, gain = np.minimum(np.maximum(-step, 0.0), np.where(known, held, 0.0)), np.maximum(step, 0.0)
    lost, gained = loss.sum(axis=0), gain.sum(axis=0)
    moved = np.minimum(lost, gained)
    loss *= np.divide(moved, lost, out=np.zeros_like(lost), where=lost > 0)
    gain *= np.divide(moved, gained, out=np.zeros_like(gained), where=gained > 0)
    return np.where(known, held - loss + gain, np.nan)


def class_quotas(counts: NDArray[np.int64], *, wanted: NDArray[np.floating], start: NDArray[np.floating]) -> NDArray[np.int64]:
    """Apply the scenario's change to the number of cells of each class.

    The change is added as by :func:`add_change`: a class whose share the scenario does not change keeps its cells.

    Parameters
    ----------
    counts
        Cells of each class in each coarse cell of the reference map, ``(class, ...)``.
    wanted, start
        Class shares in the scenario, now and in the year of the reference map, ``(class, ...)``. A NaN in either means no
        change.

    Returns
    -------
    numpy.ndarray
        Quotas, with the shape and the sums of ``counts``.
    """
    change = (wanted.astype(np.float64) - start.astype(np.float64)) * counts.sum(axis=0)
    change = np.where(np.isfinite(change).all(axis=0), change, 0.0)
    return integer_quotas(np.maximum(add_change(counts.astype(np.float64), change), 0.0))


def level_quotas(shares: NDArray[np.floating], mapped: NDArray[np.integer]) -> NDArray[np.int64]:
    """Turn shares into numbers of cells that sum to the mapped cells.

    Parameters
    ----------
    shares
        Class shares of the mapped part of each coarse cell, ``(class, ...)``; they sum to 1.
    mapped
        Mapped cells of each coarse cell, ``(...)``.

    Returns
    -------
    numpy.ndarray
        Quotas with the shape of ``shares``; -1 for every class of a coarse cell with a NaN, which has no quota.

    >>> level_quotas(np.array([[0.52, np.nan], [0.48, 1.0]]), np.array([10, 10])).tolist()
    [[5, -1], [5, -1]]
    """
    known = np.isfinite(shares).all(axis=0)
    part = np.where(known, shares, 0.0).astype(np.float64)
    total = part.sum(axis=0)
    if (part < -1e-6).any() or (np.abs(total - 1) > 1e-3)[known].any():
        raise DataError("shares are negative or do not sum to 1, expected parts of the mapped cells; divide them by their sum")
    part = np.maximum(part, 0.0)
    quotas = integer_quotas(part / np.where(known, part.sum(axis=0), 1.0) * mapped)
    return np.where(known, quotas, -1)


def fit_quotas(want: NDArray[np.int64], size: NDArray[np.int64]) -> NDArray[np.int64]:
    """Raise quotas ``(coarse cell, class)`` that locked cells made negative to 0, and scale the others to the sum ``size``."""
    least = np.maximum(want, 0)
    if (least == want).all():
        return least
    total = least.sum(axis=1)
    scale = np.divide(size, total, out=np.zeros(len(want)), where=total > 0)
    return np.where((least == want).all(axis=1)[:, None], least, integer_quotas((least * scale[:, None]).T).T)
