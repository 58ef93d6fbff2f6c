"""Measures of agreement between an annual map and the observed one.

All scores of the fine map follow from a few sums of areas in square metres (:func:`score_sums`). Sums of windows and of years
add up, so the scores of many windows are exactly those of the whole. How well a map follows the scenario is measured on the
coarse grid (:func:`coarse_errors`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ai4land.errors import DataError


def score_sums(
    truth: NDArray[np.uint8],
    predicted: NDArray[np.uint8],
    reference: NDArray[np.uint8] | None = None,
    *,
    n: int,
    areas: NDArray[np.float64],
    group: NDArray[np.intp],
    groups: int,
) -> NDArray[np.float64]:
    """Sum in each group of cells the areas that all scores follow from.

    Parameters
    ----------
    truth, predicted, reference
        Class indices of the cells, ``(cells,)``. A cell that is ``MISSING`` in the prediction is dropped; the others have a
        class in the truth and in the reference map. Without a reference map the last four sums are 0.
    n
        Number of classes.
    areas
        Area of each cell.
    group, groups
        Group of each cell, and how many there are.

    Returns
    -------
    numpy.ndarray
        ``(groups, 3 n + 4)``: the area by class that is correct, by class in the truth, and by class in the prediction; then the
        hits, misses, wrong hits and false alarms of change since the reference map.
    """
    guess = np.minimum(predicted, n)
    pair = (group * n + truth) * (n + 1) + guess
    confusion = np.bincount(pair, weights=areas, minlength=groups * n * (n + 1)).reshape(groups, n, n + 1)[:, :, :n]
    right = np.diagonal(confusion, axis1=1, axis2=2)
    change: NDArray[Any] = np.zeros((groups, 4))
    if reference is not None:
        moved = np.flatnonzero(((truth != reference) | (guess != reference)) & (guess < n))
        r, t, g = reference[moved], truth[moved], guess[moved]
        kind = np.select([(r != t) & (t == g), r == g, r != t], [0, 1, 2], default=3)
        change = np.bincount(group[moved] * 4 + kind, weights=areas[moved], minlength=groups * 4).reshape(groups, 4)
    return np.concatenate([right, confusion.sum(axis=2), confusion.sum(axis=1), change], axis=1)


def headline(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Compute the scores of many sums at once.

    Parameters
    ----------
    sums
        ``(…, 3 n + 4)`` as from :func:`score_sums`, which may be added up first.

    Returns
    -------
    dict
        Values ``(…)`` from 0 to 1 by name, NaN where a score is not defined. With :math:`p_{ij}` the share of the area that is
        class *i* in the prediction and *j* in the truth:

        - ``overall_accuracy``: share of the area with the right class, Σ p_kk.
        - ``macro_f1``: mean of 2 p_kk / (p_k+ + p_+k) over the classes in the truth or the prediction.
        - ``mean_iou``: mean over the same classes of p_kk / (p_k+ + p_+k − p_kk).
        - ``figure_of_merit``: hits / (hits + misses + wrong hits + false alarms) of change since the reference map (Pontius et
          al. 2008, Annals of Regional Science 42:11-37, doi:10.1007/s00168-007-0138-2). NaN where nothing changed and no change
          was predicted.
        - ``change_f1``: F1 of "changed since the reference map", whatever the class; NaN as above.
        - ``quantity_disagreement``: ½ Σ abs(p_k+ − p_+k), the error in how much there is of each class (Pontius & Millones
          2011, International Journal of Remote Sensing 32:4407-4429, doi:10.1080/01431161.2011.552923).
        - ``allocation_disagreement``: Σ min(p_k+, p_+k) − p_kk, the error in where the classes are (same source). With the
          accuracy and the quantity disagreement it adds up to 1.
    """
    n = (sums.shape[-1] - 4) // 3
    right, true, guessed = (sums[..., k * n : (k + 1) * n] for k in range(3))
    hits, misses, wrong, false = (sums[..., 3 * n + k] for k in range(4))
    total, both = true.sum(axis=-1), true + guessed
    there = (both > 0).sum(axis=-1)
    return {
        "overall_accuracy": _over(right.sum(axis=-1), total),
        "macro_f1": _over(np.nan_to_num(_over(2 * right, both)).sum(axis=-1), there),
        "mean_iou": _over(np.nan_to_num(_over(right, both - right)).sum(axis=-1), there),
        "figure_of_merit": _over(hits, hits + misses + wrong + false),
        "change_f1": _over(2 * (hits + wrong), 2 * (hits + wrong) + misses + false),
        "quantity_disagreement": _over(np.abs(true - guessed).sum(axis=-1) / 2, total),
        "allocation_disagreement": _over((np.minimum(true, guessed) - right).sum(axis=-1), total),
    }


def per_class(sums: NDArray[np.float64]) -> list[dict[str, float | None]]:
    """Score each class, in the order of the indices.

    Parameters
    ----------
    sums
        ``(3 n + 4,)`` as from :func:`score_sums`.

    Returns
    -------
    list of dict
        ``precision`` (user's accuracy, p_kk / p_k+), ``recall`` (producer's accuracy, p_kk / p_+k), ``f1``, ``iou``, and
        the shares of the scored area ``share_true`` and ``share_predicted``; None where one is not defined.
    """
    right, true, guessed = sums[:-4].reshape(3, -1)
    total = float(true.sum())
    return [
        {
            "precision": ratio(r, p),
            "recall": ratio(r, t),
            "f1": ratio(2 * r, t + p),
            "iou": ratio(r, t + p - r),
            "share_true": ratio(t, total),
            "share_predicted": ratio(p, total),
        }
        for r, t, p in zip(right, true, guessed, strict=True)
    ]


def observed_change(pair: NDArray[np.float64]) -> dict[str, float | None]:
    """Measure the change from the reference map to the truth, as shares of the area.

    Parameters
    ----------
    pair
        Area by class in the reference map and class in the truth, ``(n, n)``.

    Returns
    -------
    dict
        ``gross``: the area whose class changed; ``net``: ½ Σ abs(change of the area of class k). What is gross but not
        net is exchange between places (Pontius, Shusas & McEachern 2004, Agriculture, Ecosystems & Environment 101:251-268).
    """
    total, still = float(pair.sum()), np.eye(len(pair), dtype=bool)
    net = float(np.abs(pair.sum(axis=1) - pair.sum(axis=0)).sum()) / 2
    return {"gross": ratio(float(pair[~still].sum()), total), "net": ratio(net, total)}


def coarse_errors(
    predicted: NDArray[np.floating], wanted: NDArray[np.floating], weights: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Measure how far the class shares of a map are from the wanted ones, in each coarse cell.

    The sum of the errors over the sum of the weights, ½ Σ_cells w Σ_classes abs(predicted − wanted) / Σ_cells w, is the share of
    the area in the wrong class: the quantity disagreement within coarse cells (Pontius & Millones 2011), 0 to 1 for shares that
    sum to 1.

    Parameters
    ----------
    predicted, wanted
        Class shares, ``(class, coarse rows, coarse columns)``. Coarse cells with a NaN in either are dropped.
    weights
        ``(coarse rows, coarse columns)``; cells of weight 0 or NaN are dropped.

    Returns
    -------
    error, weight
        Weighted error and weight, ``(coarse rows, coarse columns)``, both 0 where a cell is dropped.
    """
    if predicted.shape != wanted.shape or weights.shape != predicted.shape[1:]:
        raise DataError(
            f"shares are {predicted.shape} and {wanted.shape} with weights of {weights.shape}, expected the same classes and "
            "coarse cells; cut all from the same window"
        )
    error = np.abs(predicted.astype(np.float64) - wanted).sum(axis=0) / 2
    use = np.isfinite(error) & (weights > 0)
    weight = np.where(use, weights, 0.0).astype(np.float64)
    return np.where(use, error, 0.0) * weight, weight


def ratio(part: float, whole: float) -> float | None:
    """Divide; None if the divisor is not above 0."""
    return float(part) / float(whole) if whole > 0 else None


def number(value: Any) -> float | None:
    """Convert a number for JSON: NaN to None."""
    return None if np.isnan(value) else float(value)


def _over(part: NDArray[np.float64], whole: NDArray[Any]) -> NDArray[np.float64]:
    """Divide; NaN where the divisor is not above 0."""
    return np.asarray(np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0), dtype=np.float64)
