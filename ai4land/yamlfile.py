"""YAML of strangers: plain values only, of a bounded size once its aliases are followed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ai4land.errors import ConfigError

LARGEST = 2**20
"""Bytes of a file."""
MOST_VALUES = 100_000
"""Values of a file when every alias is written out."""


def read_yaml(path: Path, *, what: str) -> Any:
    """Read a YAML file; see :func:`parse_yaml`."""
    size = path.stat().st_size
    if size > LARGEST:
        raise ConfigError(f"{what} {path} has {size} bytes, expected at most {LARGEST}; it is none, or split it")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {path} is not YAML: {error}; write it in UTF-8") from error
    return parse_yaml(text, what=f"{what} {path}")


def parse_yaml(text: str, *, what: str) -> Any:
    """Parse YAML without constructing anything but plain values.

    Parameters
    ----------
    text
        The YAML.
    what
        What it is, for messages.

    Raises
    ------
    ConfigError
        If it is not YAML, has tags that would construct objects (``!!python/object``), aliases that lead to themselves or
        that stand for too many values (a few lines can stand for billions), or too many levels.

    >>> parse_yaml("{a: [1, 2], b: yes}", what="run file")
    {'a': [1, 2], 'b': True}
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and _values(node, {}, set()) > MOST_VALUES:
            raise ConfigError(
                f"{what} stands for more than {MOST_VALUES} values with its aliases, expected fewer; write it without"
            )
        return yaml.safe_load(text)
    except yaml.constructor.ConstructorError as error:
        raise ConfigError(f"{what} is not plain YAML: {error}; remove its tags, nothing is constructed from them") from error
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{what} is not YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(
            f"{what} has too many levels, or an alias that leads to itself, expected a flat file; write it so"
        ) from error


def _values(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """Count the values of a node with its aliases written out."""
    key = id(node)
    if key in above:
        raise RecursionError
    if key not in known:
        parts: list[Any] = []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        known[key] = 1 + sum(_values(part, known, above | {key}) for part in parts)
    return known[key]
