"""A run inside one SLURM allocation: ``srun -n 6 ai4land run RUN.yaml cluster=allocation``.

The first task of the step is Dask's scheduler, the second runs the command, and the others are workers, through
dask-jobqueue's ``SLURMRunner``. Connections are encrypted with certificates of this step: the first task writes them to a
private folder of the run. The scheduler ends whenever the command's task ends, and the workers end with the scheduler.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
from distributed import Client, Security
from distributed.core import rpc

from ai4land.errors import ConfigError
from ai4land.places import write_atomically
from ai4land.workers.slurm import dashboard, private

if TYPE_CHECKING:
    from distributed import Scheduler

_PATIENCE = 300.0
"""Seconds that tasks wait for each other at the start."""
_KEYS = ("ca_file", "client_cert", "client_key", "worker_cert", "worker_key", "scheduler_cert", "scheduler_key")


@contextmanager
def allocation(*, folder: Path, threads: int, settings: Mapping[str, object], tell: Callable[[str], None]) -> Iterator[None]:
    """Play this task's role in the step: the second task enters the block, all other processes end here.

    In the block, ``ai4land.workers.cluster.connect("allocation", ...)`` yields a client of the scheduler.

    Parameters
    ----------
    folder, tell
        Folder of the run on a file system that all nodes share; called with the address of the dashboard.
    threads, settings
        Concurrent tasks per worker, and the Dask configuration that scheduler and workers start with.

    Raises
    ------
    ConfigError
        If this process is not a task of srun, or srun has fewer than three tasks.
    """
    try:
        from dask_jobqueue.slurm import SLURMRunner
    except ImportError as error:
        raise ConfigError(f"cluster is allocation, but {error.name} is not installed; pip install 'ai4land[hpc]'") from error
    rank, step = _task()
    place = folder.absolute() / "slurm" / f"step-{step}"
    if rank == 0:
        _write(place)
    else:
        _wait(place / "host")
    files = {key: str(place / f"{key}.pem") for key in _KEYS}
    security = Security(require_encryption=True, **{f"tls_{key}": file for key, file in files.items()})

    class Runner(SLURMRunner):
        """A runner whose scheduler ends with its client, and whose client can end an encrypted or a dead scheduler."""

        async def on_scheduler_start(self, scheduler: Scheduler) -> None:
            self._watch = asyncio.create_task(_end_with_client(scheduler))

        async def before_client_start(self) -> None:
            self.scheduler_comm: Any = rpc(self.scheduler_address, connection_args=security.get_connection_args("client"))

        async def _close(self) -> None:
            with suppress(OSError):
                await super()._close()

    there = {"interface": dask.config.get("jobqueue.slurm.interface", None), "security": security, "protocol": "tls://"}
    encrypted = {
        "distributed.comm.require-encryption": True,
        "distributed.comm.tls.ca-file": files["ca_file"],
        "distributed.comm.tls.client.cert": files["client_cert"],
        "distributed.comm.tls.client.key": files["client_key"],
    }
    with dask.config.set({**settings, **encrypted}):
        if rank > 0:
            _wait(place / "scheduler.json", holds=_is_json)
        try:
            runner = Runner(  # ends the process of every task but the second
                scheduler_file=str(place / "scheduler.json"),
                scheduler_options={**there, "dashboard_address": "127.0.0.1:0"},
                worker_class="distributed.Nanny",
                worker_options={
                    **there,
                    "nthreads": threads,
                    "memory_limit": None,  # SLURM limits the memory of a task
                    "silence_logs": logging.WARNING,
                },
            )
            address = runner.scheduler_address
            with (
                runner,
                dask.config.set({"scheduler-address": address}),
                Client(address, set_as_default=False) as client,  # shows the scheduler that this task is alive
            ):
                tell(dashboard(client, (place / "host").read_text(encoding="utf-8").strip()))
                yield
                client.run(_leave, nanny=True)
        finally:
            if rank < 2:
                shutil.rmtree(place, ignore_errors=True)


def _leave(dask_worker: Any) -> None:
    """Close a worker and its nanny in an orderly way, after this call has been answered."""
    dask_worker.loop.call_later(0.1, dask_worker.close)


def _task() -> tuple[int, str]:
    """Return this task's number in its step, and a unique name of the step."""
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID", "SLURM_STEP_ID")
    rank, tasks, job, step = (os.environ.get(name) for name in names)
    if None in (rank, tasks, job, step):
        raise ConfigError(
            "cluster is allocation, but this process is no task of srun; inside a job (sbatch, salloc) start it with "
            "srun -n 4 ai4land run RUN.yaml cluster=allocation, or set cluster=slurm or cluster=local"
        )
    if int(tasks or 0) < 3:
        if rank != "0":
            sys.exit(1)  # the first task reports it
        raise ConfigError(
            f"cluster is allocation, but srun has {tasks} tasks, expected 3 or more: the scheduler, the command, and a worker or more; "
            "srun -n N with N two more than the workers"
        )
    return int(rank or 0), f"{job}.{step}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"


def _write(place: Path) -> None:
    """Write certificates for the other tasks, then this node's name, which signals that everything is ready."""
    private(place.parent)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(mode=0o700)
    made = Security.temporary()
    for key in _KEYS:
        write_atomically(place / f"{key}.pem", getattr(made, f"tls_{key}").encode(), mode=0o600)
    write_atomically(place / "host", socket.getfqdn().encode(), mode=0o600)


def _wait(path: Path, *, holds: Callable[[Path], bool] = Path.is_file) -> None:
    end = time.monotonic() + _PATIENCE
    while not holds(path):
        if time.monotonic() > end:
            raise ConfigError(
                f"{path} is not there after {_PATIENCE:.0f} s, expected it from the first task; is the folder of the run on a file system "
                "that all nodes see, and did the first task start?"
            )
        time.sleep(0.1)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


async def _end_with_client(scheduler: Any) -> None:
    """Close the scheduler once its client is gone, or if none connects."""
    left = _PATIENCE
    while left > 0:
        await asyncio.sleep(0.5)
        others = [key for key in scheduler.clients if key != "fire-and-forget"]
        left = 5.0 if others else left - 0.5
    await scheduler.close(reason="its client is gone")
