"""Where blocks are computed: a Dask client with its workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy

import dask
from distributed import Client, LocalCluster

_SPAWN = "distributed.nanny.pre-spawn-environ"
SETTINGS = {
    f"{_SPAWN}.MALLOC_TRIM_THRESHOLD_": None,
    f"{_SPAWN}.MALLOC_ARENA_MAX": 1,
    "distributed.worker.profile.interval": "500ms",
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "2s",
}
"""Dask's own settings are for tasks of milliseconds; a block takes seconds to minutes. Workers leave it to the C library when to give
memory back, as a year asks for the sizes of the year before (in one arena, so that what is kept stays small), and are looked at twice a
second in place of a hundred times. What both gain is ``worker_settings`` of the benchmarks."""


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
            config=deepcopy(dask.config.config),  # a worker that is started again needs them, too
        )
    with cluster, Client(cluster) as client:
        yield client
