"""Processes that train one network together, each on a part of every batch, with the result of one process that has it all.

Batch normalisation takes its statistics over the whole batch (:class:`ai4land.model.norm.Norm`), the loss is divided by the weight of the whole
batch, and the gradients of all processes are added up in one buffer whose layout never changes. So the number of processes
changes the weights by rounding only, and a training that resumes with as many processes as before gives the same bits.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ai4land.errors import ConfigError
from ai4land.model.norm import Group

_log = logging.getLogger(__name__)

TORCHRUN = "TORCHELASTIC_RUN_ID"
"""Environment variable by which a process knows that torchrun started it."""
ARRIVAL = 120.0
"""Seconds, at least, within which all processes of a group have to arrive: their libraries may load slowly."""


@contextmanager
def joined(store: Any, *, rank: int, world: int, timeout: float) -> Iterator[Group]:
    """Join a group for the length of a ``with`` block.

    Parameters
    ----------
    store
        Key-value store that all processes of the group reach and that nobody else writes to.
    rank, world
        As of :class:`Group`.
    timeout
        Seconds that a process waits for the others in one operation, before a ``RuntimeError``.
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
    """Join the group that torchrun started; without torchrun, a process is alone.

    Raises
    ------
    ConfigError
        If torchrun restarts processes that fail, and lets them find what the dead ones wrote to its key-value store.
    """
    if TORCHRUN not in os.environ:
        yield Group()
        return
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ConfigError(
            "torchrun --max-restarts keeps the key-value store of the processes that died, expected a new one for each start; "
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, or leave out --max-restarts"
        )
    store, rank, world = next(rendezvous("env://", timeout=timedelta(seconds=max(timeout, ARRIVAL))))
    with joined(store, rank=rank, world=world, timeout=timeout) as group:
        yield group


def use_interface(host: str) -> None:
    """Make gloo and NCCL use the network interface with this address of the machine, unless the environment names one."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == host for a in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
