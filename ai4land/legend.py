"""Class schemes: the codes, names and colours of a land-cover map.

A :class:`Legend` is read from YAML: a built-in one in ``ai4land/data``, or a user's own file of the same form. This is
the only module that knows class codes.

Inside the model a class is its *index* (0 … n − 1, in the order of the legend); ``MISSING`` stands for no class.
"""

from __future__ import annotations

from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ai4land.errors import ConfigError, DataError
from ai4land.yamlfile import read_yaml

MISSING = 255
"""Index that marks a cell without a class."""
_UNKNOWN = 254


class LandClass(BaseModel):
    """One class: its code in files, a name without blanks, and a colour as ``#rrggbb``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: int = Field(ge=0, le=255)
    name: str = Field(pattern=r"^[A-Za-z0-9_.+-]+$")
    colour: str = Field(pattern=r"^#[0-9a-fA-F]{6}$")


class Legend(BaseModel):
    """A class scheme.

    Attributes
    ----------
    name
        Short name, as given to :func:`load_legend`.
    fill
        Code for no land: ocean or no data. It is the fill value of every map of this legend.
    classes
        Classes of a map and of the model, in the order of their indices.
    nodata
        Other codes that mean no data in input files.
    aliases
        Codes in input files that are read as another code: sub-classes that this legend merges.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    references: str = ""
    fill: LandClass
    classes: tuple[LandClass, ...] = Field(min_length=2, max_length=200)
    nodata: tuple[int, ...] = ()
    aliases: dict[int, int] = {}

    @model_validator(mode="after")
    def _check(self) -> Legend:
        codes = [self.fill.code, *(c.code for c in self.classes)]
        if len(set(codes)) != len(codes):
            twice = sorted({c for c in codes if codes.count(c) > 1})
            raise ValueError(f"legend {self.name} gives codes {twice} twice, expected each code once")
        unknown = sorted(set(self.aliases.values()) - set(codes))
        if unknown:
            raise ValueError(f"legend {self.name} has aliases for codes {unknown}, which it does not define; add these classes")
        outside = sorted(c for c in {*self.nodata, *self.aliases} if not 0 <= c <= 255)
        if outside:
            raise ValueError(f"legend {self.name} has no-data codes or aliases {outside}, expected 0..255")
        both = sorted({*codes[1:]} & {*self.nodata, *self.aliases} | {*self.nodata} & {*self.aliases})
        if both:
            raise ValueError(f"legend {self.name} gives codes {both} two meanings, expected one of class, no data and alias")
        return self

    @property
    def n(self) -> int:
        """Number of classes, without the fill."""
        return len(self.classes)

    @property
    def names(self) -> list[str]:
        """Class names in the order of their indices."""
        return [c.name for c in self.classes]

    @cached_property
    def codes(self) -> NDArray[np.uint8]:
        """Class codes in the order of their indices, shape ``(n,)``."""
        return np.array([c.code for c in self.classes], dtype=np.uint8)

    @cached_property
    def _index(self) -> NDArray[np.uint8]:
        table = np.full(256, _UNKNOWN, dtype=np.uint8)
        table[[self.fill.code, *self.nodata]] = MISSING
        table[self.codes] = np.arange(self.n, dtype=np.uint8)
        for code, target in self.aliases.items():
            table[code] = table[target]
        return table

    def encode(self, codes: NDArray[Any], *, source: str = "map") -> NDArray[np.uint8]:
        """Turn codes into class indices; fill and no-data codes become ``MISSING``.

        Raises
        ------
        DataError
            If a code is not in the legend.

        >>> load_legend("hildaplus").encode(np.array([0, 11, 45, 77, 99])).tolist()
        [255, 0, 3, 6, 255]
        """
        if codes.dtype != np.uint8:
            bad = ~((codes >= 0) & (codes <= 255) & (codes == np.floor(codes)))
            if bad.any():
                raise DataError(
                    f"{source} holds class code {codes[bad].flat[0]}, expected whole numbers of 0..255; {self._hint()}"
                )
            codes = codes.astype(np.uint8)
        index = self._index[codes]
        if (index == _UNKNOWN).any():
            values, counts = np.unique(codes[index == _UNKNOWN], return_counts=True)
            listed = ", ".join(f"{v} ({c} cells)" for v, c in zip(values[:8], counts[:8], strict=True))
            raise DataError(f"{source} holds class codes {listed} that legend {self.name} does not know; {self._hint()}")
        return index

    def decode(self, index: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Turn class indices into codes; ``MISSING`` becomes the fill code."""
        table = np.full(256, self.fill.code, dtype=np.uint8)
        table[: self.n] = self.codes
        return table[index]

    def _hint(self) -> str:
        return f"known: {sorted({self.fill.code, *self.nodata, *self.codes.tolist(), *self.aliases})}; choose another legend, or add aliases"

    def flag_attrs(self) -> dict[str, Any]:
        """CF attributes of a map of this legend: ``flag_values``, ``flag_meanings`` and, not of CF, ``flag_colors``."""
        every = (self.fill, *self.classes)
        return {
            "flag_values": np.array([c.code for c in every], dtype=np.uint8),
            "flag_meanings": " ".join(c.name for c in every),
            "flag_colors": " ".join(c.colour for c in every),
        }


def _builtin(folder: str, suffix: str) -> list[str]:
    return sorted(p.name.removesuffix(suffix) for p in files("ai4land").joinpath("data", folder).iterdir())


def data_file(name: str | Path, folder: str, suffix: str) -> Path:
    """Find a file of ``ai4land/data`` by its name, or a user's own by its path.

    Raises
    ------
    ConfigError
        If the file does not exist.
    """
    path = Path(name)
    if path.suffix == suffix:
        if not path.is_file():
            raise ConfigError(f"{folder[:-1]} file {path} does not exist; give the path of a {suffix} file")
        return path
    inside = Path(str(files("ai4land").joinpath("data", folder, f"{name}{suffix}")))
    if not inside.is_file():
        raise ConfigError(
            f"{folder[:-1]} is {str(name)!r}, expected one of {_builtin(folder, suffix)} or the path of a {suffix} file"
        )
    return inside


def load_legend(name: str | Path) -> Legend:
    """Load a built-in legend by name (``hildaplus``, ``lccs_level1``, …) or a user's own YAML file by path.

    >>> load_legend("lccs_level1").n
    22
    """
    path = data_file(name, "legends", ".yaml")
    try:
        values = read_yaml(path, what="legend file")
        return Legend(**{"name": path.stem, **values})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"legend file {path} is not valid: {error}; see ai4land/data/legends for the form") from error
