"""What the scenario says that a map should add up to in each coarse cell.

Scenario and map often define a class differently. Then the scenario's level says little, but its change counts: by default
the change of the class shares since the year of the reference map is put on top of what the reference map holds. Where both
define the classes alike this is the scenario itself. The other way is to take the scenario's level as it is.

LUH2 gives shares of the whole cell, sea included, and a map need not map the sea. A change is therefore scaled from the
scenario's land to the land that is mapped, and of a level the part that is not mapped is taken to be water first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ai4land.crosswalk import Crosswalk
from ai4land.grid import block_sum
from ai4land.quotas import add_change, level_quotas
from ai4land.scores import mapped_shares

Method = Literal["change", "level", "none"]
Shares = NDArray[np.float64]

STATEMENTS: dict[Method, str] = {
    "change": "adds up in each coarse cell to the reference map plus the scenario's change of class shares since its year",
    "level": "adds up in each coarse cell to the scenario's class shares",
    "none": "the scenario's totals are not imposed",
}
"""What is said of the totals in a cube's metadata."""
_LEAST_LAND = 0.01
"""Share of land below which the scenario's change in a coarse cell is not scaled up any further."""


class Totals:
    """Class totals of a window of whole coarse cells, year by year.

    Parameters
    ----------
    states
        Reads the scenario's states of a year in the window, ``(state, coarse rows, coarse columns)``, NaN for none.
    names, crosswalk
        Names of the states, and weights from them to the classes.
    mapped
        Cells that are mapped, ``(rows, columns)``.
    factor
        Fine cells along one side of a coarse cell.
    areas
        Area of a cell of each row, ``(rows,)``, if the scenario's shares are of the area; None: of the number of cells.
    reference, reference_year
        Class indices of the reference map, ``(rows, columns)``, and its year; None without one: then the level counts.
    level
        Take the scenario's level even with a reference map.

    Attributes
    ----------
    cells
        Mapped cells of each coarse cell, ``(coarse rows, coarse columns)``.
    coverage
        Share of each coarse cell that is mapped, same shape.
    reference_shares
        Class shares of the mapped part in the reference map, by the scenario's weights (False) and by cells (True); empty
        without a reference map.
    start
        Shares that the scenario gives in its year.
    """

    def __init__(
        self,
        states: Callable[[int], NDArray[np.floating]],
        *,
        names: list[str],
        crosswalk: Crosswalk,
        mapped: NDArray[np.bool_],
        factor: int,
        areas: NDArray[np.float64] | None,
        reference: NDArray[np.uint8] | None,
        reference_year: int | None,
        level: bool = False,
    ) -> None:
        self._states, self._weights = states, crosswalk.for_states(names)
        self._last: tuple[int, Shares] | None = None
        self.cells = block_sum(mapped.astype(np.float64), factor).astype(np.int64)
        self.factor, self.areas = factor, areas
        self.level = level or reference is None or reference_year is None
        weights = np.ones(len(mapped)) if areas is None else areas
        whole = block_sum(np.broadcast_to(weights[:, None], mapped.shape), factor)
        self.coverage = block_sum(np.where(mapped, weights[:, None], 0.0), factor) / whole
        self._water = np.zeros(crosswalk.matrix.shape[1])
        if len(self._weights.states) > len(names):
            self._water = self._weights.matrix[-1]
        self.reference_shares: dict[bool, Shares] = {}
        if reference is not None and reference_year is not None:
            n = len(self._water)
            for by_cells in (False, True):
                kind: Literal["area", "cells"] = "cells" if by_cells or areas is None else "area"
                share = mapped_shares(reference, mapped, n=n, factor=factor, weights=kind, areas=areas)[0]
                self.reference_shares[by_cells] = share
            self.start = self.scenario(reference_year)

    def scenario(self, year: int) -> Shares:
        """Shares of the coarse cell that the scenario gives, ``(class, coarse rows, coarse columns)``; not to be changed."""
        if self._last is None or self._last[0] != year:
            self._last = year, self._weights.to_classes(self._states(year))
        return self._last[1]

    def shares(self, year: int, *, by_cells: bool = False) -> Shares:
        """Shares of the mapped part that a map should have, with the sum 1; NaN where the scenario says nothing.

        Parameters
        ----------
        year
            Of the map.
        by_cells
            In numbers of cells even if the scenario's shares are of the area.
        """
        now = self.scenario(year)
        if self.level:
            sea = np.clip(1 - self.coverage, 0, None) * self._water[:, None, None]
            part = np.clip(now - sea, 0, None)
            total = part.sum(axis=0)
            return np.divide(part, total, out=np.full_like(part, np.nan), where=(total > 0) & (self.cells > 0))
        held = self.reference_shares[by_cells]
        land = np.clip(1 - np.tensordot(self._water, self.start, axes=1), _LEAST_LAND, None)
        dry = 1 - np.tensordot(self._water, held, axes=1)
        return add_change(held, (now - self.start) * dry / land)

    def quotas(self, year: int) -> NDArray[np.int64]:
        """Whole cells of each class ``(class, coarse rows, coarse columns)``; -1 where the scenario says nothing."""
        return level_quotas(self.shares(year, by_cells=True), self.cells)

    @property
    def bias(self) -> Shares:
        """How much more the reference map holds of each class than the scenario does in its year, as shares of the cell."""
        return self.reference_shares[False] - self.start
