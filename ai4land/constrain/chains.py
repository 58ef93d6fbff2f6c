"""Move cells between classes along the cheapest chains, in many coarse cells at once.

A class with an excess cell need not give it to the class that lacks one directly: it may be cheaper to give it to a third class,
which gives up another. In each coarse cell the cheapest chains are shortest paths in a graph of the classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_FRACTION = 6
"""One in so many of the remaining excess cells moves in a round; the last ones move one by one."""


def pass_on(
    values: NDArray[np.float64],
    place: NDArray[np.int64],
    classes: NDArray[np.int64],
    over: NDArray[np.int64],
    *,
    limit: float,
) -> None:
    """Move cells from classes with too many to classes with too few along the cheapest chains, in place.

    In each round every coarse cell moves some cells along its cheapest chain. Potentials rise by the lengths of the chains,
    which keeps all costs non-negative (successive shortest paths with potentials: Ahuja, Magnanti & Orlin 1993, Network
    Flows, section 9.7). Moving one cell a round would be optimal; moving several saves rounds.

    Parameters
    ----------
    values
        Score less price, ``(cell, class)``.
    place
        Index of the coarse cell of each cell, ascending.
    classes
        Class of each cell; modified.
    over
        Cells of each class less its quota, ``(coarse cell, class)``; modified. What no chain can move remains.
    limit
        Greatest cost of a chain.
    """
    n = values.shape[1]
    potential = np.zeros(over.shape)
    live = np.any(over > 0, axis=1)
    rows = np.arange(place.size)
    while live.any():
        rows = rows[live[place[rows]]]
        ids = np.flatnonzero(live)
        rows = rows[np.lexsort((rows, classes[rows], place[rows]))]
        s, a = np.searchsorted(ids, place[rows]), classes[rows]
        group = s * n + a
        start = np.flatnonzero(np.r_[True, np.diff(group) != 0]) if group.size else group
        value = values[rows] + potential[ids[s]]
        cost = np.maximum(value[np.arange(rows.size), a][:, None] - value, 0.0)
        arcs = np.full((ids.size * n, n), np.inf)
        count = np.zeros(ids.size * n, np.int64)
        if group.size:
            arcs[group[start]] = np.minimum.reduceat(cost, start, axis=0)
            count[group[start]] = np.diff(np.r_[start, group.size])
        source, target, length, before = _chains(arcs.reshape(-1, n, n), over[ids])
        reach = np.where(over[ids] < 0, length, np.inf).min(axis=1)
        good = reach < limit
        potential[ids] += np.where(good[:, None], np.minimum(length, reach[:, None]), 0.0)
        here = np.arange(ids.size)
        many = np.maximum(np.maximum(over[ids], 0).sum(axis=1) // _FRACTION, 1)
        many = np.minimum(many, np.minimum(over[ids, source], -over[ids, target]))
        node, steps = target.copy(), []
        while (going := good & (before[here, node] >= 0)).any():
            prior = np.where(going, before[here, node], n)
            many = np.where(going, np.minimum(many, count.reshape(-1, n)[here, np.minimum(prior, n - 1)]), many)
            steps.append((prior, node))
            node = np.where(going, prior, node)
        for prior, to in steps:
            hit = np.flatnonzero(a == prior[s])
            hit = hit[np.lexsort((hit, cost[hit, to[s[hit]]], s[hit]))]
            rank = np.arange(hit.size) - np.searchsorted(s[hit], s[hit], side="left")
            hit = hit[rank < many[s[hit]]]
            classes[rows[hit]] = to[s[hit]]
        moved = np.where(good, many, 0)
        over[ids, source] -= moved
        over[ids, target] += moved
        live[ids] = good & (over[ids] > 0).any(axis=1)


def _chains(
    arcs: NDArray[np.float64], over: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Find the cheapest chain from a class with too many cells to one with too few in each coarse cell (Bellman 1958).

    Returns
    -------
    source, target
        First and last class of the chain.
    length
        Cost of the cheapest chain to each class.
    before
        Previous class on the chain to each class; -1 at its start.
    """
    here = np.arange(len(over))
    length, before = np.where(over > 0, 0.0, np.inf), np.full(over.shape, -1)
    for _ in range(over.shape[1] - 1):
        through = length[:, :, None] + arcs
        via = through.argmin(axis=1)
        shorter = np.take_along_axis(through, via[:, None], axis=1)[:, 0]
        better = shorter < length
        if not better.any():
            break
        length, before = np.where(better, shorter, length), np.where(better, via, before)
    target = np.where(over < 0, length, np.inf).argmin(axis=1)
    source = target
    for _ in range(over.shape[1]):
        prior = before[here, source]
        source = np.where(prior >= 0, prior, source)
    return source, target, length, before
