"""Class totals that a map must have in each coarse cell, according to the scenario.

Scenario and map often define a class differently, so that the scenario's level means little while its change is informative.
By default the change of the class shares since the year of the reference map is added to the shares of the reference map;
where both define the classes alike this equals the scenario. The alternative is the scenario's level as it is.

LUH2 gives shares of the whole cell including the sea, which a map need not cover. A change is therefore scaled from the
scenario's land to the mapped land. From a level, the unmapped part of the cell is subtracted as water first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ai4land.constrain.quotas import add_change, level_quotas
from ai4land.crosswalk import Crosswalk
from ai4land.errors import DataError
from ai4land.grid import block_sum
from ai4land.legend import MISSING

Method = Literal["change", "level", "none"]
Shares = NDArray[np.float64]

STATEMENTS: dict[Method, str] = {
    "change": "adds up in each coarse cell to the reference map plus the scenario's change of class shares since its year",
    "level": "adds up in each coarse cell to the scenario's class shares",
    "none": "the scenario's totals are not imposed",
}
"""How the metadata of a cube describe its totals."""
_LEAST_LAND = 0.01
"""Least share of land by which the scenario's change in a coarse cell is divided."""


class Totals:
    """Class totals of a window of whole coarse cells, for any year.

    Parameters
    ----------
    states
        Reads the scenario's states of a year, ``(state, coarse rows, coarse columns)``, NaN without data.
    names, crosswalk
        Names of the states, and their weights for the classes.
    mapped
        Cells that are mapped, ``(rows, columns)``.
    factor
        Fine cells along one side of a coarse cell.
    areas
        Area of a cell of each row, ``(rows,)``, if the scenario's shares are of the area; None if of the number of cells.
    reference, reference_year
        Class indices of the reference map, ``(rows, columns)``, and its year; None: the scenario's level is used.
    level
        Use the scenario's level even with a reference map.

    Attributes
    ----------
    cells
        Mapped cells of each coarse cell, ``(coarse rows, coarse columns)``.
    coverage
        Share of each coarse cell that is mapped, same shape.
    reference_shares
        Class shares of the mapped part in the reference map, weighted as in the scenario (key False) and by number of cells
        (key True); empty without a reference map.
    start
        The scenario's shares in the year of the reference map; only with one.
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
        """Class shares of the coarse cells in the scenario, ``(class, coarse rows, coarse columns)``; do not modify them."""
        if self._last is None or self._last[0] != year:
            self._last = year, self._weights.to_classes(self._states(year))
        return self._last[1]

    def shares(self, year: int, *, by_cells: bool = False) -> Shares:
        """Class shares that the mapped part of each coarse cell must have; they sum to 1, NaN where the scenario has no data.

        Parameters
        ----------
        year
            Year of the map.
        by_cells
            Give shares of the number of cells even if the scenario's are of the area.
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
        """Number of cells of each class, ``(class, coarse rows, coarse columns)``; -1 where the scenario has no data."""
        return level_quotas(self.shares(year, by_cells=True), self.cells)

    @property
    def bias(self) -> Shares:
        """Class shares of the reference map less those of the scenario in its year."""
        return self.reference_shares[False] - self.start


def mapped_shares(
    index: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    *,
    n: int,
    factor: int,
    weights: Literal["area", "cells"] = "area",
    areas: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Measure the class shares that a map has in each coarse cell.

    Parameters
    ----------
    index
        Class indices of whole coarse cells, ``(rows, columns)``.
    mask
        Cells that count, same shape; of these, the ones with a class are *mapped*.
    n, factor
        Number of classes, and fine cells along one side of a coarse cell.
    weights
        Shares of the area, or of the number of cells.
    areas
        Area of a cell of each row, ``(rows,)``; needed for ``weights="area"``.

    Returns
    -------
    shares
        Of each class among the mapped cells, ``(n, coarse rows, coarse columns)``; NaN where nothing is mapped.
    coverage
        Share of the coarse cell that is mapped, ``(coarse rows, coarse columns)``.
    """
    rows, cols = index.shape
    if rows % factor or cols % factor or mask.shape != index.shape:
        raise DataError(
            f"map is {index.shape} with a mask of {mask.shape}, expected the same and whole coarse cells of {factor}; "
            "use windows that are multiples of the factor"
        )
    if weights == "area" and (areas is None or areas.shape != (rows,)):
        raise DataError(
            f"areas are {None if areas is None else areas.shape}, expected ({rows},); give one area a row, or weights='cells'"
        )
    per_row = np.ones(rows) if areas is None or weights == "cells" else areas
    crows, ccols = rows // factor, cols // factor
    cell = np.arange(rows)[:, None] // factor * ccols + np.arange(cols)[None, :] // factor
    mapped = mask & (index != MISSING)
    flat = index[mapped].astype(np.intp) * (crows * ccols) + cell[mapped]
    area = np.broadcast_to(per_row[:, None], index.shape)
    sums = np.bincount(flat, weights=area[mapped], minlength=n * crows * ccols).astype(np.float64)
    if sums.size > n * crows * ccols:
        raise DataError(
            f"class index is {int(index[mapped].max())}, expected 0..{n - 1} or {MISSING}; encode the codes with the legend"
        )
    held = sums.reshape(n, crows, ccols)
    have = held.sum(axis=0)
    whole = np.repeat(per_row.reshape(crows, factor).sum(axis=1)[:, None] * factor, ccols, axis=1)
    shares = np.divide(held, have, out=np.full_like(held, np.nan), where=have > 0)
    return shares, have / whole
