"""A lock on the folder of a run: only one process at a time may write there, a second one is refused.

The lock is ``flock``, which the system releases however a process ends. On a file system without locks, a file naming the host and
the process replaces it: one left by a dead process on this host is taken over, one from another host is not.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

from ai4land.errors import MismatchError
from ai4land.places import Unlockable, lock

_FILE = "claim"
_HELD: set[Path] = set()
"""Folders that this process holds; one verb may call another."""


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Lock the folder of a run while the block runs; of the processes of torchrun, only the first takes the lock.

    Raises
    ------
    MismatchError
        If another process holds it.
    """
    folder = folder.absolute()
    if folder in _HELD or os.environ.get("RANK", "0") != "0":
        yield
        return
    file, path = _lock(folder / _FILE)
    _HELD.add(folder)
    try:
        with file:
            try:
                yield
            finally:
                path.unlink(missing_ok=True)  # before the lock goes
    finally:
        _HELD.discard(folder)
        with suppress(OSError):
            folder.rmdir()  # where nothing came of it


def _lock(path: Path) -> tuple[IO[str], Path]:
    while True:
        try:
            file = lock(path)
        except BlockingIOError as error:
            raise _refusal(path) from error
        except Unlockable:
            path.unlink(missing_ok=True)
            own = path.with_name(f"{_FILE}.host")
            return _create(own), own
        # The process that held the file before may have removed it meanwhile.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            file.truncate(0)
            return _signed(file), path
        file.close()


def _create(path: Path) -> IO[str]:
    """Create a file that no other process has."""
    while True:
        try:
            return _signed(path.open("x", encoding="utf-8"))
        except FileExistsError as error:
            holder = _holder(path)
            if holder.get("host") != socket.gethostname() or psutil.pid_exists(int(holder.get("pid", 0))):
                raise _refusal(path) from error
            path.unlink(missing_ok=True)


def _signed(file: IO[str]) -> IO[str]:
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}))
    file.flush()
    return file


def _holder(path: Path) -> dict[str, str]:
    try:
        return {str(k): str(v) for k, v in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _refusal(path: Path) -> MismatchError:
    who = _holder(path)
    return MismatchError(
        f"folder {path.parent} is in use by process {who.get('pid', '?')} on {who.get('host', '?')} since {who.get('since', '?')}, "
        f"expected no other process; wait for its end or stop it. If it no longer exists, delete {path}"
    )
