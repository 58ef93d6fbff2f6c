"""Slow and plain scores from a three-way table of classes, to check :mod:`ai4land.evaluate.scores` against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ai4land.evaluate.scores import coarse_errors, headline, number, ratio
from ai4land.legend import MISSING


@dataclass(frozen=True)
class Scores:
    """Scores of a prediction, None where one is not defined; for the formulas see :func:`ai4land.evaluate.scores.headline`."""

    overall_accuracy: float | None
    macro_f1: float | None
    mean_iou: float | None
    figure_of_merit: float | None
    change_f1: float | None
    quantity_disagreement: float | None
    allocation_disagreement: float | None


def transition_table(
    reference: NDArray[np.uint8], truth: NDArray[np.uint8], predicted: NDArray[np.uint8], *, n: int, weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Sum the weights, one a row or a cell, by class in the reference map, the truth and the prediction: ``(n, n, n)``.

    A cell that is ``MISSING`` in any of the maps ``(rows, columns)`` is dropped.
    """
    assert reference.shape == truth.shape == predicted.shape
    valid = (reference != MISSING) & (truth != MISSING) & (predicted != MISSING)
    cells = [part[valid].astype(np.intp) for part in (reference, truth, predicted)]
    assert max(int(part.max(initial=0)) for part in cells) < n
    table = np.zeros((n, n, n))
    np.add.at(table, tuple(cells), np.broadcast_to(weights.reshape(len(weights), -1), reference.shape)[valid])
    return table


def table_sums(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums of a table, as from :func:`ai4land.evaluate.scores.score_sums` of a single group."""
    confusion = table.sum(axis=0)
    i, j, k = np.ogrid[tuple(slice(s) for s in table.shape)]
    changed, foreseen = i != j, i != k
    kinds = (changed & (j == k), changed & ~foreseen, changed & foreseen & (j != k), ~changed & foreseen)
    change = [table[kind].sum() for kind in kinds]
    return np.concatenate([np.diagonal(confusion), confusion.sum(axis=1), confusion.sum(axis=0), change])


def scores(table: NDArray[np.float64]) -> Scores:
    """Compute the scores of a table."""
    return Scores(**{name: number(value) for name, value in headline(table_sums(table)).items()})


def coarse_error(predicted: NDArray[np.floating], wanted: NDArray[np.floating], weights: NDArray[np.floating]) -> float | None:
    """Share of the area in the wrong class within coarse cells; None where no coarse cell counts."""
    error, weight = coarse_errors(predicted, wanted, weights)
    return ratio(float(error.sum()), float(weight.sum()))
