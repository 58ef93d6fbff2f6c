"""Dask workers as SLURM jobs: refused before they wait for nothing, replaced when they end, none left behind.

dask-jobqueue submits them; the shape of a job (queue, account, walltime, GPUs) is in Dask's own configuration under ``jobqueue.slurm``.
:mod:`ai4land.workers.jobs` keeps their number. All connections are encrypted with certificates of this run, and the dashboard listens on the
loopback alone. Each job's comment says of which folder and scheduler it is, so that the jobs of a client that was killed are
found and cancelled by the next one.
"""

from __future__ import annotations

import getpass
import importlib
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import dask
from distributed import Client, Security, Status

from ai4land.errors import ConfigError
from ai4land.workers.jobs import Keeper, ask, queue

_log = logging.getLogger(__name__)

PATIENT = {"distributed.deploy.lost-worker-timeout": "5 minutes"}
"""Of Dask, as long as a cluster is there: a worker that died has minutes to start anew. Dask's 15 s would end one for good that is just starting,
from slow storage, or because it died once more."""
_CLEARING = 120.0
"""Seconds that jobs may take to end once they are cancelled; SLURM kills after 30 as it comes."""


@contextmanager
def slurm(
    workers: int,
    *,
    threads: int,
    cores: int,
    memory: float,
    folder: Path,
    settings: Mapping[str, object],
    tell: Callable[[str], None],
    every: float = 5.0,
    lasting: bool = False,
) -> Iterator[Client]:
    """Submit workers, one a job or ``jobqueue.slurm.processes``, keep their number, and cancel them at the end.

    Parameters
    ----------
    workers
        How many.
    threads
        Of a worker: tasks that it has in hand.
    cores
        Of a worker, unless ``jobqueue.slurm.job-cpu`` says those of a job.
    memory
        Of a worker, bytes, unless ``jobqueue.slurm.memory`` says that of a job.
    folder
        That all nodes see; logs and certificates go into it.
    settings
        Of Dask, that scheduler and workers start with.
    tell
        Is told where the dashboard is and why jobs wait.
    every
        Seconds between two looks at the queue.
    lasting
        Whether workers stay until SLURM ends them, as for work that cannot move to others; else they leave before their
        walltime is over (:func:`lifetime`).

    Raises
    ------
    ConfigError
        If SLURM is not there or would never run such a job (the error names the directive), if another client runs jobs for
        the same folder, or if jobs end before they are workers.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("cluster is slurm, but sbatch is not on the path; run on a login node, or set cluster=local")
    try:
        from dask_jobqueue.slurm import SLURMCluster, SLURMJob
    except ImportError as error:
        raise ConfigError(f"cluster is slurm, but {error.name} is not installed; pip install 'ai4land[hpc]'") from error
    place = folder.absolute() / "slurm"
    private(place)
    clear(place, tell=tell)

    class Job(SLURMJob):
        """One that says of which folder and scheduler it is, and remembers why SLURM did not take it."""

        def __init__(self, scheduler: str | None = None, name: str | None = None, **options: Any) -> None:
            super().__init__(scheduler, name, **options)
            self.job_header = f"{self.job_header}\n#SBATCH --comment={shlex.quote(f'{place} {scheduler}')}"

        async def start(self) -> None:
            try:
                await super().start()
            except RuntimeError as error:
                self.refused = str(error).strip().rpartition("\n")[2]
                self.status = Status.running

    extra = list(dask.config.get("jobqueue.slurm.worker-extra-args", None) or [])
    if not (lasting or dask.config.get("distributed.worker.lifetime.duration", None) or any("--lifetime" in a for a in extra)):
        extra += lifetime(dask.config.get("jobqueue.slurm.walltime", None))
    processes = _processes()
    jobs = -(-workers // processes)
    with dask.config.set(settings):
        inherited = dask.config.serialize({"distributed": dask.config.get("distributed")})
        cluster = SLURMCluster(
            job_cls=cast("Any", Job),
            cores=threads * processes,
            processes=processes,
            job_cpu=dask.config.get("jobqueue.slurm.job-cpu", None) or cores * processes,
            memory=dask.config.get("jobqueue.slurm.memory", None) or f"{memory * 1.25 * processes:.0f}B",
            protocol="tls://",
            security=Security.temporary(),
            shared_temp_directory=str(place),
            log_directory=str(place),
            scheduler_options={
                "dashboard_address": "127.0.0.1:0",
                **(dask.config.get("jobqueue.slurm.scheduler-options", None) or {}),
            },
            worker_extra_args=extra,
            job_script_prologue=[
                *(dask.config.get("jobqueue.slurm.job-script-prologue", None) or []),
                f"export DASK_INTERNAL_INHERIT_CONFIG={inherited}",
            ],
        )
    with _ended_by_sigterm() as end, dask.config.set(PATIENT), cluster:
        check(cluster.job_script(), place)
        keeper = Keeper(cluster, jobs, folder=place, tell=tell, give_up=end, every=every)
        try:
            with Client(cluster) as client, keeper:
                tell(dashboard(client, socket.getfqdn()))
                yield client
        except SystemExit as error:
            if keeper.failed is None:
                raise
            raise ConfigError(keeper.failed) from error


def private(folder: Path) -> None:
    """Make a folder that this user alone can enter, or take the rights of others from one that is there.

    Raises
    ------
    ConfigError
        If it is another user's, or not a folder.
    """
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(
            f"{folder} is not a folder, expected one that keys of TLS go into ({error.strerror}); remove it"
        ) from error
    try:
        if (owner := os.fstat(handle).st_uid) != os.geteuid():
            raise ConfigError(
                f"folder {folder}, which keys of TLS go into, is of user {owner}, expected user {os.geteuid()}; "
                "remove it, or set runs to a folder of your own"
            )
        os.fchmod(handle, 0o700)
    finally:
        os.close(handle)


@contextmanager
def _ended_by_sigterm() -> Iterator[Callable[[], None]]:
    """Have SIGTERM end the block as an exception does, so that its jobs are cancelled; gives what does so from another thread."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    thread = threading.get_ident()
    try:
        yield lambda: signal.pthread_kill(thread, signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def clear(place: Path, *, tell: Callable[[str], None]) -> None:
    """Cancel the jobs of a client that ended without doing so, and wait for their end.

    Raises
    ------
    ConfigError
        If that client is alive, or jobs do not end.
    """
    ours: dict[str, str] = {}
    for job, comment in queue("%k").items():
        folder, _, scheduler = "|".join(comment).rpartition(" ")
        if folder == str(place):
            ours[job] = scheduler
    for scheduler in sorted(set(ours.values())):
        if _answers(scheduler):
            raise ConfigError(
                f"another client computes in {place.parent} with jobs {', '.join(ours)} and the scheduler {scheduler}; "
                "wait for it, or end it first"
            )
    if not ours:
        return
    tell(f"cancelling {len(ours)} jobs of a client that is gone ({', '.join(ours)})")
    ask(["scancel", *ours])
    end = time.monotonic() + _CLEARING
    while left := ask(["squeue", "-h", "-o", "%i", "-j", ",".join(ours)]).stdout.split():
        if time.monotonic() > end:
            raise ConfigError(f"jobs {', '.join(left)} were cancelled {_CLEARING:.0f} s ago and have not ended; see squeue")
        time.sleep(0.2)


def _answers(scheduler: str) -> bool:
    """Tell whether something listens at the address of a scheduler."""
    host, _, port = scheduler.rpartition("/")[2].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


def lifetime(walltime: str | None) -> list[str]:
    """Write the options by which workers leave, not all at once, before their walltime ends.

    What a worker has in hand when it leaves is computed again by others and does not count as a failure, as it would if SLURM ended the worker.

    >>> lifetime("02:00:00")
    ['--lifetime', '6780s', '--lifetime-stagger', '300s']
    """
    if walltime is None or not walltime.replace("-", "").replace(":", "").isdecimal():
        return []
    whole = seconds(walltime)
    stagger = min(300.0, whole / 20)
    margin = min(120.0, whole / 4)
    return ["--lifetime", f"{whole - stagger - margin:.0f}s", "--lifetime-stagger", f"{stagger:.0f}s"]


def seconds(walltime: str) -> int:
    """Read a time of SLURM: minutes, minutes:seconds, hours:minutes:seconds, or days before a dash and hours after it.

    >>> [seconds(t) for t in ("90", "90:30", "01:30:00", "2-12", "1-00:30", "1-00:00:01")]
    [5400, 5430, 5400, 216000, 88200, 86401]
    """
    days, dash, rest = walltime.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(n * unit for n, unit in zip(parts, units, strict=False))


def dashboard(client: Client, host: str) -> str:
    """Say where the dashboard of a scheduler on a host is, which listens on the loopback of that host alone."""
    port = client.scheduler_info()["services"].get("dashboard")
    return f"Dask dashboard: http://127.0.0.1:{port}/status on {host}; from elsewhere: {tunnel(port, host)}"


def cores_of_worker(cores: int) -> int:
    """Cores that a worker has in its job: its share of ``jobqueue.slurm.job-cpu`` where that is set, else as many as are asked for."""
    return max(1, int(dask.config.get("jobqueue.slurm.job-cpu", None) or cores * _processes()) // _processes())


def _processes() -> int:
    """Workers of a job: one, or those of ``jobqueue.slurm.processes``, as many as a node has GPUs."""
    with suppress(ImportError):
        importlib.import_module("dask_jobqueue")  # with which its configuration comes
    return int(dask.config.get("jobqueue.slurm.processes", None) or 1)


def tunnel(port: int, host: str) -> str:
    """Write the command that makes a dashboard on a host's loopback visible on another machine.

    >>> tunnel(8787, "login1").startswith("ssh -N -L 8787:127.0.0.1:8787 ")
    True
    """
    return f"ssh -N -L {port}:127.0.0.1:{port} {getpass.getuser()}@{host}"


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
    done = ask(["sbatch", "--test-only", str(path)])
    return None if done.returncode == 0 else " ".join((done.stderr or done.stdout).split())


def job_end() -> float | None:
    """Ask SLURM when the job of this process ends, in seconds since 1970; None outside a job or without a time limit."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    command = ["squeue", "-h", "-j", job, "-o", "%e"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)  # noqa: S603
        return time.mktime(time.strptime(done.stdout.strip(), "%Y-%m-%dT%H:%M:%S"))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        _log.warning(
            "the end of this job is unknown (%s): training cannot stop in time, and will resume from its last saved state", error
        )
        return None
