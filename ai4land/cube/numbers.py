"""Store fractions and confidences as whole numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SCALE = 250  # units per 1 of stored confidences and change probabilities
EMPTY = 255  # stored confidence and change probability of a cell without one
FRACTION_SCALE = 65000
"""Units per 1 of stored fractions: with 25 or more fine cells along a coarse one, totals stay within about 1e-6."""
FRACTION_EMPTY = 65535  # stored fraction of a cell that is not mapped
_GOLDEN = 0.6180339887498949  # golden ratio minus 1


def quantise(probabilities: NDArray[np.float32], *, scale: int = FRACTION_SCALE) -> NDArray[np.uint16]:
    """Round probabilities to multiples of 1/``scale`` that sum to exactly 1 in every cell.

    The running sum over the classes plus an offset per cell is rounded down, then differenced. The error of a class is thus
    below one unit, and a class of probability 0 stays 0. The offsets (multiples of the golden ratio, modulo 1) fill 0..1
    evenly over neighbouring cells, so errors average out even for a class with a fraction of a unit everywhere.

    Parameters
    ----------
    probabilities
        ``(class, rows, columns)``, summing to 1.
    scale
        Units per 1.

    Returns
    -------
    numpy.ndarray
        Units, uint16 ``(class, rows, columns)``.

    >>> quantise(np.full((3, 1, 2), 1 / 3, np.float32), scale=250)[:, 0].tolist()
    [[83, 83], [83, 84], [84, 83]]
    """
    rows, cols = probabilities.shape[1:]
    offset = (np.arange(rows * cols) * _GOLDEN % 1).reshape(rows, cols).astype(np.float32)
    units = np.float32(scale) / probabilities.sum(axis=0, dtype=np.float32)
    out = np.empty(probabilities.shape, dtype=np.uint16)
    running, before = np.zeros_like(units), np.zeros((rows, cols), dtype=np.uint16)
    for part, made in zip(probabilities[:-1], out[:-1], strict=True):
        running += part
        after = np.minimum(running * units + offset, scale).astype(np.uint16)
        np.subtract(after, before, out=made)
        before = after
    np.subtract(np.uint16(scale), before, out=out[-1])
    return out
