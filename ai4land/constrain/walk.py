"""From probabilities to the published map, year by year outward from the reference map.

Each year starts from the map of the year before. The probabilities are projected onto the scenario's totals, then as many
cells change class as the whole-cell totals ask for. Cells prefer to keep their class, and do not return to a class that they
left a few years before. All years of the scenario are walked, so the result does not depend on which years are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ai4land.constrain.allocate import allocate
from ai4land.constrain.project import project
from ai4land.constrain.totals import Totals
from ai4land.legend import MISSING

_RETURN_COST = 30.0
"""Cost of returning to a class left a few years before, as a logarithm of probability."""
_LEAST = 1e-12
"""Least fraction whose logarithm is taken."""
_NEVER = -10_000
"""Year of departure from a class that a cell has not left."""


@dataclass(frozen=True)
class Published:
    """One year of a window.

    Attributes
    ----------
    land_cover, most_likely
        Class indices ``(rows, columns)``: the map that meets the whole-cell totals, and the class with the largest fraction in
        each cell; ``MISSING`` where not mapped.
    fractions
        Class fractions with the totals imposed, float32 ``(class, rows, columns)``.
    confidence, change_probability
        Probability of the class in ``land_cover``, and of any class but that of the reference map (None without one).
    unmet
        Cells of each class less its quota, ``(class, coarse rows, coarse columns)``; not 0 only where locked cells contradict
        the totals.
    residual
        Largest error of the fractions against the totals, as a share of the coarse cell, ``(coarse rows, coarse columns)``.
    """

    land_cover: NDArray[np.uint8]
    most_likely: NDArray[np.uint8]
    fractions: NDArray[np.float32]
    confidence: NDArray[np.float32]
    change_probability: NDArray[np.float32] | None
    unmet: NDArray[np.int64]
    residual: NDArray[np.float64]


def walk(
    predictions: Iterable[tuple[int, NDArray[np.float32]]],
    *,
    mapped: NDArray[np.bool_],
    factor: int,
    totals: Totals | None,
    reference: NDArray[np.uint8] | None,
    reference_year: int | None,
    locked: NDArray[np.bool_] | None = None,
    keep: float | None = None,
    settle: int = 5,
    areas: NDArray[np.float64] | None = None,
) -> Iterator[tuple[int, Published]]:
    """Make the published map of each year from its probabilities.

    Parameters
    ----------
    predictions
        Year and probabilities ``(class, rows, columns)`` of whole coarse cells. With a reference map: every year of the
        scenario, in order, away from the reference year.
    mapped
        Cells to map, ``(rows, columns)``.
    factor
        Fine cells along one side of a coarse cell.
    totals
        What the maps add up to; None: nothing is imposed.
    reference, reference_year
        Class indices of the reference map, ``MISSING`` where it has none, and its year; None: each year is made by itself.
    locked
        Cells that keep the class of the reference map, ``(rows, columns)``.
    keep
        Preference for the class of the year before, in log odds; None: only the net change of each class takes place.
    settle
        Years for which a cell does not return to a class that it left, unless the totals leave no other way.
    areas
        Area of a cell of each row if the totals are of the area.

    Yields
    ------
    year, Published
    """
    current = None if reference is None else np.where(mapped, reference, np.uint8(MISSING))
    fixed = None if locked is None or current is None else locked & mapped & (current != MISSING)
    left_in: NDArray[np.int16] | None = None  # year in which each cell last left each class
    multipliers: NDArray[np.float64] | None = None
    for year, raw in predictions:
        n = len(raw)
        classes = np.arange(n, dtype=np.uint8)[:, None, None]
        if reference is not None and year == reference_year:
            sure = classes == reference
            raw = np.where((reference != MISSING)[None], sure, raw).astype(np.float32)
        elif fixed is not None and current is not None:
            raw = np.where(fixed, classes == current, raw).astype(np.float32)
        unmet = np.zeros((n, *(s // factor for s in mapped.shape)), dtype=np.int64)
        residual = np.zeros(unmet.shape[1:])
        fractions = raw
        if totals is not None:
            made = project(
                raw, totals=totals.shares(year), factor=factor, mapped=mapped, areas=areas, fixed=fixed, multipliers=multipliers
            )
            fractions, multipliers, residual = made.fractions, made.multipliers, made.residual
        likely = np.where(mapped, fractions.argmax(axis=0).astype(np.uint8), np.uint8(MISSING))
        land_cover = likely
        if totals is not None:
            if current is not None and reference is not None:
                current = np.where(mapped & (current == MISSING), likely, current)
            if current is not None and year == reference_year:
                land_cover = current
            else:
                scores = np.log(np.maximum(fractions, _LEAST))
                if left_in is not None:
                    for score, year_left in zip(scores, left_in, strict=True):
                        score[np.abs(np.int16(year) - year_left) <= settle] -= _RETURN_COST
                quotas = totals.quotas(year)
                got = allocate(scores, current=current, quotas=quotas, factor=factor, keep=keep, locked=fixed, mapped=mapped)
                land_cover, unmet = got.land_cover, got.unmet
                if current is not None:
                    left_in = np.full(scores.shape, _NEVER, dtype=np.int16) if left_in is None else left_in
                    rows, cols = np.nonzero((land_cover != current) & mapped)
                    left_in[current[rows, cols], rows, cols] = year
                    left_in[land_cover[rows, cols], rows, cols] = _NEVER
                    current = land_cover
        chosen = np.where(mapped, land_cover, 0)[None].astype(np.intp)
        confidence = np.take_along_axis(fractions, chosen, axis=0)[0]
        change = None
        if reference is not None:
            kept = np.take_along_axis(fractions, np.where(reference == MISSING, 0, reference)[None].astype(np.intp), axis=0)[0]
            change = np.where(reference == MISSING, np.nan, 1 - kept).astype(np.float32)
        yield year, Published(land_cover, likely, fractions, confidence, change, unmet, residual)
