"""Where blocks are computed: from one word of the run file to a Dask client with its workers.

``local`` starts workers on this machine, ``slurm`` submits them as jobs (:mod:`ai4land.workers.slurm`), ``allocation`` finds them among the tasks of
the same srun (:mod:`ai4land.workers.srun`), and an address (``tcp://…``, ``tls://…``) joins a cluster that is there already.
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
"""Dask's own settings are for tasks of milliseconds; a block takes seconds to minutes. Workers leave it to the C library when to give
memory back, as a year asks for the sizes of the year before (in one arena, so that what is kept stays small), and are looked at twice a
second in place of a hundred times. What both gain is ``worker_settings`` of the benchmarks. They hold no data of Dask's that it could put aside: a worker that it
paused for its memory would wait for ever, so memory is left to SLURM and the kernel. A worker gets no block before it has a thread for it, so that one that dies takes
along what it had in hand and no more; whether that is tried again is up to who submitted it, not to the scheduler."""


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
    """Get workers of a cluster for a while.

    Parameters
    ----------
    where
        ``local``, ``slurm``, ``allocation``, or the address of a scheduler.
    workers
        How many; of no use where they are there already.
    threads, cores, memory
        Of a worker: tasks in hand, and on SLURM the cores and bytes that it asks for.
    folder
        Of the run.
    tell
        Is told where the dashboard is.
    lasting
        Whether jobs are to be used up to the end of their walltime, for work that cannot move from one worker to another.

    Raises
    ------
    ConfigError
        If the cluster cannot be had.
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
            # Not the default: one that cannot connect would leave Dask's settings with a scheduler that is not there.
            client = Client(address, timeout=30, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cluster is {where!r}, expected local, slurm, allocation or the address of a Dask scheduler: {error}"
            ) from error
        with client:
            if where != "allocation":  # there it has been told
                tell(f"Dask dashboard: {client.dashboard_link}")
            yield client


@contextmanager
def local(
    workers: int, *, threads: int = 1, dashboard: bool = True, settings: Mapping[str, object] = SETTINGS
) -> Iterator[Client]:
    """Start workers on this machine, each a process, reached on the loopback only, and stop them at the end.

    Parameters
    ----------
    workers
        Processes.
    threads
        Of each: tasks that it has in hand.
    dashboard
        Whether Dask's dashboard is served (``client.dashboard_link``).
    settings
        Of Dask, that scheduler and workers start with.
    """
    with dask.config.set(settings):
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=threads,
            processes=True,
            dashboard_address="127.0.0.1:0" if dashboard else None,
            host="127.0.0.1",
            security=True,  # certificates of this run: other users of the machine reach its loopback, too
            config=deepcopy(dask.config.config),  # a worker that is started again needs them, too
        )
    with dask.config.set(PATIENT), cluster, Client(cluster) as client:
        yield client
