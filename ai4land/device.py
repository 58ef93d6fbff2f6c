"""The device of a process: the CPU, the only GPU that it sees, or one of its own where the processes of a node see several.

A job with one GPU sees that one. In a job of a whole node several workers see all GPUs, and nothing tells them apart; each
takes a slot: the first of a row of lock files that nobody holds. The kernel frees a lock when its holder dies, however it
dies, so that a worker that is started again gets the GPU of the one before it.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import socket
import stat
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ai4land.errors import ConfigError

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slot:
    """A place among the processes of a node that share its devices; held until it is released or the process ends.

    ``number`` counts the places from 0, ``index`` is that of the device, ``handle`` the open lock file.
    """

    number: int
    index: int
    handle: int

    def release(self) -> None:
        """Leave the place to another process; only once."""
        os.close(self.handle)


def claim(devices: int, folder: Path | None = None) -> Slot:
    """Take the first free slot; processes beyond the number of devices share them by turn.

    Parameters
    ----------
    devices
        That the processes see, all of them the same ones.
    folder
        Of the lock files; default: :func:`slot_folder`.

    Raises
    ------
    ConfigError
        If the folder is not one that this user alone can write.
    """
    folder = slot_folder() if folder is None else folder
    place, number = _opened(folder), 0
    try:
        while (handle := _lock(place, number, folder)) is None:
            number += 1
    finally:
        os.close(place)
    index = number % devices
    if number >= devices:
        _log.warning("%d processes share %d devices; this one shares device %d", number + 1, devices, index)
    return Slot(number, index, handle)


def _lock(place: int, number: int, folder: Path) -> int | None:
    """Lock the file of a slot: its handle, or None if another process holds it."""
    handle = os.open(f"slot-{number}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=place)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError as error:
        os.close(handle)
        raise ConfigError(
            f"folder {folder} cannot hold locks ({error.strerror}), expected one on a local disk; set TMPDIR to one"
        ) from error
    return handle


def slot_folder() -> Path:
    """Name the folder that the processes with the same devices have in common: of a user, a job, a node and what it shows of its devices."""
    seen = f"{socket.gethostname()} {os.environ.get('CUDA_VISIBLE_DEVICES')}"
    name = f"ai4land-{os.geteuid()}-{os.environ.get('SLURM_JOB_ID', 'none')}-{hashlib.sha256(seen.encode()).hexdigest()[:12]}"
    return Path(tempfile.gettempdir()) / name


def _opened(folder: Path) -> int:
    """Open the folder of the lock files, made if need be; what another user could have put there is refused."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(
            f"{folder} is not a folder, expected one of this user's ({error.strerror}); set TMPDIR to another place"
        ) from error
    found = os.fstat(handle)
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        os.close(handle)
        raise ConfigError(
            f"folder {folder} is of user {found.st_uid} with mode {stat.S_IMODE(found.st_mode):o}, expected user {os.geteuid()} "
            "and mode 700; remove it, or set TMPDIR to another place"
        )
    return handle


_guard = threading.Lock()
_slot: Slot | None = None


def device() -> torch.device:
    """Choose the device of this process, always the same one, and make it the calling thread's current one.

    The CPU where there is no CUDA device, ``LOCAL_RANK`` where a launcher such as torchrun set it, the only device where one
    is visible, else a slot of :func:`claim`. Ask where the network is to run, and not in a process that merely hands out
    work: what asks holds its slot until :func:`release` or its end.
    """
    import torch  # so that processes which merely hold a slot start without it

    global _slot
    if not torch.cuda.is_available():
        return torch.device("cpu")
    devices, rank = torch.cuda.device_count(), os.environ.get("LOCAL_RANK")
    with _guard:
        if rank is not None:
            index = int(rank) % devices
            if int(rank) >= devices:
                _log.warning("LOCAL_RANK is %s with %d devices; it shares device %d", rank, devices, index)
        elif devices == 1:
            index = 0
        else:
            _slot = _slot or claim(devices)
            index = _slot.index
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def release() -> None:
    """Leave this process's slot to another one, such as a worker that it starts after its own work on the device is done."""
    global _slot
    with _guard:
        if _slot is not None:
            _slot.release()
        _slot = None


def _forget() -> None:
    """Leave the parent's slot to the parent: after a fork the child has a copy of its handle and none of its threads."""
    global _guard
    _guard = threading.Lock()
    release()


os.register_at_fork(after_in_child=_forget)
