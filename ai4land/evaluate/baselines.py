"""Baselines that any model must beat: no change, the scenario's change at random places, or the scenario's largest class.

:func:`proportional_allocation` follows the scenario as exactly as whole cells allow, but places the change at random within a
coarse cell. Its random numbers are a hash of the seed and of the cell's position on the grid, so the result does not depend on
how the map is cut into windows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ai4land.constrain.quotas import class_quotas
from ai4land.errors import DataError
from ai4land.legend import MISSING


def persistence(reference: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Predict that nothing changes: return a copy of the reference map."""
    return reference.copy()


def nearest_coarse(shares: NDArray[np.floating], *, factor: int) -> NDArray[np.uint8]:
    """Give every fine cell the largest class of the scenario in its coarse cell; the baseline without a reference map.

    Parameters
    ----------
    shares
        Class shares of the scenario, ``(class, coarse rows, coarse columns)``.
    factor
        Fine cells along one side of a coarse cell.

    Returns
    -------
    numpy.ndarray
        Class indices, ``(coarse rows * factor, coarse columns * factor)``; the first class if shares are equal; ``MISSING``
        where any share is NaN or none is above 0.

    >>> nearest_coarse(np.array([[[0.2, np.nan]], [[0.8, 0.5]]]), factor=2).tolist()
    [[1, 1, 255, 255], [1, 1, 255, 255]]
    """
    if shares.ndim != 3 or factor < 1:
        raise DataError(
            f"shares are {shares.shape} with a factor of {factor}, expected (class, coarse rows, coarse columns) and 1 or more; "
            "give one share a class and coarse cell"
        )
    known = np.isfinite(shares).all(axis=0) & (shares > 0).any(axis=0)
    best = np.where(known, np.where(known, shares, 0).argmax(axis=0), MISSING).astype(np.uint8)
    return best.repeat(factor, axis=0).repeat(factor, axis=1)


def proportional_allocation(
    reference: NDArray[np.uint8],
    *,
    wanted: NDArray[np.floating],
    start: NDArray[np.floating],
    factor: int,
    seed: int,
    origin: tuple[int, int] = (0, 0),
) -> NDArray[np.uint8]:
    """Change the reference map by the scenario's change of class shares, at random places within the coarse cells.

    In each coarse cell the losing classes give up as many cells as :func:`~ai4land.constrain.quotas.class_quotas` says, drawn at random,
    and these go at random to the gaining classes.

    Parameters
    ----------
    reference
        Class indices of whole coarse cells, ``(rows, columns)``; ``MISSING`` cells stay.
    wanted, start
        Class shares of the scenario in the predicted year and in the year of the reference map, in the same definition,
        ``(class, rows / factor, columns / factor)``. A coarse cell with a NaN does not change.
    factor
        Fine cells along one side of a coarse cell.
    seed
        Of the draw.
    origin
        Row and column of the first cell on the grid, so that windows give the same map as the whole.

    Returns
    -------
    numpy.ndarray
        Class indices, same shape.

    Raises
    ------
    DataError
        If the shapes do not fit, or an index is neither a class nor ``MISSING``.
    """
    rows, cols = reference.shape
    n = wanted.shape[0]
    crows, ccols = rows // factor, cols // factor
    if rows % factor or cols % factor or any(v % factor or v < 0 for v in origin):
        raise DataError(
            f"window is {reference.shape} from {origin}, expected whole coarse cells of {factor}; use multiples of the factor"
        )
    if wanted.shape != (n, crows, ccols) or start.shape != wanted.shape:
        raise DataError(
            f"shares are {wanted.shape} and {start.shape}, expected {(n, crows, ccols)} for both; cut them from the same window"
        )
    row, col = np.arange(rows)[:, None], np.arange(cols)[None, :]
    coarse = (row // factor * ccols + col // factor).ravel()
    mapped = np.flatnonzero(reference.ravel() != MISSING)
    classes = reference.ravel()[mapped].astype(np.intp)
    if classes.max(initial=0) >= n:
        raise DataError(
            f"class index is {int(classes.max())}, expected 0..{n - 1} or {MISSING}; encode the codes with the legend"
        )
    group = coarse[mapped] * n + classes
    counts = np.bincount(group, minlength=crows * ccols * n).reshape(-1, n).T
    flat_wanted, flat_start = wanted.reshape(n, -1), start.reshape(n, -1)
    step = class_quotas(counts, wanted=flat_wanted, start=flat_start) - counts
    losses = np.maximum(-step, 0).T.ravel()

    maybe = losses[group] > 0
    cells, group = mapped[maybe], group[maybe]
    place = (((row + origin[0]) << 32) | (col + origin[1])).ravel()[cells].astype(np.uint64)
    order = np.lexsort((_hash(place, seed, 0), group))
    cells, place, group = cells[order], place[order], group[order]
    first = np.searchsorted(group, group, side="left")
    drawn = np.arange(group.size) - first < losses[group]

    cells, place = cells[drawn], place[drawn]
    cells = cells[np.lexsort((_hash(place, seed, 1), coarse[cells]))]
    gains = np.maximum(step, 0).T.ravel()
    result = reference.copy()
    result.ravel()[cells] = np.repeat(np.tile(np.arange(n, dtype=np.uint8), crows * ccols), gains)
    return result


def _hash(place: NDArray[np.uint64], seed: int, stream: int) -> NDArray[np.uint64]:
    """Hash positions into independent 64-bit numbers; different positions give different numbers."""
    key = _splitmix64(_splitmix64(np.array([seed % 2**64], dtype=np.uint64)) + np.uint64(stream))
    return _splitmix64(_splitmix64(place) ^ key)


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix 64 bits, one to one (Steele, Lea & Flood 2014, Fast splittable pseudorandom number generators)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
