"""What the evaluation adds up, window by window: areas per block, change, and the reliability of probabilities.

Sums of windows and of years add up (:class:`Tally`), so that no map is held whole and all scores can be computed at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ai4land.bootstrap import BlockSums, blocks_of
from ai4land.calibration import Reliability
from ai4land.change import coarse_net, merit_parts, sides
from ai4land.errors import DataError
from ai4land.grid import Grid, Window
from ai4land.legend import MISSING
from ai4land.scores import class_shares, coarse_parts, observed_change, ratio, score_sums

TRUTH = "observed"
"""Name of the truth among the maps."""
Probabilities = Callable[[int, Window], NDArray[np.floating]]
"""Reads a probability of each cell of a window in a year, NaN where there is none."""


@dataclass
class Change:
    """Observed change that has been added up: class before and after, and the net change of coarse cells."""

    pair: NDArray[np.float64]
    net: float = 0.0

    def table(self) -> dict[str, float | None]:
        """Give the change as shares of the area, and the bound on the Figure of Merit of maps of net changes."""
        change = observed_change(self.pair)
        area = float(self.pair.sum())
        gross = area * (change["gross"] or 0.0)
        return {**change, "coarse_net": ratio(self.net, area), "figure_of_merit_bound": ratio(self.net, gross)}


@dataclass
class Tally:
    """What has been added up of all predictions and of the truth.

    ``blocks`` holds by block and name the ``3 n + 8`` sums of :func:`ai4land.bootstrap.all_scores`; ``merit`` by name and side
    the parts of :func:`ai4land.change.merit_parts`.
    """

    names: list[str]
    n: int
    factor: int
    change: Change = field(init=False)
    blocks: BlockSums = field(init=False)
    merit: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.change = Change(np.zeros((self.n, self.n)))
        self.blocks = BlockSums((len(self.names), 3 * self.n + 8))
        self.merit = np.zeros((len(self.names), len(sides(self.factor)), 2))

    def add(self, other: Tally) -> None:
        """Add what another tally of the same names has added up."""
        self.change.pair += other.change.pair
        self.change.net += other.change.net
        self.blocks.add(*other.blocks.merged())
        self.merit += other.merit


def add_window(
    sums: Tally,
    start: NDArray[np.uint8] | None,
    scored: NDArray[np.bool_],
    maps: Mapping[str, NDArray[np.uint8]],
    *,
    grid: Grid,
    window: Window,
    block: int,
    coarse: tuple[NDArray[np.floating], Literal["area", "cells"], float] | None,
) -> None:
    """Add one window of one year.

    Parameters
    ----------
    sums
        To add to.
    start
        Class indices of the reference map, None where there is none.
    scored
        Cells that are scored; the truth is ``MISSING`` elsewhere.
    maps
        Class indices of the truth and of the predictions, in the order of the names of ``sums``.
    grid, window, block
        Of the maps; blocks are counted in the whole grid.
    coarse
        Class shares of the scenario in the window, how they are weighted, and the coverage that a coarse cell needs to count;
        None where there is no scenario.
    """
    n, f, areas, seen = sums.n, grid.factor, grid.cell_areas()[window.slices[0]], maps[TRUTH]
    cells = _known(start, seen)
    rows, cols = np.divmod(cells, seen.shape[1])
    ids, place = blocks_of(window, grid, block)
    group, area, true = place[rows // f, cols // f], areas[rows], seen.ravel()[cells]
    before = None if start is None else start.ravel()[cells]
    held = np.bincount(group, weights=area, minlength=len(ids))
    out = np.zeros((len(ids), len(maps), 3 * n + 8))
    for i, (name, index) in enumerate(maps.items()):
        guess = index.ravel()[cells]
        out[:, i, :-4] = score_sums(true, guess, before, n=n, areas=area, group=group, groups=len(ids))
        gone = np.flatnonzero(guess == MISSING)
        out[:, i, -2] = np.bincount(group[gone], weights=area[gone], minlength=len(ids))
        out[:, i, -1] = held
        if coarse is not None:
            target, kind, least = coarse
            shares, coverage = class_shares(index, scored, n=n, factor=f, weights=kind, areas=areas)
            size = np.ones(len(coverage)) if kind == "cells" else areas.reshape(-1, f).sum(axis=1) * f
            parts = coarse_parts(shares, target, np.where(coverage >= least, size[:, None] * coverage, 0.0))
            out[:, i, -4:-2] = np.stack(
                [np.bincount(place.ravel(), weights=p.ravel(), minlength=len(ids)) for p in parts], axis=1
            )
        if start is not None and name != TRUTH:
            sums.merit[i] += merit_parts(start, seen, index, squares=sides(f), n=n, areas=areas)
    sums.blocks.add(ids, out)
    if before is not None and start is not None:
        sums.change.pair += np.bincount(before.astype(np.intp) * n + true, weights=area, minlength=n * n).reshape(n, n)
        sums.change.net += coarse_net(start, seen, factor=f, n=n, areas=areas)


def add_trust(
    trust: Mapping[str, Mapping[str, Reliability]],
    chances: Mapping[str, Mapping[str, Probabilities]],
    start: NDArray[np.uint8] | None,
    maps: Mapping[str, NDArray[np.uint8]],
    *,
    grid: Grid,
    window: Window,
    year: int,
) -> None:
    """Add the probabilities of one window of one year, and whether what they speak of came true."""
    seen = maps[TRUTH].ravel()
    known = _known(start, seen)
    for kind, given in chances.items():
        for name, read in given.items():
            guess, change = maps[name].ravel(), kind == "change probability"
            cells = known if change else known[guess[known] != MISSING]
            values = np.asarray(read(year, window))
            if values.shape != (window.height, window.width):
                raise DataError(
                    f"{kind} of {name} in {year} is {values.shape}, expected {(window.height, window.width)}; give one a cell"
                )
            event = (seen != start.ravel())[cells] if change and start is not None else (seen == guess)[cells]
            area = grid.cell_areas()[window.slices[0]][cells // window.width]
            trust[kind][name].add(values.ravel()[cells], event, area, source=f"{kind} of {name} in {year}")


def _known(start: NDArray[np.uint8] | None, seen: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Places of the cells with a class in the reference map, where there is one, and in the truth."""
    known = seen.ravel() != MISSING
    return np.flatnonzero(known if start is None else known & (start.ravel() != MISSING))
