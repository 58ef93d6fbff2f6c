"""Confidence intervals of scores, by a bootstrap over blocks of coarse cells.

Neighbouring cells resemble each other, so whole blocks of coarse cells are drawn instead of single cells, each with all its
cells and years (block bootstrap; Künsch 1989, Annals of Statistics 17:1217-1241). The scores of each resample are computed from
sums of areas per block (:func:`ai4land.evaluate.scores.score_sums`). Two predictions are compared on the same draws, so that places
that are hard for both do not blur their difference.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ai4land.evaluate.scores import headline, number
from ai4land.grid import Grid, Window

LEVEL = 0.95
"""Share of the resamples within an interval."""
COMPARED = ("overall_accuracy", "mean_iou", "figure_of_merit")
"""Scores whose differences between predictions get an interval."""
_EXTRA = 4
_AT_ONCE = 2**22


@dataclass
class BlockSums:
    """Sums by block, added in parts and in any order; only blocks with something in them are kept."""

    shape: tuple[int, ...]
    _ids: list[NDArray[np.intp]] = field(default_factory=list)
    _sums: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, ids: NDArray[np.intp], sums: NDArray[np.float64]) -> None:
        """Add sums ``(blocks, *shape)`` to the blocks ``ids``; blocks whose sums are all 0 are dropped."""
        full = sums.any(axis=tuple(range(1, sums.ndim)))
        self._ids.append(ids[full])
        self._sums.append(sums[full])

    def merged(self) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Give the ids of the blocks, ascending, and their sums ``(blocks, *shape)``."""
        if not self._ids:
            return np.zeros(0, np.intp), np.zeros((0, *self.shape))
        ids, place = np.unique(np.concatenate(self._ids), return_inverse=True)
        sums = np.zeros((len(ids), *self.shape))
        np.add.at(sums, place, np.concatenate(self._sums))
        self._ids, self._sums = [ids], [sums]
        return ids, sums


def blocks_of(window: Window, grid: Grid, block: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Find the blocks of a window of whole coarse cells.

    Parameters
    ----------
    window
        Of whole coarse cells inside the grid.
    grid
        Blocks are counted from its upper-left corner, so a block is the same in every window.
    block
        Coarse cells along one side of a block.

    Returns
    -------
    ids
        Ids of the blocks in the whole grid, ``(blocks,)``.
    place
        Index in ``ids`` of the block of each coarse cell of the window, ``(coarse rows, coarse columns)``.

    >>> from ai4land.grid import make_grid
    >>> ids, place = blocks_of(Window(2, 0, 2, 4), make_grid((0, 0, 8, 8), coarse_cell=2, factor=1, shard=4), 2)
    >>> ids.tolist(), place.tolist()
    ([4, 5], [[0, 0, 1, 1], [0, 0, 1, 1]])
    """
    f = grid.factor
    rows = np.arange(window.row // f, (window.row + window.height) // f) // block
    cols = np.arange(window.col // f, (window.col + window.width) // f) // block
    across = -(-int(grid.coarse.shape[1]) // block)
    ids, place = np.unique(rows[:, None] * across + cols, return_inverse=True)
    return ids.astype(np.intp), place.reshape(len(rows), len(cols)).astype(np.intp)


def draw(sums: NDArray[np.float64], *, resamples: int = 1000, seed: int = 0) -> NDArray[np.float64]:
    """Draw as many blocks as there are, with replacement, and add up their sums; many times.

    Parameters
    ----------
    sums
        ``(blocks, …)``.
    resamples, seed
        Number of draws, and their seed. The draws depend only on the seed and the number of blocks.

    Returns
    -------
    numpy.ndarray
        ``(resamples, …)``.
    """
    count = len(sums)
    flat = sums.reshape(count, -1)
    rng = np.random.default_rng(seed)
    out = np.empty((resamples, flat.shape[1]))
    step = max(1, _AT_ONCE // max(1, count))
    for first in range(0, resamples, step):
        some = min(step, resamples - first)
        drawn = rng.integers(0, count, size=(some, count)) + count * np.arange(some)[:, None]
        times = np.bincount(drawn.ravel(), minlength=some * count).reshape(some, count)
        out[first : first + some] = times @ flat
    return out.reshape(resamples, *sums.shape[1:])


def interval(samples: NDArray[np.float64], level: float = LEVEL) -> list[float] | None:
    """Give the percentiles that enclose the share ``level`` of the samples without NaN; None if there are none.

    >>> [round(v, 6) for v in interval(np.arange(41.0))]
    [1.0, 39.0]
    """
    valid = samples[np.isfinite(samples)]
    if not valid.size:
        return None
    low, high = np.quantile(valid, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]


def all_scores(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Compute the scores of sums ``(…, 3 n + 8)``.

    The last axis holds the sums of :func:`ai4land.evaluate.scores.score_sums`, then the weighted error against the coarse totals, its
    weight, the area without a prediction, and the area to score.
    """
    extra = sums[..., -_EXTRA:]
    with np.errstate(invalid="ignore", divide="ignore"):
        coarse, lacking = extra[..., 0] / extra[..., 1], extra[..., 2] / extra[..., 3]
    return {**headline(sums[..., :-_EXTRA]), "coarse_error": coarse, "unpredicted_share": lacking}


def intervals(
    sums: NDArray[np.float64],
    names: list[str],
    fields: Iterable[str],
    *,
    pairs: Iterable[tuple[str, str]] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, dict[str, list[float] | None]], dict[str, Any]]:
    """Give 95 % intervals of the scores of predictions and of the differences between them.

    Parameters
    ----------
    sums
        ``(blocks, names, 3 n + 8)``, see :func:`all_scores`.
    names
        Of the predictions.
    fields
        Scores to give intervals of.
    pairs
        Predictions to compare, the second taken from the first, on :data:`COMPARED`.
    resamples, seed
        As in :func:`draw`; all predictions share the draws.

    Returns
    -------
    by_name
        By prediction and score ``[low, high]``; None where the score is not defined, or where fewer than two blocks hold
        anything.
    differences
        By ``"first - second"`` and score: ``value`` and ``interval``. If the interval excludes 0, the predictions differ.
    """
    point = all_scores(sums.sum(axis=0))
    samples = all_scores(draw(sums, resamples=resamples, seed=seed)) if len(sums) >= 2 else {}
    place = {name: i for i, name in enumerate(names)}

    def spread(name: str, field: str, other: str | None = None) -> list[float] | None:
        """Interval of a score, or of its difference from another prediction's, where the score itself is defined."""
        i, j = place[name], None if other is None else place[other]
        value, drawn = (part.get(field) for part in (point, samples))
        if value is None or drawn is None:
            return None
        if j is None:
            return interval(drawn[:, i]) if np.isfinite(value[i]) else None
        return interval(drawn[:, i] - drawn[:, j]) if np.isfinite(value[i] - value[j]) else None

    by_name = {name: {f: spread(name, f) for f in fields} for name in names}
    differences = {
        f"{a} - {b}": {
            f: {"value": number(point[f][place[a]] - point[f][place[b]]), "interval": spread(a, f, b)} for f in COMPARED
        }
        for a, b in pairs
    }
    return by_name, differences


def summary(sums: NDArray[np.float64]) -> dict[str, float | None]:
    """Give the scores of one prediction from its sums ``(3 n + 8,)``, None where one is not defined."""
    return {name: number(value) for name, value in all_scores(sums).items()}
