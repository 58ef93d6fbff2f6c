"""Processes that train one network together, each on a part of every batch, with the result of one process that has it all.

Batch normalisation takes its statistics over the whole batch (:class:`ai4land.norm.Norm`), the loss is divided by the weight of the whole
batch, and the gradients of all processes are added up in one buffer whose layout never changes. So the number of processes
changes the weights by rounding only, and a training that resumes with as many processes as before gives the same bits.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ai4land.norm import _LONG, Group

_log = logging.getLogger(__name__)

TORCHRUN = "TORCHELASTIC_RUN_ID"
"""Environment variable by which a process knows that torchrun started it."""


@contextmanager
def joined(store: Any, *, rank: int, world: int, timeout: float) -> Iterator[Group]:
    """Be one of a group for a while.

    Parameters
    ----------
    store
        That all processes of the group reach, and nobody else uses the keys of.
    rank, world
        As of :class:`Group`.
    timeout
        Seconds that a process waits for the others in one operation before it gives up with a ``RuntimeError``.
    """
    if world == 1:
        yield Group()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    try:
        yield Group(rank, world, store)
    finally:
        dist.destroy_process_group()


@contextmanager
def torchrun_group(*, timeout: float) -> Iterator[Group]:
    """Be one of the group that torchrun started; alone where it did not."""
    if TORCHRUN not in os.environ:
        yield Group()
        return
    store, rank, world = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    with joined(_fresh(store, rank=rank, world=world), rank=rank, world=world, timeout=timeout) as group:
        yield group


def _fresh(store: Any, *, rank: int, world: int) -> Any:
    """Find a part of a store that none but the living processes have written to.

    torchrun keeps its store when it starts processes again, with the addresses of dead ones in it. So every process asks with a number
    of its own, and the first one answers such questions with the name of a part until all have heard it.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"ai4land/{rank}", own)
        store.wait([f"ai4land/{own}"], _LONG)
        name = store.get(f"ai4land/{own}").decode()
        store.set(f"ai4land/{name}/{rank}", "heard")
        return PrefixStore(name, store)
    for other in range(1, world):
        while not store.check([f"ai4land/{own}/{other}"]):
            if store.check([f"ai4land/{other}"]):
                store.set(f"ai4land/{store.get(f'ai4land/{other}').decode()}", own)
            time.sleep(0.05)
    return PrefixStore(own, store)


def use_interface(host: str) -> None:
    """Have gloo and NCCL talk over the network interface that has an address of this machine, unless the environment says which."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == host for a in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def job_end() -> float | None:
    """Ask when SLURM will end the job that this process is in, in seconds since 1970; None outside of a job or without a limit."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    command = ["squeue", "-h", "-j", job, "-o", "%e"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)  # noqa: S603
        return time.mktime(time.strptime(done.stdout.strip(), "%Y-%m-%dT%H:%M:%S"))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        _log.warning(
            "when the job ends is not known (%s): it is not left in time, but training goes on from its last state", error
        )
        return None
