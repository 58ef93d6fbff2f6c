"""From one word of the run file to a Dask client with its workers.

``local`` starts workers on this machine, ``slurm`` submits them as jobs (:mod:`ai4land.workers.slurm`), ``allocation`` uses
the tasks of the same srun (:mod:`ai4land.workers.srun`), and an address (``tcp://…``, ``tls://…``) joins a running cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import dask
from distributed import Client, LocalCluster

from ai4land.errors import ConfigError
from ai4land.workers.slurm import PATIENT, slurm

_SPAWN = "distributed.nanny.pre-spawn-environ"
SETTINGS = {
    f"{_SPAWN}.MALLOC_TRIM_THRESHOLD_": None,
    f"{_SPAWN}.MALLOC_ARENA_MAX": 1,
    "distributed.worker.profile.interval": "500ms",
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "2s",
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.scheduler.worker-saturation": 1.0,
    "distributed.scheduler.allowed-failures": 0,
}
"""Dask configuration for blocks that take seconds to minutes, not the milliseconds that Dask's defaults assume.

Workers let malloc keep freed memory, because every year allocates the same sizes again; a single arena keeps that memory
small. Workers are profiled twice a second instead of a hundred times. The ``worker_settings`` benchmark measures both gains.
SLURM and the kernel limit memory: a worker holds no Dask data to spill, and one paused for its memory would wait for ever. A
worker gets no block before it has a free thread, so a dying worker loses only its running blocks. The caller, not the
scheduler, decides whether to try those again.
"""


@contextmanager
def connect(
    where: str,
    *,
    workers: int,
    threads: int,
    cores: int,
    memory: float,
    folder: Path,
    tell: Callable[[str], None],
    lasting: bool = False,
) -> Iterator[Client]:
    """Connect to a cluster, with its workers, for the length of a ``with`` block.

    Parameters
    ----------
    where
        ``local``, ``slurm``, ``allocation``, or the address of a scheduler.
    workers
        How many to start; ignored for ``allocation`` and an address.
    threads, cores, memory
        Per worker: concurrent tasks and, on SLURM, the cores and bytes to request.
    folder, tell
        Folder of the run; called with messages, such as the address of the dashboard.
    lasting
        Use each job to the end of its walltime, for work that cannot move from one worker to another.

    Raises
    ------
    ConfigError
        If the cluster cannot be started or reached.
    """
    if where == "local":
        with local(workers, threads=threads) as client:
            tell(f"Dask dashboard: {client.dashboard_link}")
            yield client
    elif where == "slurm":
        shape: dict[str, Any] = {"threads": threads, "cores": cores, "memory": memory, "lasting": lasting}
        with slurm(workers, folder=folder, settings=SETTINGS, tell=tell, **shape) as client:
            yield client
    else:
        address = dask.config.get("scheduler-address", None) if where == "allocation" else where
        if address is None:
            raise ConfigError(
                "cluster is allocation, but no scheduler is there; start the command with srun: srun -n 4 ai4land ..."
            )
        try:
            # Not the default client: a failed connection would leave a dead scheduler in Dask's configuration.
            client = Client(address, timeout=30, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cluster is {where!r}, expected local, slurm, allocation or the address of a Dask scheduler: {error}"
            ) from error
        with client:
            if where != "allocation":  # whose own module has already told it
                tell(f"Dask dashboard: {client.dashboard_link}")
            yield client


@contextmanager
def local(
    workers: int, *, threads: int = 1, dashboard: bool = True, settings: Mapping[str, object] = SETTINGS
) -> Iterator[Client]:
    """Start worker processes on this machine, reachable on the loopback only, and stop them at the end.

    Each worker runs ``threads`` tasks at a time. ``dashboard`` serves Dask's dashboard at ``client.dashboard_link``.
    Scheduler and workers start with the Dask configuration ``settings``.
    """
    with dask.config.set(settings):
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=threads,
            processes=True,
            dashboard_address="127.0.0.1:0" if dashboard else None,
            host="127.0.0.1",
            security=True,  # certificates of this run: other users of the machine can reach its loopback
            config=deepcopy(dask.config.config),  # restarted workers need the settings, too
        )
    with dask.config.set(PATIENT), cluster, Client(cluster) as client:
        yield client
