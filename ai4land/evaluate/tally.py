"""What is compared (:class:`Maps`), and the sums that its scores are computed from, window by window.

A window's mask, reference map and truth are read once a year and serve all predictions and scores. The sums of windows and of
years add up (:class:`Tally`), so no map is ever held whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ai4land.constrain.totals import mapped_shares
from ai4land.errors import DataError
from ai4land.evaluate.bootstrap import BlockSums, blocks_of
from ai4land.evaluate.change import Flicker, coarse_net, merit_parts, square_sides
from ai4land.evaluate.reliability import Reliability
from ai4land.evaluate.scores import coarse_errors, observed_change, ratio, score_sums
from ai4land.grid import Grid, Window
from ai4land.legend import MISSING

TRUTH = "observed"
"""Name of the truth among the maps."""
Classes = Callable[[int, Window], NDArray[np.uint8]]
"""Reads the class indices of a year in a window, ``(rows, columns)``, ``MISSING`` where there is no class."""
Probabilities = Callable[[int, Window], NDArray[np.floating]]
"""Reads a probability of each cell of a window in a year, ``(rows, columns)``, NaN where there is none."""
CONFIDENCE, CHANGE = "confidence", "change probability"


@dataclass(frozen=True)
class Maps:
    """Predictions, the truth that they are compared with, and where.

    Attributes
    ----------
    grid
        Of the maps.
    classes
        Names of the classes, in the order of their indices.
    observed
        Reads the observed maps.
    predictions
        Read the predicted maps, by name. Each is read once a year and window, all years of a window in a row.
    where
        Reads which cells of a window are scored, bool ``(rows, columns)``.
    reference
        Year of the reference map, an observed one; None if the predictions start from no map: then change is not scored.
    wanted
        Reads the class shares of the scenario for a year and a window, ``(class, coarse rows, coarse columns)``. None, for
        all or for a year: no coarse error.
    weights
        Whether the wanted shares are of the area or of the number of cells. All other scores are weighted by area.
    confidence, change_probability
        Read, by names of predictions, the probability of the mapped class, and that of a class other than the reference
        map's.
    """

    grid: Grid
    classes: tuple[str, ...]
    observed: Classes
    predictions: Mapping[str, Classes]
    where: Callable[[Window], NDArray[np.bool_]]
    reference: int | None = None
    wanted: Callable[[int, Window], NDArray[np.floating] | None] | None = None
    weights: Literal["area", "cells"] = "area"
    confidence: Mapping[str, Probabilities] = field(default_factory=dict)
    change_probability: Mapping[str, Probabilities] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of all maps, the truth first."""
        return [TRUTH, *self.predictions]

    @property
    def probabilities(self) -> dict[str, Mapping[str, Probabilities]]:
        """Readers of probabilities by kind and prediction."""
        return {CONFIDENCE: self.confidence, CHANGE: self.change_probability}

    def read(self, name: str, year: int, window: Window) -> NDArray[np.uint8]:
        """Read a map of a year in a window.

        Raises
        ------
        DataError
            If the map has another shape than the window, or an index is neither a class nor ``MISSING``.
        """
        index = (self.observed if name == TRUTH else self.predictions[name])(year, window)
        if index.shape != (window.height, window.width):
            raise DataError(
                f"{name} map of {year} is {index.shape}, expected {(window.height, window.width)}; cut it from the window {window}"
            )
        if ((index >= len(self.classes)) & (index != MISSING)).any():
            raise DataError(
                f"{name} map of {year} holds index {int(index[index != MISSING].max())}, expected 0..{len(self.classes) - 1} or {MISSING}; "
                "encode its codes with the legend"
            )
        return index


@dataclass
class Change:
    """Observed change summed over windows: area by class before and after, and the net change of coarse cells."""

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
    """Sums over windows of one or more years, for the truth and all predictions.

    ``blocks`` holds by block and name the ``3 n + 8`` sums of :func:`ai4land.evaluate.bootstrap.all_scores`; ``merit`` by name and side
    the sums of :func:`ai4land.evaluate.change.merit_parts`.
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
        self.merit = np.zeros((len(self.names), len(square_sides(self.factor)), 2))

    def add(self, other: Tally) -> None:
        """Add the sums of another tally of the same names."""
        self.change.pair += other.change.pair
        self.change.net += other.change.net
        self.blocks.add(*other.blocks.merged())
        self.merit += other.merit


class Sums:
    """All sums over windows: a tally of each year, flicker (:meth:`Flicker.sums`), and the reliability of probabilities.

    Parameters
    ----------
    maps
        To compare.
    years
        To score.
    """

    def __init__(self, maps: Maps, years: Iterable[int]) -> None:
        self.years = {year: Tally(maps.names, len(maps.classes), maps.grid.factor) for year in years}
        self.flicker = np.zeros((len(maps.names), 3))
        self.trust = {kind: {name: Reliability() for name in given} for kind, given in maps.probabilities.items()}


@dataclass(frozen=True)
class Site:
    """What is the same in all years of a window.

    Attributes
    ----------
    window
        Of whole coarse cells.
    scored
        Cells that are scored, ``(rows, columns)``.
    start
        Class indices of the reference map; None without one.
    areas
        Area of a cell of each row.
    ids, place
        Blocks of the bootstrap, see :func:`ai4land.evaluate.bootstrap.blocks_of`.
    min_coverage
        Share of a coarse cell that must be scored for it to count in the coarse error.
    """

    window: Window
    scored: NDArray[np.bool_]
    start: NDArray[np.uint8] | None
    areas: NDArray[np.float64]
    ids: NDArray[np.intp]
    place: NDArray[np.intp]
    min_coverage: float


def add_window(sums: Sums, maps: Maps, window: Window, *, block: int, min_coverage: float) -> None:
    """Add all years of a window.

    Parameters
    ----------
    sums
        To add to.
    maps
        To compare.
    window
        Of whole coarse cells inside the grid.
    block
        Coarse cells along one side of a block of the bootstrap; blocks are counted in the whole grid.
    min_coverage
        See :class:`Site`.
    """
    scored = maps.where(window)
    if not scored.any():
        return
    start = None if maps.reference is None else maps.read(TRUTH, maps.reference, window)
    areas = maps.grid.cell_areas()[window.slices[0]]
    site = Site(window, scored, start, areas, *blocks_of(window, maps.grid, block), min_coverage)
    every = sorted({*sums.years, *([] if maps.reference is None else [maps.reference])})
    cells = np.flatnonzero(scored)
    flicker = Flicker(maps.names, areas[cells // window.width], every)
    for year in every:
        if year not in sums.years and start is not None:
            flicker.add(year, dict.fromkeys(maps.names, start.ravel()[cells]))
            continue
        read = {name: maps.read(name, year, window) for name in maps.names}
        read[TRUTH] = np.where(scored, read[TRUTH], np.uint8(MISSING))
        _add_scores(sums.years[year], maps, site, read, year)
        _add_trust(sums.trust, maps, site, read, year)
        flicker.add(year, {name: index.ravel()[cells] for name, index in read.items()})
    sums.flicker += flicker.sums()


def _add_scores(sums: Tally, maps: Maps, site: Site, read: Mapping[str, NDArray[np.uint8]], year: int) -> None:
    """Add one year of a window to its tally."""
    n, f, start, seen = sums.n, sums.factor, site.start, read[TRUTH]
    cells = _known(start, seen)
    rows, cols = np.divmod(cells, site.window.width)
    group, area, true = site.place[rows // f, cols // f], site.areas[rows], seen.ravel()[cells]
    before = None if start is None else start.ravel()[cells]
    held = np.bincount(group, weights=area, minlength=len(site.ids))
    wanted = None if maps.wanted is None else maps.wanted(year, site.window)
    out = np.zeros((len(site.ids), len(read), 3 * n + 8))
    for i, (name, index) in enumerate(read.items()):
        guess = index.ravel()[cells]
        out[:, i, :-4] = score_sums(true, guess, before, n=n, areas=area, group=group, groups=len(site.ids))
        lacking = np.flatnonzero(guess == MISSING)
        out[:, i, -2] = np.bincount(group[lacking], weights=area[lacking], minlength=len(site.ids))
        out[:, i, -1] = held
        if wanted is not None:
            out[:, i, -4:-2] = _coarse_sums(index, wanted, maps, site, year)
        if start is not None and name != TRUTH:
            sums.merit[i] += merit_parts(start, seen, index, squares=square_sides(f), n=n, areas=site.areas)
    sums.blocks.add(site.ids, out)
    if before is not None and start is not None:
        sums.change.pair += np.bincount(before.astype(np.intp) * n + true, weights=area, minlength=n * n).reshape(n, n)
        sums.change.net += coarse_net(start, seen, factor=f, n=n, areas=site.areas)


def _coarse_sums(
    index: NDArray[np.uint8], wanted: NDArray[np.floating], maps: Maps, site: Site, year: int
) -> NDArray[np.float64]:
    """Error of a map against the scenario, and its weight, by block: ``(blocks, 2)``."""
    n, f = len(maps.classes), maps.grid.factor
    if wanted.shape != (n, *site.place.shape):
        raise DataError(
            f"wanted shares of {year} are {wanted.shape}, expected {(n, *site.place.shape)}; "
            f"give one share a class and coarse cell of the window {site.window}"
        )
    shares, coverage = mapped_shares(index, site.scored, n=n, factor=f, weights=maps.weights, areas=site.areas)
    size = np.ones(len(coverage)) if maps.weights == "cells" else site.areas.reshape(-1, f).sum(axis=1) * f
    parts = coarse_errors(shares, wanted, np.where(coverage >= site.min_coverage, size[:, None] * coverage, 0.0))
    return np.stack([np.bincount(site.place.ravel(), weights=p.ravel(), minlength=len(site.ids)) for p in parts], axis=1)


def _add_trust(
    trust: Mapping[str, Mapping[str, Reliability]], maps: Maps, site: Site, read: Mapping[str, NDArray[np.uint8]], year: int
) -> None:
    """Add the probabilities of one year of a window, and whether the events they speak of came true."""
    seen, start, window = read[TRUTH].ravel(), site.start, site.window
    for kind, given in maps.probabilities.items():
        for name, chance in given.items():
            guess, change = read[name].ravel(), kind == CHANGE
            cells = _known(start, seen)
            cells = cells if change else cells[guess[cells] != MISSING]
            values = np.asarray(chance(year, window))
            if values.shape != (window.height, window.width):
                raise DataError(
                    f"{kind} of {name} in {year} is {values.shape}, expected {(window.height, window.width)}; give one a cell"
                )
            event = (seen != start.ravel())[cells] if change and start is not None else (seen == guess)[cells]
            area = site.areas[cells // window.width]
            trust[kind][name].add(values.ravel()[cells], event, area, source=f"{kind} of {name} in {year}")


def _known(start: NDArray[np.uint8] | None, seen: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Flat indices of the cells with a class in the reference map, where there is one, and in the truth."""
    known = seen.ravel() != MISSING
    return np.flatnonzero(known if start is None else known & (start.ravel() != MISSING))
