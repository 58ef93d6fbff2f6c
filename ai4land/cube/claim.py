"""Let only one run at a time write a cube: the run holds a claim, and every task checks it before writing.

On a file system the claim is a lock, which the system releases when its holder dies. In an object store, and on file systems
without locks, it is an object that its holder renews every few seconds; another run may take over a stale one. Tasks that
outlive their run then stop writing.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil
from zarr.core.buffer import cpu
from zarr.core.sync import sync

from ai4land.cube.ledger import CLAIM, ledger_path
from ai4land.errors import MismatchError, StoreError
from ai4land.places import Place, Unlockable, delete, folder_of, lock, open_place, read, write, writing

_BEAT = 5.0  # seconds between renewals of a claim
_STALE = 40.0  # seconds without renewal before a takeover: longer than the store may be unavailable


@contextmanager
def claim(place: Place, *, held: str | None = None, tell: Callable[[str], None] = lambda _: None) -> Iterator[str]:
    """Hold the claim on a cube while the ``with`` block runs; yield its token for :func:`check_claim`.

    Parameters
    ----------
    held
        Token of a claim that the caller already holds: it is checked, used and left with the caller. None: take the claim.
    tell
        Called with a message when waiting for the claim of another run.

    Raises
    ------
    MismatchError
        If another run holds the claim.
    """
    if held is not None:
        check_claim(place, held)
        yield held
        return
    beside, token = ledger_path(place), uuid.uuid4().hex
    who = {
        "token": token,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    folder = folder_of(beside)
    file = None if folder is None else _lock(folder, place)
    if file is not None:
        with file:
            file.seek(0)
            file.truncate()
            file.write(json.dumps(who))
            file.flush()
            try:
                yield token
            finally:
                file.truncate(0)  # tasks that outlive this run stop writing
        return
    _take(beside, place, who, tell)
    over = threading.Event()
    beating = threading.Thread(target=_beat, args=(beside, who, over), name="claim", daemon=True)
    beating.start()
    try:
        yield token
    finally:
        over.set()
        beating.join()
        with suppress(StoreError):
            if _held(beside).get("token") == token:
                delete(beside, CLAIM)


def check_claim(place: Place, token: str) -> None:
    """Check before a write that the run still holds the cube.

    Raises
    ------
    MismatchError
        If it no longer does.
    """
    if _held(ledger_path(place)).get("token") != token:
        raise MismatchError(
            f"cube {place} is held by another run by now, this task is of one before it; nothing is written any more"
        )


def _held(beside: Place) -> dict[str, Any]:
    return _holder(read(beside, CLAIM) or b"{}")


def _holder(content: bytes) -> dict[str, Any]:
    """Parse the holder of a claim; empty if the claim is damaged."""
    try:
        found: Any = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _refuse(place: Place, who: dict[str, Any]) -> MismatchError:
    return MismatchError(
        f"cube {place} is being made by another run (process {who.get('pid', '?')} on {who.get('host', '?')} since {who.get('since', '?')}), "
        "expected no other; wait for it or stop it, then run again: what is done stays done"
    )


def _lock(folder: Path, place: Place) -> IO[str] | None:
    """Lock the claim's file; None if the file system has no locks."""
    try:
        return lock(folder / CLAIM)
    except Unlockable:
        return None
    except BlockingIOError as error:
        raise _refuse(place, _held(folder)) from error


def _take(beside: Place, place: Place, who: dict[str, Any], tell: Callable[[str], None]) -> None:
    """Take a free or abandoned claim in an object store."""
    before = read(beside, CLAIM)
    if before is not None:
        holder = _holder(before)
        pid = holder.get("pid")
        if not (holder.get("host") == who["host"] and isinstance(pid, int) and not psutil.pid_exists(pid)):
            tell(
                f"cube {place} was held by process {pid} on {holder.get('host')}; waiting up to {_STALE:.0f} s for a sign of life"
            )
            end = time.monotonic() + _STALE
            while time.monotonic() < end:
                now = read(beside, CLAIM)
                if now is None:
                    break
                if now != before:
                    raise _refuse(place, _holder(now))
                time.sleep(_BEAT / 5)
        if read(beside, CLAIM) == before:
            delete(beside, CLAIM)
    content = cpu.Buffer.from_bytes(json.dumps({**who, "beat": 0}).encode())
    with writing(place):
        sync(open_place(beside).set_if_not_exists(CLAIM, content))
    winner = _held(beside)
    if winner.get("token") != who["token"]:
        raise _refuse(place, winner)


def _beat(beside: Place, who: dict[str, Any], over: threading.Event) -> None:
    beat = 0
    while not over.wait(_BEAT):
        beat += 1
        with suppress(Exception):  # the store may be unavailable for a while
            if _held(beside).get("token") not in (who["token"], None):
                return
            write(beside, CLAIM, json.dumps({**who, "beat": beat}).encode())
