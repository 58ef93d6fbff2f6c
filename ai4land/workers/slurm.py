"""Dask workers as SLURM jobs: bad requests are refused at once, ended jobs are replaced, and no job stays behind.

dask-jobqueue submits the jobs; their shape (queue, account, walltime, GPUs) is in Dask's configuration under
``jobqueue.slurm``. :mod:`ai4land.workers.jobs` keeps their number. All connections are encrypted with certificates of this
run, and the dashboard listens on the loopback only. Each job's comment names its folder and scheduler, so the next client
can find and cancel the jobs of one that was killed.
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
"""Dask configuration for the life of a cluster: a lost worker has minutes to restart.

Dask's default of 15 s would remove a worker for good that is still starting from slow storage, or that died a second time.
"""
_CLEARING = 120.0
"""Seconds that cancelled jobs may take to end; by default SLURM kills them after 30."""


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
    """Submit jobs of ``jobqueue.slurm.processes`` workers each (default 1), keep their number, and cancel them at the end.

    Parameters
    ----------
    workers, threads
        Number of workers, and concurrent tasks of each.
    cores, memory
        Per worker; memory in bytes. ``jobqueue.slurm.job-cpu`` and ``jobqueue.slurm.memory``, both per job, take precedence.
    folder
        Folder of the run on a file system that all nodes share; logs and certificates go into it.
    settings
        Dask configuration that scheduler and workers start with.
    tell
        Called with the address of the dashboard and with the reasons why jobs wait.
    every
        Seconds between two checks of the queue.
    lasting
        Keep workers until SLURM ends them, for work that cannot move; otherwise they leave earlier (:func:`lifetime`).

    Raises
    ------
    ConfigError
        If SLURM is missing or would never run such a job (the error names the directive), if another client runs jobs for
        the same folder, or if jobs end before they become workers.
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
        """A job that names its folder and scheduler in its comment, and records why SLURM refused it."""

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
    """Make a folder that only this user can enter, or remove the rights of others from an existing one.

    Raises ConfigError if it belongs to another user or is not a folder.
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
    """Let SIGTERM end the block like an exception, so that jobs are cancelled; yield what sends it from another thread."""
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
    """Cancel the jobs that a killed client left behind, and wait for their end.

    Raises ConfigError if that client is alive, or the jobs do not end.
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
    """Whether something listens at the address of a scheduler."""
    host, _, port = scheduler.rpartition("/")[2].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


def lifetime(walltime: str | None) -> list[str]:
    """Return the options that make workers leave before their walltime ends, not all at once.

    Other workers compute the tasks of a leaving worker again, and no task counts as failed, as it would if SLURM killed the
    worker.

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
    """Parse a SLURM time: minutes, minutes:seconds, hours:minutes:seconds, or days-hours with optional minutes and seconds.

    >>> [seconds(t) for t in ("90", "90:30", "01:30:00", "2-12", "1-00:30", "1-00:00:01")]
    [5400, 5430, 5400, 216000, 88200, 86401]
    """
    days, dash, rest = walltime.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(n * unit for n, unit in zip(parts, units, strict=False))


def dashboard(client: Client, host: str) -> str:
    """Describe where the dashboard of a scheduler is, which listens only on the loopback of ``host``."""
    port = client.scheduler_info()["services"].get("dashboard")
    return f"Dask dashboard: http://127.0.0.1:{port}/status on {host}; from elsewhere: {tunnel(port, host)}"


def cores_of_worker(cores: int) -> int:
    """Return the cores of a worker: its share of ``jobqueue.slurm.job-cpu`` if that is set, else ``cores``."""
    return max(1, int(dask.config.get("jobqueue.slurm.job-cpu", None) or cores * _processes()) // _processes())


def _processes() -> int:
    """Return the workers per job: ``jobqueue.slurm.processes`` (such as the GPUs of a node), 1 by default."""
    with suppress(ImportError):
        importlib.import_module("dask_jobqueue")  # which loads its configuration
    return int(dask.config.get("jobqueue.slurm.processes", None) or 1)


def tunnel(port: int, host: str) -> str:
    """Return the command that forwards a dashboard on the loopback of ``host`` to another machine.

    >>> tunnel(8787, "login1").startswith("ssh -N -L 8787:127.0.0.1:8787 ")
    True
    """
    return f"ssh -N -L {port}:127.0.0.1:{port} {getpass.getuser()}@{host}"


def check(script: str, folder: Path) -> None:
    """Have SLURM test a job script without submitting it; if refused, raise ConfigError naming the directives to blame."""
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
    """Return when SLURM will end this process's job, in seconds since 1970; None outside a job or if the time is unknown."""
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
