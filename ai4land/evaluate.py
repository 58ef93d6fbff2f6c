"""The evaluation of predictions over years and windows: table by table, so that memory does not grow with the map."""

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
from ai4land.scores import class_shares, coarse_sums, observed_change, per_class, ratio, scores, transition_table

_log = logging.getLogger(__name__)
Codes = Callable[[int, Window], NDArray[np.uint8]]
"""Reads the class codes of a year in a window."""


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
            "coarse_error": ratio(*self.coarse),
            "unpredicted_share": ratio(*self.lacking),
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
                    part.coarse[:] = coarse_sums(shares, cut, np.where(coverage >= min_coverage, size * coverage, 0.0))
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
        _TRUTH: {**observed_change(pooled[_TRUTH].table), "coarse_error": ratio(*pooled[_TRUTH].coarse)},
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


def _coarse_areas(row_areas: NDArray[np.float64], factor: int) -> NDArray[np.float64]:
    """Area of one coarse cell of each coarse row, ``(coarse rows, 1)``."""
    return row_areas.reshape(-1, factor).sum(axis=1)[:, None] * factor


def _coarse_cut(values: NDArray[np.floating], window: Window, factor: int) -> NDArray[np.floating]:
    rows, cols = window.slices
    return values[:, rows.start // factor : rows.stop // factor, cols.start // factor : cols.stop // factor]
