"""Dask workers as SLURM jobs: refused before they wait for nothing, replaced when they die.

dask-jobqueue submits them; the shape of a job (queue, account, walltime, GPUs) is in Dask's own configuration under ``jobqueue.slurm``. It does
not replace a job that dies: :class:`Keeper` asks SLURM which jobs live, forgets the others, has new ones submitted, and says why jobs wait.
All connections are encrypted with certificates of this run, and the dashboard listens on the loopback alone.
"""

from __future__ import annotations

import getpass
import logging
import shutil
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
from distributed import Client, Security, Status

from ai4land.errors import ConfigError

_log = logging.getLogger(__name__)

_PATIENCE = 30.0
"""Seconds that a command of SLURM may take."""
_LIVE = "PENDING,RUNNING,CONFIGURING,SUSPENDED"
"""States of jobs that are or will be workers; one that completes is none."""


@contextmanager
def slurm(
    jobs: int,
    *,
    threads: int,
    cores: int,
    memory: float,
    folder: Path,
    settings: Mapping[str, object],
    tell: Callable[[str], None],
    every: float = 5.0,
) -> Iterator[Client]:
    """Submit workers, one a job, keep their number, and cancel them at the end.

    Parameters
    ----------
    jobs
        How many.
    threads
        Of a worker: tasks that it has in hand.
    cores
        Of a job, unless ``jobqueue.slurm.job-cpu`` says so.
    memory
        Of a job, bytes, unless ``jobqueue.slurm.memory`` says so.
    folder
        That all nodes see; logs and certificates go into it.
    settings
        Of Dask, that scheduler and workers start with.
    tell
        Is told where the dashboard is and why jobs wait.
    every
        Seconds between two looks at the queue.

    Raises
    ------
    ConfigError
        If SLURM is not there or would never run such a job; the error names the directive.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("cluster is slurm, but sbatch is not on the path; run on a login node, or set cluster=local")
    try:
        from dask_jobqueue.slurm import SLURMCluster
    except ImportError as error:
        raise ConfigError(f"cluster is slurm, but {error.name} is not installed; pip install 'ai4land[hpc]'") from error
    place = folder.absolute() / "slurm"
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    with dask.config.set(settings):
        inherited = dask.config.serialize({"distributed": dask.config.get("distributed")})
        cluster = SLURMCluster(
            cores=threads,
            processes=1,
            job_cpu=dask.config.get("jobqueue.slurm.job-cpu", None) or cores,
            memory=dask.config.get("jobqueue.slurm.memory", None) or f"{memory * 1.25:.0f}B",
            protocol="tls://",
            security=Security.temporary(),
            shared_temp_directory=str(place),
            log_directory=str(place),
            scheduler_options={"dashboard_address": "127.0.0.1:0"},
            job_script_prologue=[
                *(dask.config.get("jobqueue.slurm.job-script-prologue", None) or []),
                f"export DASK_INTERNAL_INHERIT_CONFIG={inherited}",
            ],
        )
    with cluster:
        check(cluster.job_script(), place)
        with Client(cluster) as client, Keeper(cluster, jobs, tell=tell, every=every):
            port = client.dashboard_link.split(":")[2].split("/")[0]
            tell(f"Dask dashboard: {client.dashboard_link}; from elsewhere: {tunnel(port)}")
            yield client


def tunnel(port: str) -> str:
    """Write the command that makes a dashboard on this machine's loopback visible on another one.

    >>> tunnel("8787").startswith("ssh -N -L 8787:127.0.0.1:8787 ")
    True
    """
    return f"ssh -N -L {port}:127.0.0.1:{port} {getpass.getuser()}@{socket.getfqdn()}"


def check(script: str, folder: Path) -> None:
    """Have SLURM look at a job without submitting it.

    Raises
    ------
    ConfigError
        If it would not run it, with the directives without which it would.
    """
    refused = _refused(script, folder)
    if refused is None:
        return
    lines = script.splitlines()
    told = [line for line in lines if line.startswith("#SBATCH") and line.split()[1] not in ("-J", "-e", "-o", "-n")]
    guilty = [line for line in told if _refused("\n".join(x for x in lines if x != line), folder) is None]
    raise ConfigError(
        f"SLURM refuses the jobs: {refused}; because of {' or '.join(guilty or told)}; change it in jobqueue.slurm of Dask's configuration "
        "(`sinfo -o '%P %c %m %G %l'` lists partitions, cores, memory, GPUs and time)"
    )


def _refused(script: str, folder: Path) -> str | None:
    path = folder / "test.sbatch"
    path.write_text(script, encoding="utf-8")
    done = _ask(["sbatch", "--test-only", str(path)])
    return None if done.returncode == 0 else " ".join((done.stderr or done.stdout).split())


def _ask(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"{command[0]} did not answer within {_PATIENCE:.0f} s; is SLURM's controller up (scontrol ping)?"
        ) from error


def queue() -> dict[str, tuple[str, str]]:
    """Ask SLURM for this user's live jobs: state and reason by job id."""
    done = _ask(["squeue", "--me", "-h", "-t", _LIVE, "-o", "%i|%T|%r"])
    if done.returncode:
        raise ConfigError(f"squeue failed: {done.stderr.strip()}")
    return {i: (state, why) for i, state, why in (line.strip().split("|", 2) for line in done.stdout.splitlines() if line)}


class Keeper:
    """Keeps a number of jobs alive while the block runs, and says why jobs wait.

    Parameters
    ----------
    cluster
        A ``SLURMCluster``.
    jobs
        How many.
    tell
        Is told what changed.
    every
        Seconds between two looks.
    """

    def __init__(self, cluster: Any, jobs: int, *, tell: Callable[[str], None], every: float = 5.0) -> None:
        self._cluster, self._jobs, self._tell, self._every = cluster, jobs, tell, every
        self._over, self._said = threading.Event(), ""
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def __enter__(self) -> Keeper:
        self._cluster.scale(jobs=self._jobs)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._every):
            try:
                self.look()
            except ConfigError as error:  # the controller may be away for a while
                _log.warning("%s", error)

    def look(self) -> None:
        """Look once: forget dead jobs, submit as many anew, say what waits."""
        ours: dict[Any, str] = self._cluster.sync(
            self._submitted
        )  # before the queue is asked: what is submitted meanwhile is not dead
        live = queue()
        dead = [name for name, job in ours.items() if job not in live]
        if dead:
            self._tell(f"{len(dead)} jobs are gone ({', '.join(ours[name] for name in dead)}); submitting as many")
        self._cluster.sync(self._replace, dead)
        waiting = Counter(why for i, (state, why) in live.items() if i in ours.values() and state == "PENDING")
        said = (
            f"{waiting.total()} of {self._jobs} jobs wait: {', '.join(f'{n} for {why}' for why, n in waiting.items())}"
            if waiting
            else ""
        )
        if said and said != self._said:
            self._tell(said)
        self._said = said

    async def _submitted(self) -> dict[Any, str]:
        return {name: str(job.job_id) for name, job in self._cluster.workers.items() if getattr(job, "job_id", None)}

    async def _replace(self, dead: list[Any]) -> None:
        for name in dead:
            # Left to Dask, the worker would first be retired, which does not end if it is on its way out.
            self._cluster.worker_spec.pop(name, None)
            self._cluster.workers.pop(name).status = Status.closed
        if len(self._cluster.worker_spec) < self._jobs:
            self._cluster.scale(jobs=self._jobs)
