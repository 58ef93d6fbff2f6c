"""From the states of a scenario to the classes of a legend.

A :class:`Crosswalk` holds the weights. It is read from CSV: a built-in one in ``ai4land/data``, or a user's own file of the
same form.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, field_validator

from ai4land.errors import ConfigError
from ai4land.legend import Legend, data_file

REMAINDER = "icwtr"
"""Row of a crosswalk that takes what the states leave of a cell: ice and water."""


class Crosswalk(BaseModel):
    """Weights that spread coarse states over the classes of a legend.

    Attributes
    ----------
    states
        Names of the coarse states, the rows.
    weights
        ``weights[s][k]`` is the share of state *s* that is expected as class index *k*; every row sums to 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    states: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...]

    @field_validator("weights")
    @classmethod
    def _rows(cls, rows: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
        for number, row in enumerate(rows):
            if any(not 0 <= v <= 1 for v in row) or abs(sum(row) - 1) > 1e-6:
                raise ValueError(f"crosswalk row {number + 1} sums to {sum(row):g}, expected weights of 0..1 that sum to 1")
        return rows

    @cached_property
    def matrix(self) -> NDArray[np.float64]:
        """Weights as an array, shape ``(state, class)``."""
        return np.array(self.weights, dtype=np.float64)

    def for_states(self, states: Iterable[str]) -> Crosswalk:
        """Keep the rows of a scenario's states, in their order, and last that of ``REMAINDER`` if there is one and no state is it.

        Raises
        ------
        ConfigError
            If a state has no row.
        """
        names = list(states)
        lacking = [s for s in names if s not in self.states]
        if lacking:
            raise ConfigError(
                f"crosswalk {self.name} has no row for the states {lacking}; it knows {list(self.states)}; add rows to the CSV file"
            )
        if REMAINDER in self.states and REMAINDER not in names:
            names.append(REMAINDER)
        order = [self.states.index(s) for s in names]
        return Crosswalk(name=self.name, states=tuple(names), weights=tuple(self.weights[i] for i in order))

    def to_classes(self, shares: NDArray[np.floating]) -> NDArray[np.float64]:
        """Turn shares of the states ``(state, …)`` into shares of the classes ``(class, …)``.

        A last row ``REMAINDER`` for which there is no state spreads the rest of the cell, 1 - sum. NaN stays NaN.
        """
        values = shares.astype(np.float64)
        if len(self.states) == len(values) + 1 and self.states[-1] == REMAINDER:
            values = np.concatenate([values, np.clip(1 - values.sum(axis=0, keepdims=True), 0, None)])
        return np.tensordot(self.matrix.T, values, axes=1)


def load_crosswalk(name: str | Path, legend: Legend) -> Crosswalk:
    """Load the crosswalk from coarse states to a legend.

    Parameters
    ----------
    name
        ``identity`` (coarse shares of the same legend, states named by their codes), a built-in name such as
        ``luh2_to_hildaplus``, or the path of a CSV file: a row a state, a column a class code, ``#`` for comments.
    legend
        The legend whose codes the columns are. Classes without a column get weight 0.

    Raises
    ------
    ConfigError
        If a column is not a code of the legend, a weight is not a number, or a row does not sum to 1.
    """
    if str(name) == "identity":
        unit = np.eye(legend.n)
        return Crosswalk(name="identity", states=tuple(str(c) for c in legend.codes), weights=tuple(map(tuple, unit.tolist())))
    path = data_file(name, "crosswalks", ".csv")
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")]
        rows = list(csv.reader(lines))
        columns = [int(c) for c in rows[0][1:]]
        unknown = [c for c in columns if c not in legend.codes]
        if unknown:
            raise ValueError(f"columns {unknown} are not codes of legend {legend.name} ({legend.codes.tolist()})")
        if len(set(columns)) != len(columns):
            raise ValueError(f"columns are {columns}, expected each class code once")
        place = {int(code): k for k, code in enumerate(legend.codes)}
        states, weights = [], []
        for row in rows[1:]:
            if len(row) != len(rows[0]):
                raise ValueError(f"row {row[0]!r} has {len(row)} cells, expected {len(rows[0])}")
            if row[0] in states:
                raise ValueError(f"row {row[0]!r} is given twice, expected each state once")
            line = [0.0] * legend.n
            for code, value in zip(columns, row[1:], strict=True):
                line[place[code]] = float(value)
            if abs(sum(line) - 1) > 1e-6:
                raise ValueError(f"row {row[0]!r} sums to {sum(line):g}, expected 1")
            states.append(row[0])
            weights.append(tuple(line))
        return Crosswalk(name=path.stem, states=tuple(states), weights=tuple(weights))
    except (ValueError, IndexError) as error:
        raise ConfigError(
            f"crosswalk {path} is not valid: {error}; the form is a header 'state,code,code,…' and a row a state"
        ) from error
