"""Keep a number of SLURM jobs alive as Dask workers.

dask-jobqueue does not replace jobs that end. :class:`Keeper` replaces them, reports why jobs wait, and stops the run if jobs
repeatedly end before they become workers. An operator may change the wanted number of jobs in a file.
"""

from __future__ import annotations

import logging
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distributed import SchedulerPlugin, Status

from ai4land.errors import ConfigError

_log = logging.getLogger(__name__)

_PATIENCE = 30.0
"""Timeout of a SLURM command in seconds."""
_LIVE = "PENDING,RUNNING,CONFIGURING,SUSPENDED"
"""States of jobs that are or will become workers; a completing job will not."""
_IN_VAIN = 5
"""Failures in a row before giving up, if jobs end before they become workers and no workers exist."""
_LONGEST = 300.0
"""Longest delay between two such failures in seconds."""


def ask(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a SLURM command; raise ConfigError if it times out."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"{command[0]} did not answer within {_PATIENCE:.0f} s; is SLURM's controller up (scontrol ping)?"
        ) from error


def queue(form: str = "%T|%r") -> dict[str, list[str]]:
    """Return the fields that an ``squeue`` format gives (default: state and reason) for this user's live jobs, by job id."""
    done = ask(["squeue", "--me", "-h", "-t", _LIVE, "-o", f"%i|{form}"])
    if done.returncode:
        raise ConfigError(f"squeue failed: {done.stderr.strip()}")
    return {i: told for i, *told in (line.strip().split("|") for line in done.stdout.splitlines() if line)}


def job_of_worker(name: Any) -> Any:
    """Return the job name of a worker in a job of several workers, as dask-jobqueue numbers them.

    >>> job_of_worker("SLURMCluster-3-1")
    'SLURMCluster-3'
    """
    return str(name).rpartition("-")[0]


class Arrivals(SchedulerPlugin):
    """Record the names of all workers that ever connected, and of their jobs."""

    def __init__(self) -> None:
        self.names: set[Any] = set()

    def add_worker(self, scheduler: Any, worker: str) -> None:
        """Record a worker's name."""
        name = scheduler.workers[worker].name
        self.names |= {name, job_of_worker(name)}


class Keeper:
    """Keep a number of jobs alive during a ``with`` block, and report why jobs wait.

    Parameters
    ----------
    cluster, jobs
        A ``SLURMCluster``, and the initial number of jobs; :meth:`scale` or an operator may change it.
    folder
        Holds the logs of the jobs and the file ``jobs`` with their wanted number.
    tell, give_up
        Called with a message when something changed; called after repeated failures, with the reason in :attr:`failed`.
    every
        Seconds between two checks.
    """

    failed: str | None = None

    def __init__(
        self,
        cluster: Any,
        jobs: int,
        *,
        folder: Path,
        tell: Callable[[str], None],
        give_up: Callable[[], None],
        every: float = 5.0,
    ) -> None:
        self._cluster, self._jobs, self._folder, self._tell, self._every = cluster, jobs, folder, tell, every
        self._give_up = give_up
        self._file = folder / "jobs"
        self._over, self._said = threading.Event(), ""
        self._arrivals = Arrivals()
        self._came: set[Any] = set()
        self._in_vain, self._not_before, self._refused = 0, 0.0, ""
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def __enter__(self) -> Keeper:
        self.scale(self._jobs)
        self._cluster.scheduler.add_plugin(self._arrivals)
        self._cluster.scale(jobs=self._jobs)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._file.unlink(missing_ok=True)

    def scale(self, jobs: int) -> None:
        """Set the number of jobs from the next check on, as writing it into the file does; with 0, all work waits.

        As few jobs as possible are stopped while they run tasks; other workers compute those tasks again.
        """
        self._file.write_text(f"{jobs}\n", encoding="utf-8")

    def _run(self) -> None:
        while not self._over.wait(self._every):
            try:
                self.look()
            except ConfigError as error:  # the controller may be down for a while
                _log.warning("%s", error)
            if self.failed:
                self._give_up()
                return

    def look(self) -> None:
        """Check once: replace jobs that ended, adjust their number, and report why jobs wait."""
        wanted = self._wanted()
        if wanted != self._jobs:
            self._tell(f"{wanted} jobs are wanted in place of {self._jobs}")
            self._jobs = wanted
        # Must precede the query: a job submitted after it would seem to have ended.
        ours, refused, working = self._cluster.sync(self._known)
        live = queue()
        fresh = self._arrivals.names - self._came
        self._came |= fresh
        if fresh:
            self._in_vain = 0
        ended = {name: job for name, job in ours.items() if job not in live}
        never = [job for name, job in ended.items() if name not in self._came]
        if never or refused:
            why = self._last_words(never[-1]) if never else refused[-1][1]
            self._hesitate(why, working=working)
        if ended:
            some = f", as {len(never)} of them never became workers; {self._last_words(never[-1])}" if never else ""
            self._tell(f"{len(ended)} jobs are gone ({', '.join(ended.values())}); submitting as many{self._later()}{some}")
        if refused and refused[-1][1] != self._refused:
            self._refused = refused[-1][1]
            self._tell(f"{len(refused)} jobs could not be submitted ({self._refused}); trying again{self._later()}")
        self._cluster.sync(self._mend, [*ended, *(name for name, _ in refused)])
        waiting = Counter(why for i, (state, why) in live.items() if i in ours.values() and state == "PENDING" and why != "None")
        said = ", ".join(f"{n} for {why}" for why, n in waiting.items())
        if said and said != self._said:
            self._tell(f"{waiting.total()} of {self._jobs} jobs wait: {said}")
        self._said = said

    def _wanted(self) -> int:
        try:
            text = self._file.read_text(encoding="utf-8").strip()
        except OSError:
            return self._jobs
        if text and not text.isdecimal():
            self._tell(f"{self._file} says {text!r}, expected a number of jobs; there stay {self._jobs}")
            self.scale(self._jobs)
        return int(text) if text.isdecimal() else self._jobs

    def _hesitate(self, why: str, *, working: bool) -> None:
        """Delay further submissions longer after each failure; give up after several failures without a worker."""
        self._in_vain += 1
        self._not_before = time.monotonic() + min(self._every * 2**self._in_vain, _LONGEST)
        if self._in_vain >= _IN_VAIN and not working:
            self.failed = (
                f"jobs came to nothing {self._in_vain} times in a row; {why}; mend the cause and run again "
                "(the Python of jobqueue.slurm.python and the folder of the run must be there on the nodes)"
            )

    def _later(self) -> str:
        left = self._not_before - time.monotonic()
        return f" in {left:.0f} s" if left > 0 else ""

    def _last_words(self, job: str) -> str:
        for path in self._folder.glob(f"*-{job}.err"):
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            return f"the last line of {path} is: {next((x for x in reversed(lines) if x.strip()), 'none')}"
        return f"job {job} left no log in {self._folder}"

    async def _known(self) -> tuple[dict[Any, str], list[tuple[Any, str]], bool]:
        """Return each job's id by name, the jobs that SLURM refused with reasons, and whether any worker is connected."""
        jobs = {name: job for name, job in self._cluster.workers.items() if name in self._cluster.worker_spec}
        submitted = {name: str(job.job_id) for name, job in jobs.items() if job.job_id}
        refused = [(name, str(getattr(job, "refused", "no job id"))) for name, job in jobs.items() if not job.job_id]
        return submitted, refused, bool(self._cluster.scheduler.workers)

    async def _mend(self, ended: list[Any]) -> None:
        cluster = self._cluster
        for name in ended:
            # Dask would first retire the worker, and that hangs if the worker is already closing.
            cluster.worker_spec.pop(name, None)
            cluster.workers.pop(name).status = Status.closed
        less = len(cluster.worker_spec) - self._jobs
        if less > 0:
            here = [w.name for w in cluster.scheduler.workers.values()]
            working = {*here, *map(job_of_worker, here)}
            leave = sorted(cluster.worker_spec, key=working.__contains__)[:less]  # waiting jobs leave first
            names = [name for name in here if name in leave or job_of_worker(name) in leave]
            # A retired worker does not count as dead, so its tasks get no death on their record.
            await cluster.scheduler.retire_workers(names=names, close_workers=True)
            for name in leave:
                cluster.worker_spec.pop(name, None)
            cluster.scale(jobs=self._jobs)
        elif (less < 0 or len(cluster.workers) < self._jobs) and time.monotonic() >= self._not_before:
            cluster.scale(jobs=self._jobs)
