"""Record what is finished in a cube: a folder next to it with its template and a record of every shard, with checksums.

A record is written after its objects. A shard that is all fill leaves no object, so objects alone cannot show what is
finished. Each task appends to a file of its own; lines with a wrong checksum, torn or damaged, are ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ai4land.places import Place, delete, folder_of, inside, names, read, write, writing

TEMPLATE = "template.json"
CLAIM = "claim"
_SUFFIX = ".jsonl"

Key = tuple[int, int, int]
"""Row and column of a shard's first cell, and a year."""


def ledger_path(place: Place) -> Place:
    """Locate the ledger of a cube or of a part of one.

    >>> ledger_path("s3://bucket/cube.zarr"), ledger_path("s3://bucket/cube.zarr/ssp126")
    ('s3://bucket/cube.ledger', 's3://bucket/cube.ledger/ssp126')
    """
    parts = str(place).rstrip("/").split("/")
    at = max((i for i, part in enumerate(parts) if part.endswith(".zarr")), default=len(parts) - 1)
    parts[at] = parts[at].removesuffix(".zarr") + ".ledger"
    beside = "/".join(parts)
    return Path(beside) if isinstance(place, Path) else beside


def checksum(data: bytes) -> str:
    """Compute the checksum of an object: its size and 16-byte BLAKE2b hash."""
    return f"{len(data)}:{hashlib.blake2b(data, digest_size=16).hexdigest()}"


class Book:
    """Ledger file of one task for one shard, given by the row and column of its first cell."""

    def __init__(self, place: Place, *, row: int, col: int) -> None:
        self._place, self._row, self._col = ledger_path(place), row, col
        self._name = f"{_prefix(row, col)}{uuid.uuid4().hex[:16]}{_SUFFIX}"
        self._lines: list[str] = []

    def enter(self, *, years: Iterable[int], files: Mapping[str, str | None], notes: Mapping[str, Any] | None = None) -> None:
        """Record the shard over some years, durably.

        ``files`` gives the checksum of each object by its name in the cube, None for one that would be all fill and is not
        stored. ``notes`` are plain values about the result.
        """
        shard = {"row": self._row, "col": self._col, "years": list(years)}
        entry = {"at": time.time(), **shard, "files": dict(files), **(notes or {})}
        body = json.dumps(entry, sort_keys=True)
        line = json.dumps({"crc": zlib.crc32(body.encode()), "entry": entry}, sort_keys=True) + "\n"
        folder = folder_of(self._place)
        if folder is None:
            self._lines.append(line)
            write(self._place, self._name, "".join(self._lines).encode())
            return
        with writing(self._place):
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / self._name).open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())


def _prefix(row: int, col: int) -> str:
    return f"{row}-{col}-"


def _files(place: Place, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Read the lines of each file of a ledger, without those of its parts."""
    beside = ledger_path(place)
    for name in names(beside, prefix):
        if name.endswith(_SUFFIX) and "/" not in name:
            yield name, (read(beside, name) or b"").decode(errors="replace").split("\n")


def _entry(line: str) -> dict[str, Any] | None:
    try:
        whole = json.loads(line)
        entry: dict[str, Any] = whole["entry"]
        good = zlib.crc32(json.dumps(entry, sort_keys=True).encode()) == whole["crc"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return None
    return entry if good else None


def entries(place: Place, *, prefix: str = "") -> list[dict[str, Any]]:
    """Read the ledger, oldest entry first; torn or damaged lines are ignored."""
    every = (_entry(line) for _, lines in _files(place, prefix) for line in lines if line)
    return sorted((entry for entry in every if entry is not None), key=lambda entry: entry["at"])


def recorded(place: Place) -> dict[Key, str]:
    """Read the ledger: one checksum over the objects of each finished (row, column, year)."""
    found: dict[Key, str] = {}
    for e in entries(place):  # the latest entry counts
        digest = hashlib.blake2b(json.dumps(e["files"], sort_keys=True).encode(), digest_size=16).hexdigest()
        found.update({(e["row"], e["col"], year): digest for year in e["years"]})
    return found


def years_of(place: Place, *, row: int, col: int) -> set[int]:
    """List the finished years of one shard, reading only its own files."""
    return {year for entry in entries(place, prefix=_prefix(row, col)) for year in entry["years"]}


def strike(place: Place, keys: Iterable[Key]) -> None:
    """Remove from the ledger every entry that covers one of the keys, and damaged lines; no task may be writing."""
    gone = set(keys)
    for name, lines in _files(place):
        kept = []
        for line in lines:
            entry = _entry(line) if line else None
            if entry is not None and not gone & {(entry["row"], entry["col"], y) for y in entry["years"]}:
                kept.append(line)
        if kept != lines[:-1]:
            write(ledger_path(place), name, "".join(f"{line}\n" for line in kept).encode())


def save_template(place: Place, template: Mapping[str, Any]) -> None:
    """Write the template of a cube, with its checksum."""
    body = json.dumps(template, sort_keys=True)
    write(ledger_path(place), TEMPLATE, json.dumps({"crc": zlib.crc32(body.encode()), "template": template}).encode())


def load_template(place: Place) -> dict[str, Any] | None:
    """Read the template of a cube; None if missing or damaged."""
    try:
        whole = json.loads(read(ledger_path(place), TEMPLATE) or b"")
        template: dict[str, Any] = whole["template"]
        good = zlib.crc32(json.dumps(template, sort_keys=True).encode()) == whole["crc"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None
    return template if good else None


def wipe(place: Place) -> None:
    """Delete the records of a cube; its claim and the ledgers of its parts stay."""
    beside = ledger_path(place)
    for name in names(beside):
        if name != CLAIM and "/" not in name:
            delete(beside, name)


def part_names(root: Place) -> list[str]:
    """List the parts of a cube."""
    beside = ledger_path(root)
    return sorted(name.removesuffix(f"/{TEMPLATE}") for name in names(beside) if name.endswith(f"/{TEMPLATE}"))


def part_of(place: Place) -> tuple[Place, str] | None:
    """Split the place of a part into root and name; None for a whole cube.

    >>> part_of("s3://bucket/cube.zarr/ssp126"), part_of("s3://bucket/cube.zarr")
    (('s3://bucket/cube.zarr', 'ssp126'), None)
    """
    root, _, name = str(place).rstrip("/").rpartition("/")
    if name.endswith(".zarr") or not root.endswith(".zarr"):
        return None
    return (Path(root) if isinstance(place, Path) else root), name


def part(place: Place, name: str | None) -> Place:
    """Locate a part of a cube; the cube itself if ``name`` is None."""
    return place if name is None else inside(place, name)
