"""Split blocks of coarse cells and years into training, validation and test, with a buffer, saved with a fingerprint.

At most one of the three *scores* a cell in a year. Without a split in space, all cells share the years, so the three must
use different years. With one, held-out blocks (and the buffer around them) may share years with training, because their
cells are never a training target.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ai4land.digests import digest
from ai4land.errors import ConfigError, DataError, MismatchError

TRAIN, VALIDATION, TEST, BUFFER = 0, 1, 2, 3


@dataclass(frozen=True)
class Scored:
    """Scored years, and the year of the reference map they are predicted from (None: no reference map)."""

    reference: int | None
    years: tuple[int, ...]


@dataclass(frozen=True)
class Split:
    """What training may see, and what validation and test score (None: nothing).

    ``roles`` holds TRAIN, VALIDATION, TEST or BUFFER for each coarse cell, uint8 ``(coarse rows, coarse columns)``; without
    a split in space all are TRAIN. ``pairs`` holds the training samples as (reference year, year).
    """

    roles: NDArray[np.uint8]
    pairs: tuple[tuple[int, int], ...]
    validation: Scored | None
    test: Scored | None

    @property
    def in_space(self) -> bool:
        """Whether coarse cells are held out."""
        return bool((self.roles != TRAIN).any())

    def cells(self, role: int) -> NDArray[np.bool_]:
        """Return the mask of coarse cells that a role scores: its own blocks, or all training cells if it has none."""
        own = self.roles == role
        return own if own.any() else self.roles == TRAIN

    @property
    def training_years(self) -> list[int]:
        """Every year whose map or scenario training sees."""
        return sorted({year for pair in self.pairs for year in pair})

    @property
    def hash(self) -> str:
        """Fingerprint of the split."""
        return digest(self._values())

    def _values(self) -> dict[str, Any]:
        return {
            "pairs": [list(p) for p in self.pairs],
            "validation": None if self.validation is None else [self.validation.reference, list(self.validation.years)],
            "test": None if self.test is None else [self.test.reference, list(self.test.years)],
            "roles": ["".join(map(str, row)) for row in self.roles.tolist()],
        }

    def save(self, path: Path) -> None:
        """Write the split, with its fingerprint, as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"hash": self.hash, **self._values()}, indent=1), encoding="utf-8")


def load_split(path: Path) -> Split:
    """Read a split that :meth:`Split.save` wrote.

    Raises DataError if the file does not hold a split, MismatchError if it was edited since it was saved.
    """

    def scored(item: Any) -> Scored | None:
        return None if item is None else Scored(None if item[0] is None else int(item[0]), tuple(item[1]))

    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        split = Split(
            np.array([[int(c) for c in row] for row in values["roles"]], dtype=np.uint8),
            tuple((int(a), int(b)) for a, b in values["pairs"]),
            scored(values["validation"]),
            scored(values["test"]),
        )
        saved = values["hash"]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"split file {path} cannot be read ({error!r}), expected what training saved; train again") from error
    if split.hash != saved:
        raise MismatchError(f"split in {path} has hash {split.hash}, expected {saved}; it was edited: train again")
    return split


def training_pairs(years: Iterable[int], *, max_lead: int, backward: bool) -> tuple[tuple[int, int], ...]:
    """List pairs (reference year, year) with leads of 1 to ``max_lead`` years; with 0, each year is paired with itself.

    With ``backward``, the year may also precede its reference. Raises ConfigError if there are no pairs.

    >>> training_pairs([1992, 1993, 1995], max_lead=2, backward=False)
    ((1992, 1993), (1993, 1995))
    """
    every = sorted(set(years))
    if max_lead == 0:
        return tuple((year, year) for year in every)
    pairs = [(a, b) for a in every for b in every if 0 < abs(b - a) <= max_lead and (backward or b > a)]
    if not pairs:
        raise ConfigError(
            f"training years {every} give no pair with a lead of 1 to {max_lead}; add years, raise max_lead, or set it to 0"
        )
    return tuple(pairs)


def block_roles(
    shape: tuple[int, int], *, block: int, validation: float, test: float, buffer: int, seed: int, wraps: bool = False
) -> NDArray[np.uint8]:
    """Assign random blocks of coarse cells to validation and test, and ring them with a buffer; return uint8 roles.

    Parameters
    ----------
    shape, block
        Coarse rows and columns (also of the result), and coarse cells along the side of a block.
    validation, test
        Shares of the blocks.
    buffer
        Width in coarse cells of the ring around held-out blocks that training leaves out. Validation cells near a test block
        become buffer, too; test cells always stay.
    wraps
        Whether the west and the east edge touch.
    """
    rows, cols = -(-shape[0] // block), -(-shape[1] // block)
    order = np.random.default_rng([seed, 7]).permutation(rows * cols)
    n_validation, n_test = round(validation * rows * cols), round(test * rows * cols)
    flat = np.full(rows * cols, TRAIN, dtype=np.uint8)
    flat[order[:n_validation]] = VALIDATION
    flat[order[n_validation : n_validation + n_test]] = TEST
    roles = np.kron(flat.reshape(rows, cols), np.ones((block, block), dtype=np.uint8))[: shape[0], : shape[1]]
    if buffer:
        near = {role: _dilate(roles == role, buffer, wraps) for role in (VALIDATION, TEST)}
        out = roles.copy()
        out[(roles == TRAIN) & (near[VALIDATION] | near[TEST])] = BUFFER
        out[(roles == VALIDATION) & near[TEST]] = BUFFER
        return out
    return roles


def _dilate(cells: NDArray[np.bool_], width: int, wraps: bool) -> NDArray[np.bool_]:
    size = 2 * width + 1
    modes = ["constant", "wrap" if wraps else "constant"]
    return ndimage.maximum_filter(cells.astype(np.uint8), size=size, mode=modes).astype(bool)


def make_split(
    shape: tuple[int, int],
    *,
    train: Iterable[int],
    max_lead: int,
    backward: bool,
    validation: Scored | None,
    test: Scored | None,
    space: dict[str, Any] | None = None,
    seed: int = 0,
    wraps: bool = False,
) -> Split:
    """Make the split of a run, and refuse one that leaks.

    ``train``, ``max_lead`` and ``backward`` are as in :func:`training_pairs`. ``space`` holds the arguments ``block``,
    ``validation``, ``test`` and ``buffer`` of :func:`block_roles`, which also takes ``shape``, ``seed`` and ``wraps``; None
    holds no cells out.

    Raises
    ------
    ConfigError
        If scored years overlap each other or the training years on shared cells, if a reference year is also scored against
        its own map, if space leaves no training cell, or if, without test blocks, training or validation uses maps within
        the test years.
    """
    pairs = training_pairs(train, max_lead=max_lead, backward=backward)
    roles = np.full(shape, TRAIN, dtype=np.uint8)
    if space is not None:
        roles = block_roles(shape, seed=seed, wraps=wraps, **space)
        if not (roles == TRAIN).any():
            raise ConfigError(
                f"split in space {space} leaves no coarse cell of {shape} to train on; lower the shares or the buffer"
            )
    split = Split(roles, pairs, validation, test)
    seen = set(split.training_years)
    for name, scored, role in (("validation", validation, VALIDATION), ("test", test, TEST)):
        if scored is None:
            continue
        if scored.reference is not None and scored.reference in scored.years:
            raise ConfigError(f"{name} scores {scored.reference}, the year of its own reference map; leave that year out")
        both = sorted(seen & set(scored.years))
        if both and not (roles == role).any():
            raise ConfigError(
                f"{name} scores years {both} that training has seen; leave them out of split.train, or hold cells out in space"
            )
    if validation and test:
        both = sorted(set(validation.years) & set(test.years))
        if both and not ((roles == VALIDATION).any() and (roles == TEST).any()):
            raise ConfigError(
                f"validation and test both score years {both}; give each its own years, or hold cells out in space for both"
            )
    if test and not (roles == TEST).any():
        late = sorted(year for year in seen if min(test.years) <= year <= max(test.years))
        used = [("validation", validation.reference)] if validation else []
        late += [year for _, year in used if year in test.years]
        if late:
            raise ConfigError(
                f"training or validation uses the maps of {late}, which lie within the test years; choose years outside them"
            )
    return split
