"""The evaluation of predictions: windows outside and years inside, sum by sum, so that memory does not grow with the fine map."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ai4land.errors import ConfigError, DataError
from ai4land.evaluate.bootstrap import intervals, summary
from ai4land.evaluate.change import square_sides
from ai4land.evaluate.scores import per_class, ratio
from ai4land.evaluate.tally import CHANGE, CONFIDENCE, TRUTH, Change, Maps, Sums, Tally, add_window
from ai4land.grid import Window

_log = logging.getLogger(__name__)
LEADS = 10
"""Years from the reference map within which the loss of accuracy is measured."""
_FIELDS = ("overall_accuracy", "macro_f1", "mean_iou", "figure_of_merit", "change_f1", "coarse_error")
_YEARLY = ("overall_accuracy", "figure_of_merit")
_COMPARED = ("model", "most_likely")


def evaluate_years(
    maps: Maps,
    *,
    windows: Sequence[Window],
    years: Sequence[int],
    min_coverage: float = 0.999,
    block: int = 2,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score predictions over years and windows.

    Peak memory: per scored cell of one window 8 bytes a map for the history of six years, some tens of bytes for the maps of one
    year; and per block of the bootstrap, year and map 8 (3 classes + 8) bytes.

    Parameters
    ----------
    maps
        To compare.
    windows
        Of whole coarse cells inside the grid, such as its shards; they must not overlap.
    years
        To score.
    min_coverage
        Share of a coarse cell that must be scored for it to count in the coarse error.
    block, resamples, seed
        Coarse cells along one side of a block of the bootstrap, number of resamples, and their seed
        (:mod:`ai4land.evaluate.bootstrap`).

    Returns
    -------
    dict
        Ready for JSON, None where something is not defined:

        - ``years``, and ``bootstrap``: ``blocks`` (number of blocks scored), ``block``, ``resamples`` and ``seed``.
        - ``observed``: change of the truth since the reference map (``gross``, ``net`` over the region, ``coarse_net`` over
          coarse cells, and ``figure_of_merit_bound`` of maps of net changes: coarse net over gross), the same ``per_year``,
          the ``coarse_error`` of the truth itself (how far the scenario is from it), and its ``flicker``.
        - for each prediction the scores of :func:`~ai4land.evaluate.scores.headline`; ``coarse_error``; ``unpredicted_share`` (share of
          the area with a truth but without a prediction, left out of the scores); ``interval`` (95 %, by score);
          ``figure_of_merit_by_side`` (of squares of so many cells a side, :func:`~ai4land.evaluate.change.merit_parts`);
          ``per_year`` (the scores by year, as text, with ``interval`` and ``lead``); ``per_class`` (by class name);
          ``accuracy_loss`` (accuracy of the first year minus that of the last within 10 years of the reference map);
          ``flicker`` and ``false_flicker`` (:class:`~ai4land.evaluate.change.Flicker`): the share of the area that flickers, and that
          flickers where the truth does not; ``calibration`` and ``change_calibration``
          (:class:`~ai4land.evaluate.reliability.Reliability`), None where no probabilities are given.
        - ``differences`` of ``model`` and ``most_likely`` from every other prediction, with their intervals.

        Numbers outside ``per_year`` pool all years: they are scores of the summed areas.

    Raises
    ------
    ConfigError
        If there is nothing to score, a prediction has the name of another field, or windows do not fit the grid.
    DataError
        If a map has another shape than its window, an index that is no class, or a probability beyond 0 to 1.
    """
    _check_plan(maps, windows, years)
    sums = Sums(maps, years)
    for number, window in enumerate(windows, start=1):
        add_window(sums, maps, window, block=block, min_coverage=min_coverage)
        _log.info("scored window %d of %d", number, len(windows))
    pooled = Tally(maps.names, len(maps.classes), maps.grid.factor)
    for tally in sums.years.values():
        pooled.add(tally)
    blocks = pooled.blocks.merged()[1]
    total = blocks.sum(axis=0)
    if not total[0, : 3 * len(maps.classes)].any():
        raise DataError(
            "no cell is scored, expected cells that have a class in the reference map and the truth; check the split and the mask"
        )
    by_year = _by_year(sums, maps, resamples, seed)
    first = [name for name in _COMPARED if name in maps.predictions]
    pairs = [(a, b) for a in first for b in maps.predictions if b != a and b not in first[: first.index(a)]]
    spread, differences = intervals(blocks, maps.names, _FIELDS, pairs=pairs, resamples=resamples, seed=seed)
    result: dict[str, Any] = {
        "years": [int(year) for year in years],
        "bootstrap": {"blocks": len(blocks), "block": block, "resamples": resamples, "seed": seed},
        TRUTH: {
            **_change(pooled.change, maps),
            "coarse_error": summary(total[0])["coarse_error"],
            "flicker": ratio(sums.flicker[0, 1], sums.flicker[0, 0]),
            "per_year": by_year[TRUTH],
        },
    }
    for i, name in enumerate(maps.predictions, start=1):
        about = {"interval": spread[name], "per_year": by_year[name]}
        result[name] = _prediction(i, name, total[i], about, pooled=pooled, sums=sums, maps=maps)
    return {**result, "differences": differences}


def _by_year(sums: Sums, maps: Maps, resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Give by name and year the scores of a prediction, or the change of the truth."""
    out: dict[str, dict[str, Any]] = {name: {} for name in maps.names}
    for year, tally in sums.years.items():
        blocks = tally.blocks.merged()[1]
        spread, _ = intervals(blocks, maps.names, _YEARLY, resamples=resamples, seed=seed)
        lead = {} if maps.reference is None else {"lead": int(year) - int(maps.reference)}
        for i, name in enumerate(maps.predictions, start=1):
            out[name][str(year)] = {**summary(blocks.sum(axis=0)[i]), **lead, "interval": spread[name]}
        out[TRUTH][str(year)] = _change(tally.change, maps)
    return out


def _prediction(
    i: int, name: str, total: NDArray[np.float64], about: dict[str, Any], *, pooled: Tally, sums: Sums, maps: Maps
) -> dict[str, Any]:
    """Give the scores of the prediction at place ``i`` among the maps, from its pooled sums and what is known of it by then."""
    scores = summary(total)
    if scores["unpredicted_share"]:
        _log.warning("%s has no class on %.3g of the area to score; its scores leave this out", name, scores["unpredicted_share"])
    confidence, change = sums.trust[CONFIDENCE].get(name), sums.trust[CHANGE].get(name)
    merits = {str(s): ratio(*pooled.merit[i, k]) for k, s in enumerate(square_sides(maps.grid.factor))}
    area, flickers, false = sums.flicker[i]
    return {
        **scores,
        "interval": about["interval"],
        "figure_of_merit_by_side": None if maps.reference is None else merits,
        "accuracy_loss": _loss(about["per_year"]),
        "flicker": ratio(flickers, area),
        "false_flicker": ratio(false, area),
        "calibration": None if confidence is None else confidence.table(),
        "change_calibration": None if change is None else change.event_table(),
        "per_year": about["per_year"],
        "per_class": dict(zip(maps.classes, per_class(total[:-4]), strict=True)),
    }


def _change(change: Change, maps: Maps) -> dict[str, float | None]:
    table = change.table()
    return table if maps.reference is not None else dict.fromkeys(table)


def _loss(by_year: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Accuracy of the year nearest to the reference map minus that of the farthest within :data:`LEADS` years."""
    rows = [row for row in by_year.values() if 1 <= abs(row.get("lead", 0)) <= LEADS and row["overall_accuracy"] is not None]
    rows.sort(key=lambda row: abs(row["lead"]))
    return float(rows[0]["overall_accuracy"] - rows[-1]["overall_accuracy"]) if len(rows) > 1 else None


def _check_plan(maps: Maps, windows: Sequence[Window], years: Sequence[int]) -> None:
    if not maps.predictions or not windows or not years or len(set(years)) != len(years):
        raise ConfigError(
            f"{len(maps.predictions)} predictions, {len(windows)} windows and years {list(years)} are to be scored, "
            "expected at least one of each and each year once; check the split"
        )
    taken = {"years", "bootstrap", "differences", "totals", TRUTH} & set(maps.predictions)
    if taken:
        raise ConfigError(f"prediction is named {sorted(taken)}, which the result uses itself; choose another name")
    for kind, given in maps.probabilities.items():
        if set(given) - set(maps.predictions):
            raise ConfigError(f"{kind} is of {sorted(given)}, expected some of {sorted(maps.predictions)}; name predictions")
    if maps.change_probability and maps.reference is None:
        raise ConfigError("change probability is given without a reference map, expected both; give the reference map")
    rows, cols = maps.grid.shape
    for w in windows:
        inside = w.row >= 0 and w.col >= 0 and w.row + w.height <= rows and w.col + w.width <= cols
        if not inside or any(v % maps.grid.factor for v in (w.row, w.col, w.height, w.width)):
            raise ConfigError(
                f"window is {w}, expected whole coarse cells of {maps.grid.factor} inside {maps.grid.shape}; use grid.shards()"
            )
