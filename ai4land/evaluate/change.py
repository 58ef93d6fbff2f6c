"""Change of class at coarser resolution, its bound, and flicker.

A map may predict how much changes in a place but not in which cell: :func:`merit_parts` gives the Figure of Merit of
larger and larger squares. A map made of net changes of coarse cells lacks the change that cancels within them:
:func:`coarse_net` bounds its Figure of Merit. A map drawn afresh each year may change a class and change it back, which
real land seldom does: :class:`Flicker`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ai4land.legend import MISSING

WITHIN = 5
"""Years within which a return to an earlier class counts as flicker."""


def square_sides(factor: int) -> list[int]:
    """Give the sides of squares that tile a coarse cell, in fine cells: the divisors of the factor.

    >>> square_sides(25)
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

    Within a square, *amounts* are compared and places are not. Of the observed and the predicted area of a transition from
    class *i* to class *j*, the smaller counts as hits. Of all observed and all predicted change away from *i*, the larger counts
    as the sum of hits, misses, wrong hits and false alarms (Pontius et al. 2008, Annals of Regional Science 42:11-37,
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
        ``(sides, 2)``: area of hits, and area of change. Add up windows first, then divide: the quotient is the Figure of Merit.
    """
    known = (reference != MISSING) & (truth != MISSING) & (predicted != MISSING)
    moved = np.flatnonzero(known & ((truth != reference) | (predicted != reference)))
    rows, cols = np.divmod(moved, reference.shape[1])
    start, seen, guess = (part.ravel()[moved] for part in (reference, truth, predicted))
    area = areas[rows]
    changed, meant_change = seen != start, guess != start
    out = np.zeros((len(squares), 2))
    for k, side in enumerate(squares):
        if side == 1:
            out[k] = area[changed & (seen == guess)].sum(), area.sum()
            continue
        height, width = (size // side for size in reference.shape)
        origin = ((rows // side) * width + cols // side) * n + start
        size, both = height * width * n, (area[changed], area[meant_change])
        lost, meant_lost = _amounts(origin[changed], origin[meant_change], *both, size)
        to, meant_to = origin * n + seen, origin * n + guess
        made, meant_made = _amounts(to[changed], meant_to[meant_change], *both, size * n)
        out[k] = np.minimum(made, meant_made).sum(), np.maximum(lost, meant_lost).sum()
    return out


def _amounts(
    first: NDArray[np.intp],
    second: NDArray[np.intp],
    first_area: NDArray[np.float64],
    second_area: NDArray[np.float64],
    size: int,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sum two sets of areas by key, over all ``size`` keys, or, if few keys occur, over those alone."""
    if size > 16 * (len(first) + len(second)):
        keys, place = np.unique(np.concatenate([first, second]), return_inverse=True)
        first, second, size = place[: len(first)], place[len(first) :], len(keys)
    return np.bincount(first, weights=first_area, minlength=size), np.bincount(second, weights=second_area, minlength=size)


def coarse_net(
    reference: NDArray[np.uint8], truth: NDArray[np.uint8], *, factor: int, n: int, areas: NDArray[np.float64]
) -> float:
    """Measure the net change of coarse cells: Σ_cells ½ Σ_k abs(area of class k in the truth − in the reference map).

    Divided by the gross change, this is the highest Figure of Merit of a map that holds only the net change of each coarse cell:
    all of its change hits, and the change that cancels within a coarse cell is missed.

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


class Flicker:
    """Where the maps of one window change a class and change it back within a few years, added up year by year.

    A cell flickers if it has a class, then others, and then the first again, all within ``within`` years. Only runs of three or
    more consecutive years count; a gap ends the history. The memory is that of ``within + 1`` years of the window.

    Parameters
    ----------
    names
        Of the maps, the observed one first.
    areas
        Area of each scored cell, ``(cells,)``.
    years
        Years whose maps will be added.
    within
        Longest time in years from a class to its return.
    """

    def __init__(self, names: Sequence[str], areas: NDArray[np.float64], years: Iterable[int], *, within: int = WITHIN) -> None:
        self._areas = areas
        self._years = {year for run in consecutive(sorted(set(years))) if len(run) > 2 for year in run}
        self._last: int | None = None
        self._past: dict[str, deque[NDArray[np.uint8]]] = {name: deque(maxlen=within) for name in names}
        self._known = {name: np.ones(areas.size, bool) for name in names}
        self._returned = {name: np.zeros(areas.size, bool) for name in names}

    def add(self, year: int, maps: Mapping[str, NDArray[np.uint8]]) -> None:
        """Add the maps of a year: class indices of the scored cells, ``(cells,)``, by name. Add years in ascending order."""
        if year not in self._years:
            return
        for name, past in self._past.items():
            if self._last != year - 1:
                past.clear()
            now = maps[name]
            self._known[name] &= now != MISSING
            if len(past) > 1:
                changed = np.flatnonzero(now != past[-1])
                returned = np.zeros(changed.size, bool)
                for before in list(past)[:-1]:
                    returned |= before[changed] == now[changed]
                self._returned[name][changed] |= returned
            past.append(now)
        self._last = year

    def sums(self) -> NDArray[np.float64]:
        """Give areas ``(names, 3)``, all 0 if fewer than three years are consecutive.

        Of the cells that have a class in all years, in the map and in the observed one: their area, the area that flickers at
        least once, and the area that flickers where the observed map does not.
        """
        out = np.zeros((len(self._past), 3))
        observed = next(iter(self._past))
        for total, name in zip(out, self._past if self._years else (), strict=False):
            valid = self._known[name] & self._known[observed]
            own = valid & self._returned[name]
            total += [float(self._areas[part].sum()) for part in (valid, own, own & ~self._returned[observed])]
        return out


def consecutive(years: Sequence[int]) -> list[list[int]]:
    """Split ascending years into runs without a gap.

    >>> consecutive([2000, 2001, 2003])
    [[2000, 2001], [2003]]
    """
    out: list[list[int]] = []
    for year in years:
        if out and out[-1][-1] == year - 1:
            out[-1].append(year)
        else:
            out.append([year])
    return out
