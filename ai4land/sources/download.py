"""Download one file from the web, whole or not at all.

:func:`download` resumes an earlier attempt's ``.part`` file if the server confirms that the file is unchanged. It retries
after failures, and moves the file into place once its size and checksum are right.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import requests

from ai4land.errors import ConfigError, DataError

_log = logging.getLogger(__name__)

TRIES = 5
"""Give up a file after this many failures in a row without progress."""
LONGEST_PAUSE = 60.0
"""Most seconds between two attempts."""
_PIECE = 2**14
"""Bytes per read; a cut connection loses at most one such piece."""
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_HASHES = {"11": "sha1", "12": "sha256", "13": "sha512", "d501": "md5"}
"""Multihash codes that can be verified."""


@dataclass(frozen=True)
class Stored:
    """Size in bytes and hexadecimal SHA-256 of a complete file."""

    size: int
    sha256: str

    @property
    def multihash(self) -> str:
        """The checksum as in the STAC file extension."""
        return f"1220{self.sha256}"


def download(
    address: Callable[[], str],
    path: Path,
    *,
    name: str,
    size: int | None = None,
    checksum: str | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = 60.0,
    pause: float = 1.0,
    stop: threading.Event | None = None,
) -> Stored:
    """Download a file to ``path``.

    Parameters
    ----------
    address
        Returns the URL; called before every attempt, so that a signature is fresh.
    path
        Target in an existing folder; an incomplete file is ``<path>.part``.
    name
        URL without a signature, for messages and to recognise a part.
    size, checksum
        Expected bytes and hexadecimal multihash, if known.
    timeout
        Seconds to wait for a connection, and between two pieces.
    pause
        Seconds before the first retry; doubled for each further one, up to ``LONGEST_PAUSE``.
    stop
        Set it to end the download with a DataError and keep the part.

    Raises
    ------
    DataError
        If the server refuses, keeps failing or sends a file of another size or checksum, or ``path`` cannot be written.
    ConfigError
        If the checksum's algorithm is unknown.
    """
    if checksum is not None:
        split_multihash(checksum, name=name)
    part, note = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.json")
    failures, begun_anew, stop = 0, False, stop or threading.Event()
    with requests.Session() as session:
        while True:
            before = part.stat().st_size if part.is_file() else 0
            wait: float | None = None
            try:
                wanted = _receive(
                    session, address(), part, note, name=name, size=size, headers=headers, timeout=timeout, stop=stop
                )
                have = part.stat().st_size
                if wanted is not None and have != wanted:
                    raise requests.ConnectionError(f"{have} of {wanted} bytes arrived")
                stored = verify(part, size=size, checksum=checksum, name=name)
                part.replace(path)
                note.unlink(missing_ok=True)
                return stored
            except _Refused as error:
                if not error.again:
                    raise DataError(f"{name} can not be downloaded ({error}), expected the file; check its address") from error
                problem, wait = str(error), error.wait
            except DataError as error:
                # Wrong size or checksum: start again once; a second time the server is at fault.
                _discard(part, note)
                if begun_anew:
                    raise
                problem, begun_anew, before = str(error), True, -1
            except OSError as error:
                if not isinstance(error, requests.RequestException):
                    raise DataError(
                        f"{name} can not be written to {path} ({error}), expected a place to write; mend it"
                    ) from error
                problem = _brief(error)
            gained = part.is_file() and part.stat().st_size > before
            failures = 1 if gained else failures + 1
            if failures >= TRIES:
                raise DataError(f"{name} failed {TRIES} times without progress ({problem}), expected the file; try again later")
            wait = min(pause * 2 ** (failures - 1) if wait is None else wait, LONGEST_PAUSE)
            _log.info("%s: %s; again in %.1f s", name, problem, wait)
            stop.wait(wait)


def verify(path: Path, *, name: str, size: int | None = None, checksum: str | None = None) -> Stored:
    """Measure a file, and compare it with its expected size and checksum (hexadecimal multihash).

    Raises DataError if the size or checksum differs, ConfigError if the checksum's algorithm is unknown.
    """
    algorithm, digest = ("", "") if checksum is None else split_multihash(checksum, name=name)
    hashes = {"sha256": hashlib.sha256()}
    if algorithm and algorithm not in hashes:
        hashes[algorithm] = hashlib.new(algorithm, usedforsecurity=False)
    have = path.stat().st_size
    if size is not None and have != size:
        raise DataError(f"{name} has {have} bytes, expected {size}; download it again")
    with path.open("rb") as stream:
        while piece := stream.read(2**20):
            for one in hashes.values():
                one.update(piece)
    if algorithm and hashes[algorithm].hexdigest() != digest:
        raise DataError(f"{algorithm} of {name} is {hashes[algorithm].hexdigest()}, expected {digest}; download it again")
    return Stored(have, hashes["sha256"].hexdigest())


def split_multihash(checksum: str, *, name: str) -> tuple[str, str]:
    """Split a multihash (``file:checksum``) into algorithm and hexadecimal digest; ConfigError if unknown.

    >>> split_multihash("d50110" + "0" * 32, name="a.nc")
    ('md5', '00000000000000000000000000000000')
    """
    for code, algorithm in _HASHES.items():
        bytes_ = hashlib.new(algorithm, usedforsecurity=False).digest_size
        if checksum.lower().startswith(f"{code}{bytes_:02x}") and len(checksum) == len(code) + 2 + 2 * bytes_:
            return algorithm, checksum.lower()[len(code) + 2 :]
    raise ConfigError(f"checksum of {name} is {checksum!r}, expected a multihash of {', '.join(_HASHES.values())}; correct it")


class _Refused(Exception):
    """The server refused the file; ``again`` says whether to retry, ``wait`` after how many seconds."""

    def __init__(self, text: str, *, again: bool, wait: float | None = None) -> None:
        super().__init__(text)
        self.again = again
        self.wait = wait


def _receive(
    session: requests.Session,
    url: str,
    part: Path,
    note: Path,
    *,
    name: str,
    size: int | None,
    headers: Mapping[str, str] | None,
    timeout: float,
    stop: threading.Event,
) -> int | None:
    """Receive the missing bytes of a file; return its full size if the server states it."""
    if stop.is_set():
        raise _Refused("stopped", again=False)
    known = _known(part, note, name)
    start = 0 if known is None else part.stat().st_size
    ask = {**(headers or {}), "Accept-Encoding": "identity"}
    if known is not None:
        ask |= {"Range": f"bytes={start}-", "If-Range": known}
    with session.get(url, headers=ask, stream=True, timeout=timeout) as answer:
        status = answer.status_code
        whole: int | None
        if status == 416 and known is not None:
            # The part is at least as long as the file: it is complete only if size and version match.
            whole = _total(answer.headers.get("Content-Range", ""))
            if whole == start and _validator(answer.headers) == known:
                return whole
            _discard(part, note)
            raise requests.ConnectionError("the file has changed on the server")
        if status not in (200, 206):
            raise _Refused(f"status {status} {answer.reason}", again=status in _AGAIN, wait=_retry_after(answer.headers))
        validator = _validator(answer.headers)
        if status == 206:
            span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.headers.get("Content-Range", ""))
            if known is None or span is None or int(span[1]) != start or validator not in ("", known):
                _discard(part, note)
                raise requests.ConnectionError("the server sent another piece than was asked for")
            whole, mode = (None if span[3] == "*" else int(span[3])), "ab"
        else:
            length = answer.headers.get("Content-Length", "")
            whole, mode = (int(length) if length.isdigit() else None), "wb"
            note.unlink(missing_ok=True)
        if size is not None and whole not in (None, size):
            _discard(part, note)
            raise _Refused(f"it has {whole} bytes, expected {size}", again=False)
        with part.open(mode) as out:
            if mode == "wb" and validator:
                note.write_text(json.dumps({"name": name, "validator": validator}), encoding="utf-8")
            for piece in answer.iter_content(_PIECE):
                out.write(piece)
                if stop.is_set():
                    raise _Refused("stopped", again=False)
            out.flush()
            os.fsync(out.fileno())
        return whole


def _known(part: Path, note: Path, name: str) -> str | None:
    """Return the validator (version mark) of a part; None if there is no part to resume."""
    if not part.is_file() or part.stat().st_size == 0:
        return None
    try:
        kept: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        return str(kept["validator"]) if kept["name"] == name and kept["validator"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _brief(error: OSError) -> str:
    """Return the cause of an error without the URL that requests adds."""
    cause = error.args[0] if error.args else error
    return str(getattr(cause, "reason", cause))


def _validator(headers: Mapping[str, str]) -> str:
    """Return the strong ETag, or else Last-Modified; empty if the server sends neither."""
    tag = headers.get("ETag", "")
    return tag if tag.startswith('"') else headers.get("Last-Modified", "")


def _total(content_range: str) -> int | None:
    found = re.fullmatch(r"bytes \*/(\d+)", content_range)
    return None if found is None else int(found[1])


def _retry_after(headers: Mapping[str, str]) -> float | None:
    text = headers.get("Retry-After", "")
    if text.isdigit():
        return float(text)
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0) if text else None
    except ValueError:
        return None


def _discard(part: Path, note: Path) -> None:
    part.unlink(missing_ok=True)
    note.unlink(missing_ok=True)


def copy(source: Path, path: Path, *, name: str, size: int | None = None, checksum: str | None = None) -> Stored:
    """Copy a local file to ``path`` and verify it; raise DataError if that fails or size or checksum differ."""
    part = path.with_name(path.name + ".part")
    try:
        shutil.copyfile(source, part)
        stored = verify(part, size=size, checksum=checksum, name=name)
        part.replace(path)
    except OSError as error:
        raise DataError(f"{name} can not be copied to {path} ({error}), expected a file and a place to write; mend it") from error
    finally:
        part.unlink(missing_ok=True)
    return stored
