"""Change of class at coarser resolution, its bound, and flicker.

A map may foresee how much changes in a place and not in which cell: the Figure of Merit of larger and larger squares
(:func:`merit_parts`) tells by how much. A map made of net changes of coarse cells cannot hold the change that cancels
within them: :func:`coarse_net` bounds its Figure of Merit. And a map drawn afresh each year may change a class and change
it back, which real land seldom does: :func:`flicker`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ai4land.grid import Window
from ai4land.legend import MISSING, Legend
from ai4land.scores import ratio

_log = logging.getLogger(__name__)
Codes = Callable[[int, Window], NDArray[np.uint8]]
"""Reads the class codes of a year in a window."""

WITHIN = 5
"""Years within which a cell that returns to its class flickers."""


def sides(factor: int) -> list[int]:
    """Give the sides of squares that tile a coarse cell, in fine cells: the divisors of the factor.

    >>> sides(25)
    [1, 5, 25]
    """
    return [side for side in range(1, factor + 1) if factor % side == 0]


def merit_parts(
    reference: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    predicted: NDArray[np.uint8],
    *,
    squares: Sequence[int],
    n: int,
    areas: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Add up hits and change for the Figure of Merit of squares of cells.

    Within a square, *amounts* are compared and places are not: of the observed and of the predicted area of a transition
    from class *i* to class *j*, the smaller is a hit; the larger of all change away from *i*, observed or predicted, is the
    change that hits, misses, wrong hits and false alarms make up (Pontius et al. 2008, Annals of Regional Science 42:11-37,
    doi:10.1007/s00168-007-0138-2). For squares of one cell the quotient is the Figure of Merit; it never falls when squares
    are merged.

    Parameters
    ----------
    reference, truth, predicted
        Class indices ``(rows, columns)``; a cell that is ``MISSING`` in any of them is dropped.
    squares
        Sides of the squares in cells; rows and columns are multiples of each.
    n
        Number of classes.
    areas
        Area of a cell of each row.

    Returns
    -------
    numpy.ndarray
        ``(sides, 2)``: hits, and change; sums of many windows add up. Their quotient is the Figure of Merit.
    """
    known = (reference != MISSING) & (truth != MISSING) & (predicted != MISSING)
    moved = np.flatnonzero(known & ((truth != reference) | (predicted != reference)))
    rows, cols = np.divmod(moved, reference.shape[1])
    start, seen, guess = (part.ravel()[moved] for part in (reference, truth, predicted))
    area = areas[rows]
    there, foreseen = seen != start, guess != start
    out = np.zeros((len(squares), 2))
    for k, side in enumerate(squares):
        if side == 1:
            out[k] = area[there & (seen == guess)].sum(), area.sum()
            continue
        height, width = (size // side for size in reference.shape)
        left = ((rows // side) * width + cols // side) * n + start
        size = height * width * n
        gone, lost = _amounts(left[there], left[foreseen], area[there], area[foreseen], size)
        made, meant = _amounts(
            left[there] * n + seen[there], left[foreseen] * n + guess[foreseen], area[there], area[foreseen], size * n
        )
        out[k] = np.minimum(made, meant).sum(), np.maximum(gone, lost).sum()
    return out


def _amounts(
    first: NDArray[np.intp],
    second: NDArray[np.intp],
    first_area: NDArray[np.float64],
    second_area: NDArray[np.float64],
    size: int,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sum two sets of areas by key, side by side; over all ``size`` keys, or over those that occur where these are few."""
    if size > 16 * (len(first) + len(second)):
        keys, place = np.unique(np.concatenate([first, second]), return_inverse=True)
        first, second, size = place[: len(first)], place[len(first) :], len(keys)
    return np.bincount(first, weights=first_area, minlength=size), np.bincount(second, weights=second_area, minlength=size)


def coarse_net(
    reference: NDArray[np.uint8], truth: NDArray[np.uint8], *, factor: int, n: int, areas: NDArray[np.float64]
) -> float:
    """Measure the net change of coarse cells: Σ_cells ½ Σ_k abs(area of class k in the truth − in the reference map).

    Over the gross change, it is the most that the Figure of Merit of a map can reach whose changes are net in each coarse
    cell: all of its change hits, and what cancels within a coarse cell is missed.

    Parameters
    ----------
    reference, truth
        Class indices of whole coarse cells, ``(rows, columns)``; a cell that is ``MISSING`` in one of them is dropped.
    factor, n
        Fine cells along one side of a coarse cell, and the number of classes.
    areas
        Area of a cell of each row.

    Returns
    -------
    float
        In the units of ``areas``.
    """
    moved = np.flatnonzero((reference != truth) & (reference != MISSING) & (truth != MISSING))
    rows, cols = np.divmod(moved, reference.shape[1])
    across = reference.shape[1] // factor
    cell, size = ((rows // factor) * across + cols // factor) * n, reference.shape[0] // factor * across * n
    lost, gained = (np.bincount(cell + index.ravel()[moved], weights=areas[rows], minlength=size) for index in (reference, truth))
    return float(np.abs(gained - lost).sum()) / 2


def flicker(
    predictions: Mapping[str, Codes],
    *,
    truth: Codes,
    start: Codes | None,
    start_year: int | None,
    where: Callable[[Window], NDArray[np.bool_]],
    legend: Legend,
    windows: Sequence[Window],
    years: Sequence[int],
    areas: NDArray[np.float64],
    within: int = WITHIN,
) -> dict[str, dict[str, float | None]]:
    """Measure where maps change a class and change it back within a few years.

    A cell flickers that has a class, then others, and again the first, all within ``within`` years. The maps are those of
    the scored years, the truth's or a prediction's, and among them the reference map in its year. The memory is that of
    ``within + 1`` years of a window.

    Parameters
    ----------
    predictions, truth
        Read the class codes of a year in a window; predictions by name.
    start, start_year
        The same of the reference map, and its year; None where there is none.
    where
        Reads which cells of a window are scored.
    legend
        Of the codes.
    windows
        To read, one after another, all years of each.
    years
        Only years in a row count; a gap ends the history.
    areas
        Area of a cell of each row of the grid.
    within
        Longest time from a class to its return.

    Returns
    -------
    dict
        By name, and ``observed`` for the truth: ``flicker``, the share of the area that flickers at least once, of the cells
        that have a class in all maps; and for predictions ``false_flicker``, the share that flickers where the truth does
        not. None where fewer than three years are in a row, or no cell is left.
    """
    every = sorted({*years, *([start_year] if start is not None and start_year is not None else [])})
    runs = [run for run in _runs(every) if len(run) > 2]
    sums = {name: np.zeros(3) for name in ("observed", *predictions)}
    for window in windows if runs else ():
        scored = where(window)
        if scored.any():
            _flicker_window(
                sums,
                {"observed": truth, **predictions},
                (start, start_year if start_year not in years else None),
                scored,
                legend=legend,
                window=window,
                runs=runs,
                areas=areas[window.slices[0]],
                within=within,
            )
    result: dict[str, dict[str, float | None]] = {"observed": {"flicker": ratio(sums["observed"][1], sums["observed"][0])}}
    for name in predictions:
        whole, own, false = sums[name]
        result[name] = {"flicker": ratio(own, whole), "false_flicker": ratio(false, whole)}
    return result


def _flicker_window(
    sums: dict[str, NDArray[np.float64]],
    maps: Mapping[str, Codes],
    start: tuple[Codes | None, int | None],
    scored: NDArray[np.bool_],
    *,
    legend: Legend,
    window: Window,
    runs: Sequence[Sequence[int]],
    areas: NDArray[np.float64],
    within: int,
) -> None:
    """Add the area of a window that counts, that flickers, and that flickers where the truth does not."""
    cells = np.flatnonzero(scored)
    area = areas[cells // scored.shape[1]]
    whole = {name: np.ones(cells.size, bool) for name in maps}
    back = {name: np.zeros(cells.size, bool) for name in maps}
    for run in runs:
        past: dict[str, deque[NDArray[np.uint8]]] = {name: deque(maxlen=within) for name in maps}
        for year in run:
            first = legend.encode(start[0](year, window)) if start[0] is not None and year == start[1] else None
            for name, read in maps.items():
                index = legend.encode(read(year, window), source=f"{name} of {year}") if first is None else first
                now, old = index.ravel()[cells], past[name]
                whole[name] &= now != MISSING
                if len(old) > 1:
                    new = np.flatnonzero(now != old[-1])
                    returned = np.zeros(new.size, bool)
                    for before in list(old)[:-1]:
                        returned |= before[new] == now[new]
                    back[name][new] |= returned
                old.append(now)
    for name, total in sums.items():
        valid = whole[name] & whole["observed"]
        own = valid & back[name]
        total += [float(area[part].sum()) for part in (valid, own, own & ~back["observed"])]


def _runs(years: Sequence[int]) -> list[list[int]]:
    """Split ascending years where one is left out.

    >>> _runs([2000, 2001, 2003])
    [[2000, 2001], [2003]]
    """
    out: list[list[int]] = []
    for year in years:
        if out and out[-1][-1] == year - 1:
            out[-1].append(year)
        else:
            out.append([year])
    return out
