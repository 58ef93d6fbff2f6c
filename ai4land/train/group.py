"""Several processes that train one network, each on a part of every batch, as one process would on the whole.

Batch normalisation uses the statistics of the whole batch (:class:`ai4land.model.norm.Norm`), the loss is divided by the
weight of the whole batch, and gradients are added up in one buffer of fixed layout. The number of processes therefore
changes the weights only by rounding, and training that resumes with the same number gives the same bits.
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
"""Environment variable that torchrun sets in its processes."""
ARRIVAL = 120.0
"""Least time in seconds for all processes of a group to arrive, because their libraries may load slowly."""


@contextmanager
def joined(store: Any, *, rank: int, world: int, timeout: float) -> Iterator[Group]:
    """Join a group of processes for the length of a ``with`` block; ``rank`` and ``world`` are as in :class:`Group`.

    All processes of the group, and no others, must use ``store``, a key-value store. A process that waits longer than
    ``timeout`` seconds for the others in one operation raises RuntimeError.
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
    """Join the group that torchrun started; without torchrun, yield a group of one.

    Raises ConfigError if torchrun would let restarted processes see the key-value store of dead ones.
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
    """Make gloo and NCCL use the network interface with this address, unless the environment names one."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == host for a in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
