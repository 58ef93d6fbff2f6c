"""The device of a process: the CPU, the only GPU that it sees, or one of its own if the processes of a node see several.

In a job with one GPU every process sees that one. In a job of a whole node several workers see all GPUs, and nothing tells them apart, so each
takes a slot: the first of a row of lock files that no other process holds. The kernel frees a lock when its holder dies, however it dies,
and a worker that is started again gets the GPU of the one before it.
"""

from __future__ import annotations

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
from typing import IO, TYPE_CHECKING

from ai4land.errors import ConfigError
from ai4land.places import Unlockable, lock

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slot:
    """A place among the processes of a node that share its devices, held until it is released or the process ends.

    ``number`` counts the places from 0, ``index`` is that of the device, ``file`` the locked file.
    """

    number: int
    index: int
    file: IO[str]

    def release(self) -> None:
        """Leave the place to another process."""
        self.file.close()


def take_slot(devices: int, folder: Path | None = None) -> Slot:
    """Take the first free slot; processes beyond the number of devices share them in turn.

    Parameters
    ----------
    devices
        Number of devices that the processes see, all of them the same ones.
    folder
        Of the lock files; default: :func:`slot_folder`.

    Raises
    ------
    ConfigError
        If the folder is writable for others than this user, or its file system has no locks.
    """
    folder, number = slot_folder() if folder is None else folder, 0
    _make_private(folder)
    while True:
        try:
            file = lock(folder / f"slot-{number}")
            break
        except BlockingIOError:
            number += 1
        except Unlockable as error:
            raise ConfigError(f"{error}: set TMPDIR to a folder of a local disk") from error
    index = number % devices
    if number >= devices:
        _log.warning("%d processes share %d devices; this one shares device %d", number + 1, devices, index)
    return Slot(number, index, file)


def slot_folder() -> Path:
    """Folder that the processes with the same devices have in common: those of one user, job, node and set of visible devices."""
    seen = f"{socket.gethostname()} {os.environ.get('CUDA_VISIBLE_DEVICES')}"
    name = f"ai4land-{os.geteuid()}-{os.environ.get('SLURM_JOB_ID', 'none')}-{hashlib.sha256(seen.encode()).hexdigest()[:12]}"
    return Path(tempfile.gettempdir()) / name


def _make_private(folder: Path) -> None:
    """Make the folder of the lock files; refuse one that another user could have put there."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{folder} is not a folder, expected one of this user's; set TMPDIR to another folder")
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(
            f"folder {folder} belongs to user {found.st_uid} with mode {stat.S_IMODE(found.st_mode):o}, expected user {os.geteuid()} "
            "and mode 700; remove it, or set TMPDIR to another folder"
        )


_guard = threading.Lock()
_slot: Slot | None = None


def device() -> torch.device:
    """Choose the device of this process, always the same one, and make it the calling thread's current one.

    It is the CPU without a CUDA device, that of ``LOCAL_RANK`` if a launcher such as torchrun set it, the only one if one is
    visible, else that of a slot (:func:`take_slot`). Call this only where the network runs: the process then holds its slot
    until :func:`release` or its end.
    """
    import torch  # late: a process that only holds a slot starts without it

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
            _slot = _slot or take_slot(devices)
            index = _slot.index
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def release() -> None:
    """Leave this process's slot to another one, such as a worker that it starts when its own work on the device is done."""
    global _slot
    with _guard:
        if _slot is not None:
            _slot.release()
        _slot = None


def _forget() -> None:
    """Close the child's copy of its parent's lock file after a fork; the lock stays with the parent."""
    global _guard
    _guard = threading.Lock()
    release()


os.register_at_fork(after_in_child=_forget)
