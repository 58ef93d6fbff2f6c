"""The device of a process: the CPU, the only visible GPU, or one GPU of several that the processes of a node share.

If each process sees one GPU, it takes that. If several workers see all GPUs of a node, each takes a *slot*: the first lock
file that no other process holds. The kernel frees a lock when its holder dies, so a restarted worker gets the GPU of its
predecessor.
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
    """A place among the processes that share a node's devices, held until it is released or the process ends.

    ``number`` counts places from 0, ``index`` is the device, ``file`` the locked file.
    """

    number: int
    index: int
    file: IO[str]

    def release(self) -> None:
        """Free the slot for another process."""
        self.file.close()


def take_slot(devices: int, folder: Path | None = None) -> Slot:
    """Take the first free slot; processes beyond the number of visible devices share them in turn.

    All processes must see the same devices. Lock files are in ``folder`` (default: :func:`slot_folder`). Raises ConfigError
    if others than this user can access the folder, or its file system has no locks.
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
    """Return the folder shared by the processes of one user, job, node and set of visible devices."""
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
    """Choose the device of this process, always the same one, and make it current in the calling thread.

    It is the CPU if there is no CUDA device; else the one of ``LOCAL_RANK``, which launchers such as torchrun set; else the
    only visible one; else that of a slot (:func:`take_slot`). Call this only where the network runs, because the process
    then holds its slot until :func:`release` or its end.
    """
    import torch  # late: a process that only holds a slot does not need it

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
    """Free this process's slot, for example for a worker that it starts after its own work on the device."""
    global _slot
    with _guard:
        if _slot is not None:
            _slot.release()
        _slot = None


def _forget() -> None:
    """Close a forked child's copy of its parent's lock file; the parent keeps the lock."""
    global _guard
    _guard = threading.Lock()
    release()


os.register_at_fork(after_in_child=_forget)
