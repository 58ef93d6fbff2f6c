"""Scores of annual maps against the observed ones.

Every score of the fine map comes from one three-way table of the classes in the reference map, the truth and the
prediction, in square metres. Tables of tiles and of years add up, so the memory does not grow with the map, and the
scores of many tiles are exactly those of the whole. How well a map follows the scenario is measured on the coarse grid
(:func:`coarse_error`). :func:`evaluate_years` walks over years and windows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ai4land.errors import ConfigError, DataError
from ai4land.grid import Grid, Window
from ai4land.legend import MISSING, Legend

_log = logging.getLogger(__name__)

Codes = Callable[[int, Window], NDArray[np.uint8]]
"""Reads the class codes of a year in a window."""


@dataclass(frozen=True)
class Scores:
    """Scores of a prediction, all from 0 to 1; None where a score is not defined.

    With :math:`p_{ij}` the share of the area that is class *i* in the prediction and *j* in the truth:

    Attributes
    ----------
    overall_accuracy
        Share of the area with the right class, Σ p_kk.
    macro_f1
        Mean over classes of 2 p_kk / (p_k+ + p_+k), over the classes in the truth or the prediction.
    mean_iou
        Mean over the same classes of p_kk / (p_k+ + p_+k − p_kk).
    figure_of_merit
        hits / (hits + misses + wrong hits + false alarms) of change since the reference map (Pontius et al. 2008, Annals
        of Regional Science 42:11-37, doi:10.1007/s00168-007-0138-2). None where nothing changed and no change was
        predicted.
    change_f1
        F1 of "changed since the reference map", whatever the class; None as above.
    quantity_disagreement
        ½ Σ abs(p_k+ − p_+k): error in how much there is of each class (Pontius & Millones 2011, International Journal of
        Remote Sensing 32:4407-4429, doi:10.1080/01431161.2011.552923).
    allocation_disagreement
        Σ min(p_k+, p_+k) − p_kk: error in where the classes are (same source). It adds up to 1 with the accuracy and
        the quantity disagreement.
    """

    overall_accuracy: float | None
    macro_f1: float | None
    mean_iou: float | None
    figure_of_merit: float | None
    change_f1: float | None
    quantity_disagreement: float | None
    allocation_disagreement: float | None


def transition_table(
    reference: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    predicted: NDArray[np.uint8],
    *,
    n: int,
    weights: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Sum the weights of the cells of each combination of classes.

    Parameters
    ----------
    reference, truth, predicted
        Class indices, all ``(rows, columns)``. A cell that is ``MISSING`` in any of them is dropped.
    n
        Number of classes.
    weights
        Area of the cells: one a row ``(rows,)``, as from :meth:`~ai4land.grid.Grid.cell_areas`, or ``(rows, columns)``.

    Returns
    -------
    numpy.ndarray
        ``(n, n, n)``: class in the reference, in the truth, in the prediction; in the units of ``weights``.

    Raises
    ------
    DataError
        If the shapes differ, or an index is neither a class nor ``MISSING``.

    >>> one = np.array([[0, 1]], np.uint8)
    >>> transition_table(one, one, one, n=2, weights=np.array([5.0]))[[0, 1], [0, 1], [0, 1]].tolist()
    [5.0, 5.0]
    """
    if not reference.shape == truth.shape == predicted.shape or reference.ndim != 2:
        raise DataError(
            f"maps are {reference.shape}, {truth.shape} and {predicted.shape}, expected three of the same rows and columns; "
            "cut all from the same window"
        )
    if weights.shape not in (reference.shape, reference.shape[:1]):
        raise DataError(
            f"weights are {weights.shape}, expected {reference.shape[:1]} or {reference.shape}; give one a row or a cell"
        )
    valid = (reference != MISSING) & (truth != MISSING) & (predicted != MISSING)
    cells = [part[valid].astype(np.intp) for part in (reference, truth, predicted)]
    top = max((int(part.max(initial=0)) for part in cells), default=0)
    if top >= n:
        raise DataError(f"class index is {top}, expected 0..{n - 1} or {MISSING}; encode the codes with the legend first")
    area = np.broadcast_to(weights.reshape(weights.shape[0], -1), reference.shape)[valid]
    flat = (cells[0] * n + cells[1]) * n + cells[2]
    table: NDArray[np.float64] = np.bincount(flat, weights=area, minlength=n**3).astype(np.float64).reshape(n, n, n)
    return table


def scores(table: NDArray[np.float64]) -> Scores:
    """Compute the scores of a table of :func:`transition_table`; see :class:`Scores` for the formulas."""
    right, true, guessed = _margins(table)
    total = float(true.sum())
    there = (true + guessed) > 0
    if not total > 0:
        return Scores(*[None] * 7)
    f1 = 2 * right[there] / (true + guessed)[there]
    iou = right[there] / (true + guessed - right)[there]
    change = _change_parts(table)
    return Scores(
        overall_accuracy=float(right.sum()) / total,
        macro_f1=float(f1.mean()),
        mean_iou=float(iou.mean()),
        figure_of_merit=_ratio(change["hits"], sum(change.values())),
        change_f1=_change_f1(change),
        quantity_disagreement=float(np.abs(true - guessed).sum()) / 2 / total,
        allocation_disagreement=float((np.minimum(true, guessed) - right).sum()) / total,
    )


def per_class(table: NDArray[np.float64]) -> list[dict[str, float | None]]:
    """Score each class, in the order of the indices.

    Returns
    -------
    list of dict
        ``precision`` (user's accuracy, p_kk / p_k+), ``recall`` (producer's accuracy, p_kk / p_+k), ``f1``, ``iou``, and
        the shares of the scored area ``share_true`` and ``share_predicted``; None where a class does not occur.
    """
    total = float(table.sum())
    return [
        {
            "precision": _ratio(r, p),
            "recall": _ratio(r, t),
            "f1": _ratio(2 * r, t + p),
            "iou": _ratio(r, t + p - r),
            "share_true": _ratio(t, total),
            "share_predicted": _ratio(p, total),
        }
        for r, t, p in zip(*_margins(table), strict=True)
    ]


def observed_change(table: NDArray[np.float64]) -> dict[str, float | None]:
    """Measure the change from the reference map to the truth, as shares of the area.

    Returns
    -------
    dict
        ``gross``: the area whose class changed; ``net``: ½ Σ abs(change of the area of class k). What is gross but not
        net is exchange between places (Pontius, Shusas & McEachern 2004, Agriculture, Ecosystems & Environment 101:251-268).
    """
    pair = table.sum(axis=2)
    total, still = float(pair.sum()), np.eye(len(pair), dtype=bool)
    net = float(np.abs(pair.sum(axis=1) - pair.sum(axis=0)).sum()) / 2
    return {"gross": _ratio(float(pair[~still].sum()), total), "net": _ratio(net, total)}


def class_shares(
    index: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    *,
    n: int,
    factor: int,
    weights: Literal["area", "cells"] = "area",
    areas: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Measure what the coarse cells hold of each class.

    Parameters
    ----------
    index
        Class indices of whole coarse cells, ``(rows, columns)``.
    mask
        Cells that count, same shape; of these, the ones with a class are *mapped*.
    n, factor
        Number of classes, and fine cells along one side of a coarse cell.
    weights
        Shares of the area, or of the number of cells.
    areas
        Area of a cell of each row, ``(rows,)``; needed for ``weights="area"``.

    Returns
    -------
    shares
        Of each class among the mapped cells, ``(n, coarse rows, coarse columns)``; NaN where nothing is mapped.
    coverage
        Share of the coarse cell that is mapped, ``(coarse rows, coarse columns)``.
    """
    rows, cols = index.shape
    if rows % factor or cols % factor or mask.shape != index.shape:
        raise DataError(
            f"map is {index.shape} with a mask of {mask.shape}, expected the same and whole coarse cells of {factor}; "
            "use windows that are multiples of the factor"
        )
    if weights == "area" and (areas is None or areas.shape != (rows,)):
        raise DataError(
            f"areas are {None if areas is None else areas.shape}, expected ({rows},); give one area a row, or weights='cells'"
        )
    per_row = np.ones(rows) if areas is None or weights == "cells" else areas
    crows, ccols = rows // factor, cols // factor
    cell = np.arange(rows)[:, None] // factor * ccols + np.arange(cols)[None, :] // factor
    mapped = mask & (index != MISSING)
    flat = index[mapped].astype(np.intp) * (crows * ccols) + cell[mapped]
    area = np.broadcast_to(per_row[:, None], index.shape)
    sums = np.bincount(flat, weights=area[mapped], minlength=n * crows * ccols).astype(np.float64)
    if sums.size > n * crows * ccols:
        raise DataError(
            f"class index is {int(index[mapped].max())}, expected 0..{n - 1} or {MISSING}; encode the codes with the legend"
        )
    held = sums.reshape(n, crows, ccols)
    have = held.sum(axis=0)
    whole = np.repeat(per_row.reshape(crows, factor).sum(axis=1)[:, None] * factor, ccols, axis=1)
    shares = np.divide(held, have, out=np.full_like(held, np.nan), where=have > 0)
    return shares, have / whole


def coarse_error(
    predicted_shares: NDArray[np.floating], wanted_shares: NDArray[np.floating], weights: NDArray[np.floating]
) -> float | None:
    """Measure how far the class shares of a map are from the wanted ones: the share of the area in the wrong class.

    ½ Σ_cells w Σ_classes abs(predicted − wanted) / Σ_cells w, which is the quantity disagreement within coarse cells
    (Pontius & Millones 2011), 0 to 1 for shares that sum to 1.

    Parameters
    ----------
    predicted_shares, wanted_shares
        ``(class, coarse rows, coarse columns)``. Coarse cells with a NaN in either are dropped.
    weights
        ``(coarse rows, coarse columns)``; cells of weight 0 or NaN are dropped.

    Returns
    -------
    float or None
        None where no coarse cell is left.
    """
    return _ratio(*_coarse_sums(predicted_shares, wanted_shares, weights))


@dataclass
class _Tally:
    """What one prediction has added up over windows."""

    table: NDArray[np.float64]
    coarse: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    lacking: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))

    def add(self, other: _Tally) -> None:
        self.table += other.table
        self.coarse += other.coarse
        self.lacking += other.lacking

    def summary(self) -> dict[str, Any]:
        return {
            **asdict(scores(self.table)),
            "coarse_error": _ratio(*self.coarse),
            "unpredicted_share": _ratio(*self.lacking),
        }


def evaluate_years(
    predictions: Mapping[str, Codes],
    *,
    truth: Codes,
    reference: Callable[[Window], NDArray[np.uint8]],
    where: Callable[[Window], NDArray[np.bool_]],
    wanted: Callable[[int], NDArray[np.floating] | None],
    grid: Grid,
    legend: Legend,
    windows: Sequence[Window],
    years: Sequence[int],
    weights_kind: Literal["area", "cells"] = "area",
    min_coverage: float = 0.999,
) -> dict[str, Any]:
    """Score predictions over years and windows.

    The memory is that of one window, a few tables, and the wanted shares of one year.

    Parameters
    ----------
    predictions
        By name, functions that read the class codes predicted for a year in a window.
    truth, reference
        Read the observed codes of a year, and of the reference map, in a window.
    where
        Reads which cells of a window are scored.
    wanted
        Class shares of the scenario for a year on the whole coarse grid, ``(class, coarse rows, coarse columns)``; or
        None, then there is no coarse error.
    grid, legend
        Of the maps.
    windows
        Of whole coarse cells inside the grid, such as its shards; they must not overlap.
    years
        To score.
    weights_kind
        Whether the wanted shares are of the area or of the number of cells. The scores of the fine map are always
        weighted by area.
    min_coverage
        Share of a coarse cell that must be scored for it to count in the coarse error.

    Returns
    -------
    dict
        Ready for JSON: ``years``; ``observed`` (``gross`` and ``net`` change of the truth since the reference map, and
        the ``coarse_error`` of the truth itself: how far the scenario is from it); and for each prediction the fields of
        :class:`Scores`, ``coarse_error``, ``unpredicted_share`` (share of the area with a truth but without a
        prediction, left out of the scores), ``per_year`` (the same by year, as text) and ``per_class`` (by class name).
        Numbers outside ``per_year`` pool all years: they are scores of the sum of the tables.

    Raises
    ------
    ConfigError
        If there is nothing to score, a prediction has the name of another field, or windows do not fit the grid.
    DataError
        If a map has another shape than its window, or a code that the legend does not know.
    """
    _check_plan(predictions, windows, years, grid)
    areas, n = grid.cell_areas(), legend.n
    names = [*predictions, _TRUTH]
    pooled = {name: _Tally(np.zeros((n, n, n))) for name in names}
    by_year: dict[str, dict[str, Any]] = {name: {} for name in names}
    for year in years:
        yearly = {name: _Tally(np.zeros((n, n, n))) for name in names}
        target = wanted(year)
        if target is not None and target.shape != (n, *grid.coarse.shape):
            raise DataError(
                f"wanted shares of {year} are {target.shape}, expected {(n, *map(int, grid.coarse.shape))}; "
                "give one share a class and coarse cell of the whole grid"
            )
        for window in windows:
            scored = where(window)
            if not scored.any():
                continue
            start = legend.encode(reference(window), source="reference map")
            seen = np.where(scored, legend.encode(truth(year, window), source=f"map of {year}"), np.uint8(MISSING))
            known = (start != MISSING) & (seen != MISSING)
            row_areas = areas[window.slices[0]]
            row_known = known.sum(axis=1)
            for name in names:
                codes = predictions[name](year, window) if name != _TRUTH else None
                guess = seen if codes is None else legend.encode(codes, source=f"{name} of {year}")
                part = _Tally(transition_table(start, seen, guess, n=n, weights=row_areas))
                gone = (known & (guess == MISSING)).sum(axis=1)
                part.lacking[:] = float(gone @ row_areas), float(row_known @ row_areas)
                if target is not None:
                    shares, coverage = class_shares(guess, scored, n=n, factor=grid.factor, weights=weights_kind, areas=row_areas)
                    size = np.ones_like(coverage) if weights_kind == "cells" else _coarse_areas(row_areas, grid.factor)
                    cut = _coarse_cut(target, window, grid.factor)
                    part.coarse[:] = _coarse_sums(shares, cut, np.where(coverage >= min_coverage, size * coverage, 0.0))
                yearly[name].add(part)
        for name in names:
            pooled[name].add(yearly[name])
            by_year[name][str(year)] = yearly[name].summary()
        _log.info("scored %d in %d windows", year, len(windows))
    if not pooled[_TRUTH].table.any():
        raise DataError(
            "no cell is scored, expected cells that have a class in the reference map and the truth; look at the split and the mask"
        )
    result: dict[str, Any] = {
        "years": [int(year) for year in years],
        _TRUTH: {**observed_change(pooled[_TRUTH].table), "coarse_error": _ratio(*pooled[_TRUTH].coarse)},
    }
    for name in predictions:
        summary = pooled[name].summary()
        if summary["unpredicted_share"]:
            _log.warning(
                "%s has no class on %.3g of the area to score; its scores leave this out", name, summary["unpredicted_share"]
            )
        classes = dict(zip(legend.names, per_class(pooled[name].table), strict=True))
        result[name] = {**summary, "per_year": by_year[name], "per_class": classes}
    return result


_TRUTH = "observed"


def _check_plan(predictions: Mapping[str, Codes], windows: Sequence[Window], years: Sequence[int], grid: Grid) -> None:
    if not predictions or not windows or not years or len(set(years)) != len(years):
        raise ConfigError(
            f"{len(predictions)} predictions, {len(windows)} windows and years {list(years)} are to be scored, "
            "expected at least one of each and each year once; look at the split"
        )
    taken = {"years", _TRUTH} & set(predictions)
    if taken:
        raise ConfigError(f"prediction is named {sorted(taken)}, which the result uses itself; choose another name")
    rows, cols = grid.shape
    for w in windows:
        inside = w.row >= 0 and w.col >= 0 and w.row + w.height <= rows and w.col + w.width <= cols
        if not inside or any(v % grid.factor for v in (w.row, w.col, w.height, w.width)):
            raise ConfigError(
                f"window is {w}, expected whole coarse cells of {grid.factor} inside {grid.shape}; use grid.shards()"
            )


def _margins(table: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Per class: the area that is right, that is true, that is predicted."""
    confusion = table.sum(axis=0)
    return np.diagonal(confusion).copy(), confusion.sum(axis=1), confusion.sum(axis=0)


def _change_parts(table: NDArray[np.float64]) -> dict[str, float]:
    """Hits, misses, wrong hits and false alarms of change since the reference map."""
    i, j, k = np.ogrid[tuple(slice(s) for s in table.shape)]
    changed, foreseen = i != j, i != k
    return {
        "hits": float(table[changed & (j == k)].sum()),
        "misses": float(table[changed & ~foreseen].sum()),
        "wrong_hits": float(table[changed & foreseen & (j != k)].sum()),
        "false_alarms": float(table[~changed & foreseen].sum()),
    }


def _change_f1(change: dict[str, float]) -> float | None:
    both = change["hits"] + change["wrong_hits"]
    return _ratio(2 * both, 2 * both + change["misses"] + change["false_alarms"])


def _coarse_sums(
    predicted: NDArray[np.floating], wanted: NDArray[np.floating], weights: NDArray[np.floating]
) -> tuple[float, float]:
    """Sum of the weighted error and of the weights."""
    if predicted.shape != wanted.shape or weights.shape != predicted.shape[1:]:
        raise DataError(
            f"shares are {predicted.shape} and {wanted.shape} with weights of {weights.shape}, expected the same classes and "
            "coarse cells; cut all from the same window"
        )
    error = np.abs(predicted.astype(np.float64) - wanted).sum(axis=0) / 2
    use = np.isfinite(error) & (weights > 0)
    return float((error[use] * weights[use]).sum()), float(weights[use].sum())


def _coarse_areas(row_areas: NDArray[np.float64], factor: int) -> NDArray[np.float64]:
    """Area of one coarse cell of each coarse row, ``(coarse rows, 1)``."""
    return row_areas.reshape(-1, factor).sum(axis=1)[:, None] * factor


def _coarse_cut(values: NDArray[np.floating], window: Window, factor: int) -> NDArray[np.floating]:
    rows, cols = window.slices
    return values[:, rows.start // factor : rows.stop // factor, cols.start // factor : cols.stop // factor]


def _ratio(part: float, whole: float) -> float | None:
    return float(part) / float(whole) if whole > 0 else None
