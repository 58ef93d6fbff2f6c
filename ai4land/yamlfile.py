"""Read the YAML files of a user, as plain values. Catalogues of strangers are JSON, and not read here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ai4land.errors import ConfigError

LARGEST = 2**20
"""Bytes of a file."""


def read_yaml(path: Path, *, what: str) -> Any:
    """Read a YAML file; see :func:`parse_yaml`."""
    size = path.stat().st_size
    if size > LARGEST:
        raise ConfigError(
            f"{what} {path} has {size} bytes, expected at most {LARGEST}; this is probably not a {what}, otherwise split it"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {path} is not YAML: {error}; write it in UTF-8") from error
    return parse_yaml(text, what=f"{what} {path}")


def parse_yaml(text: str, *, what: str) -> Any:
    """Parse YAML into plain values.

    Parameters
    ----------
    text
        The YAML.
    what
        What it is, for messages.

    Raises
    ------
    ConfigError
        If it is not YAML, has tags that would construct objects (``!!python/object``), or has too many levels.

    >>> parse_yaml("{a: [1, 2], b: yes}", what="run file")
    {'a': [1, 2], 'b': True}
    """
    try:
        return yaml.safe_load(text)
    except yaml.constructor.ConstructorError as error:
        raise ConfigError(f"{what} is not plain YAML: {error}; remove its tags, nothing is constructed from them") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{what} is not YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{what} has too many levels, expected a flat file; write it so") from error
