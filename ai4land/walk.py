"""From probabilities to the published map, year by year outward from the reference map.

Each year starts from the map of the year before. The probabilities are projected onto the scenario's totals, and cells
change so that the whole-cell totals are met, with a preference for what was there, and not back to what they were a few
years ago. Nothing depends on which of the years are kept: all years that the scenario has are walked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ai4land.allocate import allocate
from ai4land.constrain import project
from ai4land.legend import MISSING
from ai4land.totals import Totals

_RETURN = 30.0
"""What going back to a class of the last few years costs, in units of the logarithm of the probability."""
_LEAST = 1e-12
_NEVER = -10_000
"""Year in which a cell left a class that it has not left."""


@dataclass(frozen=True)
class Published:
    """One year of a window.

    Attributes
    ----------
    land_cover, most_likely
        Class indices ``(rows, columns)``: with the whole-cell totals imposed, and the class of the largest fraction of each
        cell by itself; ``MISSING`` where not mapped.
    fractions
        Class fractions with the totals imposed, float32 ``(class, rows, columns)``.
    confidence, change_probability
        Probability of the class in ``land_cover``, and that the class is not that of the reference map (None without one).
    unmet
        Cells that each class has beyond its quota, ``(class, coarse rows, coarse columns)``: not 0 only where locks and
        totals contradict each other.
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
        Year and probabilities ``(class, rows, columns)`` of whole coarse cells; with a reference map the years in order,
        away from the reference year, none left out that the scenario has.
    mapped
        Cells to map, ``(rows, columns)``.
    factor
        Fine cells along one side of a coarse cell.
    totals
        What the maps should add up to; None: nothing is imposed.
    reference, reference_year
        Class indices of the reference map, ``MISSING`` where it has none, and its year. Without one each year stands
        alone.
    locked
        Cells that keep the class of the reference map, ``(rows, columns)``.
    keep
        Preference for the class of the year before, as a logarithm of odds; None: only the net change of each class.
    settle
        Years for which a cell does not go back to a class that it has left, unless the totals leave no other way.
    areas
        Area of a cell of each row if the totals are of the area.

    Yields
    ------
    year, Published
    """
    current = None if reference is None else np.where(mapped, reference, np.uint8(MISSING))
    fixed = None if locked is None or current is None else locked & mapped & (current != MISSING)
    left: NDArray[np.int16] | None = None
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
                if left is not None:
                    for score, gone in zip(scores, left, strict=True):
                        score[np.abs(np.int16(year) - gone) <= settle] -= _RETURN
                quotas = totals.quotas(year)
                got = allocate(scores, current=current, quotas=quotas, factor=factor, keep=keep, locked=fixed, mapped=mapped)
                land_cover, unmet = got.land_cover, got.unmet
                if current is not None:
                    left = np.full(scores.shape, _NEVER, dtype=np.int16) if left is None else left
                    rows, cols = np.nonzero((land_cover != current) & mapped)
                    left[current[rows, cols], rows, cols] = year
                    left[land_cover[rows, cols], rows, cols] = _NEVER
                    current = land_cover
        chosen = np.where(mapped, land_cover, 0)[None].astype(np.intp)
        confidence = np.take_along_axis(fractions, chosen, axis=0)[0]
        change = None
        if reference is not None:
            kept = np.take_along_axis(fractions, np.where(reference == MISSING, 0, reference)[None].astype(np.intp), axis=0)[0]
            change = np.where(reference == MISSING, np.nan, 1 - kept).astype(np.float32)
        yield year, Published(land_cover, likely, fractions, confidence, change, unmet, residual)
