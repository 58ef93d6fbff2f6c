"""The evaluation of predictions over years and windows: sum by sum, so that memory does not grow with the fine map."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ai4land.bootstrap import intervals, summary
from ai4land.calibration import Reliability
from ai4land.change import Codes, flicker, sides
from ai4land.errors import ConfigError, DataError
from ai4land.grid import Grid, Window
from ai4land.legend import MISSING, Legend
from ai4land.scores import per_class, ratio
from ai4land.tally import TRUTH, Probabilities, Tally, add_trust, add_window

_log = logging.getLogger(__name__)
LEADS = 10
"""Years from the reference map within which the loss of accuracy is measured."""
_FIELDS = ("overall_accuracy", "macro_f1", "mean_iou", "figure_of_merit", "change_f1", "coarse_error")
_YEARLY = ("overall_accuracy", "figure_of_merit")
_COMPARED = ("model", "most_likely")


def evaluate_years(
    predictions: Mapping[str, Codes],
    *,
    truth: Codes,
    reference: Callable[[Window], NDArray[np.uint8]] | None,
    where: Callable[[Window], NDArray[np.bool_]],
    wanted: Callable[[int], NDArray[np.floating] | None],
    grid: Grid,
    legend: Legend,
    windows: Sequence[Window],
    years: Sequence[int],
    weights_kind: Literal["area", "cells"] = "area",
    min_coverage: float = 0.999,
    reference_year: int | None = None,
    confidence: Mapping[str, Probabilities] | None = None,
    change_probability: Mapping[str, Probabilities] | None = None,
    block: int = 2,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score predictions over years and windows.

    The memory is that of six years of one window, the wanted shares of one year, and some sums for each block of coarse
    cells that is scored.

    Parameters
    ----------
    predictions
        By name, functions that read the class codes predicted for a year in a window. Each is called twice, for the scores
        and for the flicker.
    truth, reference
        Read the observed codes of a year, and of the reference map, in a window. Without a reference map (None) there are no
        scores of change.
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
    reference_year
        Year of the reference map, for what depends on the lead and for flicker.
    confidence
        By names of predictions, functions that read the probability that the model gives to the class it maps.
    change_probability
        By names of predictions, functions that read the probability that the class differs from the reference map's.
    block, resamples, seed
        Coarse cells along one side of a block of the bootstrap, number of resamples, and their seed
        (:mod:`ai4land.bootstrap`).

    Returns
    -------
    dict
        Ready for JSON, None where something is not defined:

        - ``years``, and ``bootstrap``: ``blocks`` (number of blocks scored), ``block``, ``resamples`` and ``seed``.
        - ``observed``: change of the truth since the reference map (``gross``, ``net`` over the region, ``coarse_net`` over
          coarse cells, and ``figure_of_merit_bound`` of maps of net changes: coarse net over gross), the same ``per_year``,
          the ``coarse_error`` of the truth itself (how far the scenario is from it), and its ``flicker``.
        - for each prediction the fields of :class:`~ai4land.scores.Scores`; ``coarse_error``; ``unpredicted_share`` (share of
          the area with a truth but without a prediction, left out of the scores); ``interval`` (95 %, by score);
          ``figure_of_merit_by_side`` (of squares of so many cells a side, :func:`~ai4land.change.merit_parts`);
          ``per_year`` (the scores by year, as text, with ``interval`` and ``lead``); ``per_class`` (by class name);
          ``accuracy_loss`` (accuracy of the first year minus that of the last within 10 years of the reference map);
          ``flicker`` and ``false_flicker`` (:func:`~ai4land.change.flicker`); ``calibration`` and ``change_calibration``
          (:class:`~ai4land.calibration.Reliability`), None where no probabilities are given.
        - ``differences`` of ``model`` and ``most_likely`` from every other prediction, with their intervals.

        Numbers outside ``per_year`` pool all years: they are scores of the summed areas.

    Raises
    ------
    ConfigError
        If there is nothing to score, a prediction has the name of another field, or windows do not fit the grid.
    DataError
        If a map has another shape than its window, a code that the legend does not know, or a probability beyond 0 to 1.
    """
    chances = {"confidence": dict(confidence or {}), "change probability": dict(change_probability or {})}
    _check_plan(predictions, windows, years, grid, chances, reference is not None)
    names = [TRUTH, *predictions]
    pooled = Tally(names, legend.n, grid.factor)
    by_year: dict[str, dict[str, Any]] = {name: {} for name in names}
    trust = {kind: {name: Reliability() for name in given} for kind, given in chances.items()}
    for year in years:
        yearly = Tally(names, legend.n, grid.factor)
        target = wanted(year)
        if target is not None and target.shape != (legend.n, *grid.coarse.shape):
            raise DataError(
                f"wanted shares of {year} are {target.shape}, expected {(legend.n, *map(int, grid.coarse.shape))}; "
                "give one share a class and coarse cell of the whole grid"
            )
        for window in windows:
            scored = where(window)
            if not scored.any():
                continue
            start = None if reference is None else _encode(reference(window), legend, window, "reference map")
            seen = _encode(truth(year, window), legend, window, f"map of {year}")
            seen = np.where(scored, seen, np.uint8(MISSING))
            maps = {TRUTH: seen}
            for name, read in predictions.items():
                maps[name] = _encode(read(year, window), legend, window, f"{name} of {year}")
            coarse = None
            if target is not None:
                rows, cols = (slice(s.start // grid.factor, s.stop // grid.factor) for s in window.slices)
                coarse = (target[:, rows, cols], weights_kind, min_coverage)
            add_window(yearly, start, scored, maps, grid=grid, window=window, block=block, coarse=coarse)
            if any(chances.values()):
                add_trust(trust, chances, start, maps, grid=grid, window=window, year=year)
        sums = yearly.blocks.merged()[1]
        spread, _ = intervals(sums, names, _YEARLY, resamples=resamples, seed=seed)
        for i, name in enumerate(predictions, start=1):
            lead = {} if reference_year is None else {"lead": int(year) - int(reference_year)}
            by_year[name][str(year)] = {**summary(sums.sum(axis=0)[i]), **lead, "interval": spread[name]}
        by_year[TRUTH][str(year)] = yearly.change.table() if reference is not None else _nothing()
        pooled.add(yearly)
        _log.info("scored %d in %d windows", year, len(windows))
    sums = pooled.blocks.merged()[1]
    total = sums.sum(axis=0)
    if not total[0, : 3 * legend.n].any():
        raise DataError(
            "no cell is scored, expected cells that have a class in the reference map and the truth; look at the split and the mask"
        )
    first = [name for name in _COMPARED if name in predictions]
    pairs = [(a, b) for a in first for b in predictions if b != a and b not in first[: first.index(a)]]
    spread, differences = intervals(sums, names, _FIELDS, pairs=pairs, resamples=resamples, seed=seed)
    back = flicker(
        predictions,
        truth=truth,
        start=None if reference is None else lambda _, w: reference(w),
        start_year=reference_year,
        where=where,
        legend=legend,
        windows=windows,
        years=years if reference is None or reference_year is not None else [],
        areas=grid.cell_areas(),
    )
    result: dict[str, Any] = {
        "years": [int(year) for year in years],
        "bootstrap": {"blocks": len(sums), "block": block, "resamples": resamples, "seed": seed},
        TRUTH: {
            **(pooled.change.table() if reference is not None else _nothing()),
            "coarse_error": summary(total[0])["coarse_error"],
            **back[TRUTH],
            "per_year": by_year[TRUTH],
        },
    }
    for i, name in enumerate(predictions, start=1):
        scored_as = summary(total[i])
        if scored_as["unpredicted_share"]:
            _log.warning(
                "%s has no class on %.3g of the area to score; its scores leave this out", name, scored_as["unpredicted_share"]
            )
        sure, change = trust["confidence"].get(name), trust["change probability"].get(name)
        merits = {str(s): ratio(*pooled.merit[i, k]) for k, s in enumerate(sides(grid.factor))}
        result[name] = {
            **scored_as,
            "interval": spread[name],
            "figure_of_merit_by_side": merits if reference is not None else None,
            "accuracy_loss": _loss(by_year[name]),
            **back[name],
            "calibration": None if sure is None else sure.table(),
            "change_calibration": None if change is None else change.event_table(),
            "per_year": by_year[name],
            "per_class": dict(zip(legend.names, per_class(total[i, :-4]), strict=True)),
        }
    return {**result, "differences": differences}


def _nothing() -> dict[str, None]:
    return dict.fromkeys(("gross", "net", "coarse_net", "figure_of_merit_bound"))


def _encode(codes: NDArray[np.uint8], legend: Legend, window: Window, source: str) -> NDArray[np.uint8]:
    if codes.shape != (window.height, window.width):
        raise DataError(f"{source} is {codes.shape}, expected {(window.height, window.width)}; cut it from the window {window}")
    return legend.encode(codes, source=source)


def _loss(by_year: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Accuracy of the year nearest to the reference map minus that of the farthest within :data:`LEADS` years."""
    rows = [row for row in by_year.values() if 1 <= abs(row.get("lead", 0)) <= LEADS and row["overall_accuracy"] is not None]
    rows.sort(key=lambda row: abs(row["lead"]))
    return float(rows[0]["overall_accuracy"] - rows[-1]["overall_accuracy"]) if len(rows) > 1 else None


def _check_plan(
    predictions: Mapping[str, Codes],
    windows: Sequence[Window],
    years: Sequence[int],
    grid: Grid,
    chances: Mapping[str, Mapping[str, Probabilities]],
    referenced: bool,
) -> None:
    if not predictions or not windows or not years or len(set(years)) != len(years):
        raise ConfigError(
            f"{len(predictions)} predictions, {len(windows)} windows and years {list(years)} are to be scored, "
            "expected at least one of each and each year once; look at the split"
        )
    taken = {"years", "bootstrap", "differences", TRUTH} & set(predictions)
    if taken:
        raise ConfigError(f"prediction is named {sorted(taken)}, which the result uses itself; choose another name")
    for kind, given in chances.items():
        if set(given) - set(predictions):
            raise ConfigError(f"{kind} is of {sorted(given)}, expected some of {sorted(predictions)}; name predictions")
    if chances["change probability"] and not referenced:
        raise ConfigError("change probability is given without a reference map, expected both; give the reference map")
    rows, cols = grid.shape
    for w in windows:
        inside = w.row >= 0 and w.col >= 0 and w.row + w.height <= rows and w.col + w.width <= cols
        if not inside or any(v % grid.factor for v in (w.row, w.col, w.height, w.width)):
            raise ConfigError(
                f"window is {w}, expected whole coarse cells of {grid.factor} inside {grid.shape}; use grid.shards()"
            )
