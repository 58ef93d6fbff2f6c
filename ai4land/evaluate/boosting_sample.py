"""Training data of the suitability: the features of a cell, and a sample of the training cells and years.

The fit and the prediction use the same functions to make features. The sample is drawn evenly over shards, cells and years;
with a reference map, changed cells are drawn more often, and weights correct for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ai4land.errors import DataError
from ai4land.grid import Window, centres
from ai4land.legend import MISSING
from ai4land.model.features import FeatureSpec
from ai4land.store.read import Source

REACHES = (1, 3)
"""Reach in cells of the neighbourhoods, 3x3 and 7x7, whose class shares are features."""
HALO = max(REACHES)
MAX_SHARDS = 64
"""Most shards to sample from; if there are more, this many are drawn first."""
MAX_VISITS = 512
"""Most visits, shards times pairs of years, to sample from; if there are more, about this many are drawn first."""
MAX_CATEGORIES = 255
"""Most categories of a categorical feature; a static map with more is used as a number."""

Floats = NDArray[np.float32]
Cells = NDArray[np.intp]


@dataclass(frozen=True)
class Sample:
    """Features, class index and weight of the sampled cells; ``classes`` are those in the training maps."""

    columns: Floats
    target: NDArray[np.uint8]
    weight: NDArray[np.float64]
    classes: tuple[int, ...]


def draw_sample(
    source: Source,
    *,
    cells: NDArray[np.bool_],
    pairs: list[tuple[int, int]],
    spec: FeatureSpec,
    with_reference: bool,
    samples: int,
    rng: np.random.Generator,
) -> Sample:
    """Draw the training cells and read their features; for the parameters see ``fit_suitability``.

    Raises
    ------
    DataError
        If no training cell has a class in the years of training.
    """
    tours = _tours(source, cells, pairs, rng)
    sizes, classes = _count(source, cells, tours, with_reference)
    if not sizes.sum():
        years = sorted({year for pair in pairs for year in pair})
        raise DataError(
            f"no training cell has a class in {years[0]}-{years[-1]}, expected at least one; check the split and the mask"
        )
    chosen = _draw(sizes.sum(axis=0), samples, rng)
    return _gather(source, cells, tours, sizes, chosen, spec=spec, classes=classes, with_reference=with_reference)


def is_category(spec: FeatureSpec) -> list[bool]:
    """Say which static maps are categorical features of the trees."""
    return [0 < len(f.codes) <= MAX_CATEGORIES for f in spec.features]


class Place:
    """The static maps of a window, and the position."""

    def __init__(self, source: Source, window: Window, spec: FeatureSpec, *, position: bool) -> None:
        self.static = np.asarray(source.static[(slice(None), *window.slices)]).reshape(len(spec.features), -1)
        self.window, self.spec = window, spec
        self.position = centres(source.grid.fine) if position else None

    def columns(self, at: Cells) -> Floats:
        """Features at flat indices, ``(cell, feature)``; a category is its index in the spec, NaN where it is unknown."""
        out: list[NDArray[Any]] = []
        for feature, field, category in zip(self.spec.features, self.static, is_category(self.spec), strict=True):
            values = field[at]
            if category:
                codes = np.array(feature.codes, dtype=values.dtype)
                found = np.searchsorted(codes, values).clip(0, codes.size - 1)
                values = np.where(codes[found] == values, found, np.nan)
            out.append(values)
        if self.position is not None:
            row, col = np.divmod(at, self.window.width)
            out += [self.position[0][self.window.row + row], self.position[1][self.window.col + col]]
        return np.stack(out, axis=1).astype(np.float32) if out else np.empty((at.size, 0), dtype=np.float32)


class Around:
    """The class of each cell of a map, and the class shares of the cells around it.

    Cells are counted in integers, so the shares are bit for bit the same in every window.
    """

    def __init__(self, index: NDArray[np.uint8], classes: tuple[int, ...]) -> None:
        lookup = np.full(256, np.nan, dtype=np.float32)
        lookup[list(classes)] = np.arange(len(classes))
        self.own = lookup[index[HALO:-HALO, HALO:-HALO]].ravel()
        self.counts = [np.stack([_box_sum(index == k, reach).ravel() for k in classes]) for reach in REACHES]
        self.known = [_box_sum(index != MISSING, reach).ravel() for reach in REACHES]

    def columns(self, at: Cells) -> Floats:
        """Features at flat indices, ``(cell, feature)``; NaN where no cell has a class."""
        out: list[Floats] = [self.own[at][:, None]]
        for counts, known in zip(self.counts, self.known, strict=True):
            n = known[at].astype(np.float32)
            n[n == 0] = np.nan
            out.append((counts[:, at].T / n[:, None]).astype(np.float32))
        return np.concatenate(out, axis=1, dtype=np.float32)


def _box_sum(there: NDArray[np.bool_], reach: int) -> NDArray[np.uint8]:
    """Count the cells within ``reach`` rows and columns, for a window without its halo."""
    side, cut = 2 * reach + 1, HALO - reach
    inner = there[cut : there.shape[0] - cut, cut : there.shape[1] - cut].astype(np.uint8)
    rows, cols = inner.shape[0] - side + 1, inner.shape[1] - side + 1
    along = sum((inner[:, i : i + cols] for i in range(1, side)), inner[:, :cols])
    return np.asarray(sum((along[i : i + rows] for i in range(1, side)), along[:rows]), dtype=np.uint8)


def change_columns(now: Floats, then: Floats, lead: NDArray[Any]) -> Floats:
    """The states, their change since the reference map, and the lead in years: ``(cell, feature)``."""
    return np.concatenate([now, now - then, lead[:, None]], axis=1, dtype=np.float32)


def coarse_place(window: Window, at: Cells, factor: int) -> tuple[Window, tuple[Cells, Cells]]:
    """Give the coarse cells of a window, and the coarse row and column of flat indices within them."""
    first = window.row // factor, window.col // factor
    last = (window.row + window.height - 1) // factor, (window.col + window.width - 1) // factor
    row, col = np.divmod(at, window.width)
    cells = Window(*first, last[0] - first[0] + 1, last[1] - first[1] + 1)
    return cells, ((window.row + row) // factor - first[0], (window.col + col) // factor - first[1])


Tour = tuple[Window, list[tuple[int, int]]]
"""A shard, and the pairs of years to visit there."""


def _tours(source: Source, cells: NDArray[np.bool_], pairs: list[tuple[int, int]], rng: np.random.Generator) -> list[Tour]:
    """Draw the shards and the pairs of years to visit; all of them in a small store."""
    f = source.grid.factor
    windows = [
        w for w in source.grid.shards()
        if cells[w.row // f : (w.row + w.height) // f, w.col // f : (w.col + w.width) // f].any()
    ]  # fmt: skip
    kept = sorted(rng.permutation(len(windows))[:MAX_SHARDS])
    count = max(1, MAX_VISITS // max(len(kept), 1))
    return [(windows[i], [pairs[j] for j in sorted(rng.permutation(len(pairs))[:count])]) for i in kept]


def _walk(
    source: Source, cells: NDArray[np.bool_], tours: list[Tour], with_reference: bool
) -> Iterator[tuple[Window, int, int, NDArray[np.uint8], NDArray[np.uint8], list[Cells]]]:
    """Visit the shards and the pairs of years.

    Yields
    ------
    window, start, year, known, target, strata
        The map of ``start`` with the halo, the map of ``year`` without it, both ``MISSING`` beyond the training cells; and
        the flat indices of the cells to draw from: those that changed and those that did not, or all of them.
    """
    for window, pairs in tours:
        outer = window.pad(HALO)
        hidden = ~_inside(source, outer, cells)
        inner = (slice(HALO, -HALO), slice(HALO, -HALO))
        mask = np.asarray(source.mask[window.slices], dtype=bool)
        maps = {}
        for year in {year for pair in pairs for year in pair}:
            maps[year] = source.map_of(year, outer)
            maps[year][hidden] = MISSING
        for start, year in pairs:
            known, target = maps[start], maps[year][inner]
            there = mask & (target != MISSING) & (known[inner] != MISSING)
            changed = known[inner] != target
            groups = [there & changed, there & ~changed] if with_reference else [there]
            yield window, start, year, known, target, [np.flatnonzero(g) for g in groups]


def _inside(source: Source, window: Window, cells: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mark the fine cells of a window that lie in training cells; the window may reach beyond the grid."""
    f = source.grid.factor
    row = (np.arange(window.row, window.row + window.height) // f).clip(0, cells.shape[0] - 1)
    col = np.arange(window.col, window.col + window.width) // f
    col = col % cells.shape[1] if source.grid.wraps else col.clip(0, cells.shape[1] - 1)
    return np.asarray(cells[row][:, col])


def _count(
    source: Source, cells: NDArray[np.bool_], tours: list[Tour], with_reference: bool
) -> tuple[NDArray[np.int64], tuple[int, ...]]:
    """Count the cells to draw from, ``(visit, stratum)``, and list the classes that occur."""
    sizes, present = [], np.zeros(256, dtype=bool)
    for _, _, _, known, target, strata in _walk(source, cells, tours, with_reference):
        sizes.append([s.size for s in strata])
        present[np.unique(known)] = True
        present[np.unique(target)] = True
    present[MISSING] = False
    return np.array(sizes, dtype=np.int64).reshape(-1, 1 + with_reference), tuple(np.flatnonzero(present).tolist())


def _draw(totals: NDArray[np.int64], samples: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Draw numbers from each stratum; of two, half of the sample from each as far as it has enough cells."""
    takes = [min(int(totals[0]), samples)]
    if totals.size == 2:
        first = min(int(totals[0]), max(samples // 2, samples - int(totals[1])))
        takes = [first, min(int(totals[1]), samples - first)]
    return [np.sort(rng.choice(int(n), size=k, replace=False)) for n, k in zip(totals, takes, strict=True)]


def _gather(
    source: Source,
    cells: NDArray[np.bool_],
    tours: list[Tour],
    sizes: NDArray[np.int64],
    chosen: list[NDArray[np.int64]],
    *,
    spec: FeatureSpec,
    classes: tuple[int, ...],
    with_reference: bool,
) -> Sample:
    """Read the features of the chosen cells; the states last, year by year."""
    f, ends = source.grid.factor, np.cumsum(sizes, axis=0)
    odds = [total / max(part.size, 1) for total, part in zip(sizes.sum(axis=0), chosen, strict=True)]
    columns: list[Floats] = []
    target, weight, place, years = [], [], [], []
    last: tuple[Window | None, int] = (None, 0)
    for i, (window, start, year, known, seen, strata) in enumerate(_walk(source, cells, tours, with_reference)):
        picks = [s[_within(c, e - s.size, e)] for s, c, e in zip(strata, chosen, ends[i], strict=True)]
        at = np.concatenate(picks)
        if not at.size:
            continue
        if last[0] != window:
            static = Place(source, window, spec, position=not with_reference)
        if with_reference and last != (window, start):
            around = Around(known, classes)
        last = window, start
        columns.append(np.concatenate([static.columns(at), around.columns(at)], axis=1) if with_reference else static.columns(at))
        target.append(seen.ravel()[at])
        weight.append(np.repeat(odds, [p.size for p in picks]))
        row, col = np.divmod(at, window.width)
        place.append(np.stack([(window.row + row) // f, (window.col + col) // f]))
        years.append(np.repeat([[start], [year]], at.size, axis=1))
    row, col = np.concatenate(place, axis=1)
    start_of, year_of = np.concatenate(years, axis=1)
    whole = Window(0, 0, *cells.shape)
    now, then = np.empty((2, row.size, len(spec.states)), dtype=np.float32)
    for year in np.unique([start_of, year_of]).tolist():
        plane = source.states_of(year, whole)
        for states, of in ((now, year_of), (then, start_of)):
            hit = of == year
            states[hit] = plane[:, row[hit], col[hit]].T
    columns_of_states = change_columns(now, then, year_of - start_of) if with_reference else now
    weights = np.concatenate(weight)
    return Sample(
        np.concatenate([np.concatenate(columns), columns_of_states], axis=1),
        np.concatenate(target),
        weights / weights.mean(),
        classes,
    )


def _within(chosen: NDArray[np.int64], first: int, end: int) -> NDArray[np.int64]:
    """Those of a stratum's chosen numbers that belong to one visit, counted from its first cell."""
    low, high = np.searchsorted(chosen, [first, end])
    return chosen[low:high] - first
