"""Checksums of input files and of an analysis-ready store, to check what a result was made from.

A file is identified by its size and samples, so that terabytes do not take hours. A store is identified by all its values, part by
part, so that a result from some of its years stays valid when the store is remade with more.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import zarr

from ai4land.digests import DIGEST_BYTES, combine_digests

_SAMPLE, _SAMPLES = 2**16, 64


def contents_of(path: Path, *, maps: Iterable[int], states: Iterable[int]) -> str:
    """Compute the checksum of parts of a store: the mask, the static layers, and the land-cover maps and coarse states of some years.

    Parameters
    ----------
    maps, states
        Years of the maps and the states; a missing year changes the checksum.
    """
    attrs: Any = zarr.open_group(path, mode="r").attrs
    held: dict[str, Any] = attrs.get("contents", {})
    parts = {name: held.get(name, "") for name in ("mask", "static")}
    for name, years in (("land_cover", maps), ("coarse", states)):
        parts |= {f"{name} {year}": held.get(name, {}).get(str(year), "") for year in years}
    return combine_digests(parts)


def sample_of(path: Path) -> str:
    """Compute the checksum of a file's size and 64 evenly spread samples, 4 MB in all; a smaller file is read whole."""
    size = path.stat().st_size
    made = hashlib.blake2b(str(size).encode(), digest_size=DIGEST_BYTES)
    with path.open("rb") as file:
        if size <= _SAMPLE * _SAMPLES:
            made.update(file.read())
        else:
            for number in range(_SAMPLES):
                file.seek((size - _SAMPLE) * number // (_SAMPLES - 1))
                made.update(file.read(_SAMPLE))
    return made.hexdigest()


def held_of(path: Path, *, reference: int | None, years: Iterable[int]) -> str:
    """Compute the checksum of the store parts that a cube depends on, including the states since the reference map."""
    every = [*years]
    if reference is None:
        return contents_of(path, maps=[], states=every)
    return contents_of(path, maps=[reference], states=range(min(reference, *every), max(reference, *every) + 1))


def note_files(paths: Mapping[str, bool], *, beside: str) -> dict[str, tuple[int, int, str]]:
    """Record size, modification time and checksum of local files.

    Parameters
    ----------
    paths
        Each with whether to sample its contents; otherwise only the size counts. URLs and missing files are skipped; a Zarr
        group is represented by its metadata.
    beside
        Base folder of the stored names, so that files may move with it.
    """
    found = {}
    for name, whole in sorted(paths.items()):
        path = _file(name)
        if path is not None:
            seen = path.stat()
            found[os.path.relpath(path, beside)] = (seen.st_size, seen.st_mtime_ns, sample_of(path) if whole else "")
    return found


def changed_files(noted: Mapping[str, Iterable[Any]], *, beside: str) -> list[str]:
    """List the files whose contents changed; missing or merely touched files do not count."""
    found = []
    for name, (size, at, sample) in noted.items():
        path = Path(beside) / name
        if not path.is_file():
            continue
        now = path.stat()
        if now.st_size != size or (sample and now.st_mtime_ns != at and sample_of(path) != sample):
            found.append(str(path))
    return found


def _file(name: str) -> Path | None:
    """Return the file that represents a path; None if it is not on this machine."""
    if "://" in name:
        return None
    path = Path(name)
    inner = next((path / n for n in ("zarr.json", ".zmetadata", ".zgroup") if (path / n).is_file()), None)
    return path if path.is_file() else inner
