"""What input files and an analysis-ready store hold, in digests: whether they are what a result was made from.

A file is known by its size and samples of it, so that terabytes of inputs are no matter of hours. A store is known by every value in
it, part by part, so that what was made from some of its years stays good when it is made anew with more.
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
    """Digest of what a store holds: the mask, the static layers, and the land-cover maps and coarse states of some years.

    Parameters
    ----------
    path
        Of the analysis-ready store.
    maps, states
        Years; those that it lacks count as lacking.
    """
    attrs: Any = zarr.open_group(path, mode="r").attrs
    held: dict[str, Any] = attrs.get("contents", {})
    parts = {name: held.get(name, "") for name in ("mask", "static")}
    for name, years in (("land_cover", maps), ("coarse", states)):
        parts |= {f"{name} {year}": held.get(name, {}).get(str(year), "") for year in years}
    return combine_digests(parts)


def sample_of(path: Path) -> str:
    """Digest of a file's size and of 64 samples spread evenly over it, 4 MB in all; of a smaller file all of it."""
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
    """Digest of what of a store a cube is made from: on the way from the reference map, the states of the years between as well."""
    every = [*years]
    if reference is None:
        return contents_of(path, maps=[], states=every)
    return contents_of(path, maps=[reference], states=range(min(reference, *every), max(reference, *every) + 1))


def note_files(paths: Mapping[str, bool], *, beside: str) -> dict[str, tuple[int, int, str]]:
    """Note size, time of the last change and digest of files of this machine.

    Parameters
    ----------
    paths
        Each with whether its contents are looked at; if not, its size is all that is known. What is no file, such as a URL, is
        left out; of a Zarr group its metadata stand for it.
    beside
        Folder that names are kept relative to, so that files that move with it, and links, are followed.
    """
    found = {}
    for name, whole in sorted(paths.items()):
        path = _file(name)
        if path is not None:
            seen = path.stat()
            found[os.path.relpath(path, beside)] = (seen.st_size, seen.st_mtime_ns, sample_of(path) if whole else "")
    return found


def changed_files(noted: Mapping[str, Iterable[Any]], *, beside: str) -> list[str]:
    """List the files that hold something else than was noted; those that are gone, or were only touched, do not count."""
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
    """File that stands for a path; None if there is none on this machine."""
    if "://" in name:
        return None
    path = Path(name)
    inner = next((path / n for n in ("zarr.json", ".zmetadata", ".zgroup") if (path / n).is_file()), None)
    return path if path.is_file() else inner
