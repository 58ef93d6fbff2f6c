"""Reading and validating a run file: YAML with ``key=value`` overrides; ``${NAME:-default}`` in ``data`` is expanded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ai4land.errors import ConfigError
from ai4land.places import shipped
from ai4land.run.config import RunConfig
from ai4land.yamlfile import parse_yaml, read_yaml


def pipelines() -> Path:
    """Return the folder of the run files that come with the package."""
    return shipped("pipelines")


def load_run(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Load a run file and apply ``key=value`` overrides.

    Parameters
    ----------
    path
        A YAML file, or the name of one that comes with the package (``demo.yaml``, ``pipelines/bavaria.yaml``).
    overrides
        Dotted keys and YAML values, for example ``train.steps=200`` or ``reconstruct.years=1992-1999``.

    Raises
    ------
    ConfigError
        If the file does not exist or is not YAML, or a key or value is invalid.
    """
    file = Path(path)
    if not file.is_file():
        known = pipelines() / file.name
        if not known.is_file() or str(file.parent) not in (".", "pipelines"):
            names = sorted(p.name for p in pipelines().glob("*.yaml"))
            raise ConfigError(f"run file {path} does not exist; give a YAML file, or one that comes with the package: {names}")
        file = known
    values = read_yaml(file, what="run file")
    if not isinstance(values, dict):
        raise ConfigError(f"run file {file} holds {type(values).__name__}, expected keys such as name, grid and train")
    for item in overrides:
        key, found, text = item.partition("=")
        if not found:
            raise ConfigError(f"override is {item!r}, expected key=value, for example train.steps=200")
        _set(values, key.split("."), parse_yaml(text, what=f"override {item!r}"), item)
    if isinstance(values.get("data"), str):
        values["data"] = _environment(values["data"])
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(p) for p in e['loc']) or 'run'}: {e['msg']} (got {str(e['input'])[:60]!r})" for e in error.errors()
        ]
        raise ConfigError(f"run file {file} is not valid:\n  " + "\n  ".join(lines)) from error


def _set(values: dict[str, Any], keys: list[str], value: Any, item: str) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {item!r} goes below {key!r}, which is not a section")
    values[keys[-1]] = value


def _environment(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        value = os.environ.get(match[1]) or match[3]
        if value is None:
            raise ConfigError(f"environment variable {match[1]} is not set; set it, or write ${{{match[1]}:-default}}")
        return value

    return re.sub(r"\$\{(\w+)(:-([^}]*))?\}", replace, text)
