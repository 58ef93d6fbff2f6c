"""Training on the workers of a Dask cluster, in a process group that restarts from the last saved state after a failure.

A *generation* is one long task per worker, fixed to it and never retried by Dask. The first failure (a task raises, a worker
dies or keeps the others waiting) ends the generation. Workers that do not end their tasks are restarted, and the next
generation continues with the available workers. After repeated failures without progress, training gives up.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Any

from distributed import Client, Future, Nanny, get_worker, wait
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from ai4land.errors import AI4LandError, Unfinished, WorkerError
from ai4land.model.norm import Group
from ai4land.train.group import ARRIVAL, joined, use_interface

_STORES: dict[str, Any] = {}
"""Key-value stores that this process serves, by generation."""
_TICK = 0.5
"""Seconds between two checks of a generation."""


@dataclass(frozen=True)
class Member:
    """A worker's place in a generation: rank, number of workers and of those on its machine (``beside``), meeting point."""

    generation: str
    rank: int
    world: int
    beside: int
    host: str
    port: int
    timeout: float

    @contextmanager
    def joined(self) -> Iterator[Group]:
        """Join the others; call this in the worker's task."""
        store = None
        if self.world > 1:
            use_interface(_host(get_worker().address))
            arrival = timedelta(seconds=max(self.timeout, ARRIVAL))
            served = _STORES.pop(self.generation, None)
            store = PrefixStore("ai4land", served or TCPStore(self.host, self.port, self.world, False, arrival))
            store.set(f"here {self.rank}", "")
            store.wait([f"here {rank}" for rank in range(self.world)], arrival)
        with joined(store, rank=self.rank, world=self.world, timeout=self.timeout) as group:
            yield group


def _serve(generation: str, host: str, world: int, timeout: float) -> int:
    """Serve the store of a generation from this process; return its free port."""
    store = TCPStore(host, 0, world, True, timedelta(seconds=timeout), wait_for_workers=False)
    _STORES[generation] = store
    return int(store.port)


def _host(address: str) -> str:
    """Return the host of a worker's address.

    >>> _host("tls://10.0.0.1:4567")
    '10.0.0.1'
    """
    return address.partition("://")[2].rpartition(":")[0].strip("[]")


def gang(
    client: Client,
    task: Callable[[Member], object],
    *,
    workers: int,
    timeout: float,
    patience: float,
    state: Callable[[], object],
    tell: Callable[[str], None],
    look: Callable[[], None] = lambda: None,
    restarts: int = 3,
) -> None:
    """Run a task on several workers together until it succeeds.

    Parameters
    ----------
    client, workers
        Client of the cluster, and the number of workers to wait for.
    task
        Runs on each worker, joins the others by :meth:`Member.joined` and continues from its own saved state. Raises
        ``Unfinished`` when its job is about to end; the workers are then retired.
    timeout
        Seconds that a worker may keep the others waiting.
    patience
        Seconds to wait for the remaining workers once one has arrived.
    state
        Returns the saved state; if it changed since the last failure, the count of failures starts again.
    tell, look
        Called with messages; called about twice a second during a generation.
    restarts
        Failures in a row without progress that are tried again.

    Raises
    ------
    AI4LandError
        The error of a task, except ``Unfinished`` and WorkerError: a retry would raise it again.
    WorkerError
        If workers failed too often, or the scheduler is gone.
    """
    left: set[str] = set()
    failures, before = 0, state()
    for number in itertools.count():
        addresses = _gathered(client, workers, patience=patience, left=left, tell=tell)
        tell(f"training on {len(addresses)} of {workers} workers" + (f", generation {number + 1}" if number else ""))
        try:
            _generation(client, task, addresses, timeout=timeout, left=left, look=look)
            return
        except Unfinished:
            tell("the time of the jobs is over: training is saved and goes on in the next ones")
            left.update(addresses)
            client.retire_workers(addresses, close_workers=True)
        except AI4LandError as error:
            if not isinstance(error, WorkerError) or client.status == "closed":
                raise
            now = state()
            failures = failures + 1 if now == before else 1
            before = now
            if failures > restarts:
                raise WorkerError(
                    f"training failed {failures} times in a row without progress, last because {error}; the logs of the workers say more; "
                    "its last state is kept: mend the cause and run again"
                ) from error
            tell(f"{error}; training goes on from its last state")


def _workers(client: Client) -> dict[str, Any]:
    """Return what the scheduler knows of each connected worker, by address."""
    try:
        found: dict[str, Any] = client.scheduler_info(n_workers=-1)
    except OSError as error:
        raise WorkerError(f"the scheduler does not answer ({error})") from error
    if client.status == "closed" or "workers" not in found:  # without a scheduler, a client answers with old data or none
        raise WorkerError("the scheduler is gone; run again to go on")
    workers: dict[str, Any] = found["workers"]
    return workers


def _gathered(client: Client, workers: int, *, patience: float, left: set[str], tell: Callable[[str], None]) -> list[str]:
    """Wait for workers; return their addresses, grouped by machine."""
    first, told = None, False
    while True:
        there = {a: w["name"] for a, w in _workers(client).items() if a not in left}
        found = sorted(there, key=lambda a: (_host(a), str(there[a])))
        if len(found) >= workers:
            return found[:workers]
        first = first or (time.monotonic() if found else None)
        if first is not None and found and time.monotonic() - first > patience:
            return found
        if not found and not told:
            tell("training waits for a worker")
            told = True
        time.sleep(_TICK / 5)


def _generation(
    client: Client,
    task: Callable[[Member], object],
    addresses: list[str],
    *,
    timeout: float,
    left: set[str],
    look: Callable[[], None],
) -> None:
    """Run the task once on the workers with these addresses; add unusable ones to ``left``."""
    name, world, hosts = f"train-{uuid.uuid4().hex[:12]}", len(addresses), [_host(a) for a in addresses]
    host = hosts[0]
    fixed: dict[str, Any] = {"allow_other_workers": False, "pure": False, "retries": 0}
    futures: dict[str, Future[Any]] = {}
    try:
        port = 0
        if world > 1:
            serving = client.submit(_serve, name, host, world, timeout, workers=addresses[:1], key=f"{name}-store", **fixed)
            try:
                port = serving.result(timeout=max(30.0, timeout))
            except Exception as error:  # a dying worker may cause any kind
                raise WorkerError(f"worker {addresses[0]} cannot be met ({error!r})") from error
        for rank, address in enumerate(addresses):
            member = Member(name, rank, world, hosts.count(hosts[rank]), host, port, timeout)
            futures[address] = client.submit(task, member, workers=[address], key=f"{name}-{rank}", **fixed)
        errors = _first_failure(client, futures, look)
        if errors:
            _ended(client, futures, errors, grace=min(timeout, 30.0), left=left)
            causes = [e for e in errors.values() if isinstance(e, AI4LandError) and not isinstance(e, WorkerError)]
            if causes:
                raise causes[0]
            raise WorkerError("; ".join(f"worker {a} failed: {e}" for a, e in errors.items()))
    finally:
        with suppress(Exception):  # any kind: a dead scheduler has lost its tasks anyway
            client.cancel(list(futures.values()), force=True)


def _first_failure(client: Client, futures: dict[str, Future[Any]], look: Callable[[], None]) -> dict[str, BaseException]:
    """Watch tasks until all are done or one fails; return the errors by worker."""
    while True:
        look()
        errors = _failed(client, futures)
        if errors or all(f.status == "finished" for f in futures.values()):
            return errors
        with suppress(TimeoutError):
            wait([f for f in futures.values() if not f.done()], timeout=_TICK, return_when="FIRST_COMPLETED")


def _failed(client: Client, futures: dict[str, Future[Any]]) -> dict[str, BaseException]:
    there = _workers(client)
    errors: dict[str, BaseException] = {}
    for address, future in futures.items():
        if future.status in ("error", "cancelled", "lost"):
            found = future.exception() if future.status == "error" else None
            errors[address] = found or WorkerError(f"its task is {future.status}")
        elif future.status == "pending" and address not in there:
            errors[address] = WorkerError("it is gone")
    return errors


def _ended(
    client: Client, futures: dict[str, Future[Any]], errors: dict[str, BaseException], *, grace: float, left: set[str]
) -> None:
    """Wait until the remaining tasks of a failed generation end, then kill and restart workers whose tasks do not."""
    end = time.monotonic() + grace
    while time.monotonic() < end:
        errors.update({a: e for a, e in _failed(client, futures).items() if a not in errors})
        if all(f.done() or a in errors for a, f in futures.items()):
            return
        time.sleep(_TICK / 5)
    for address, future in futures.items():
        if address not in errors and not future.done():
            errors[address] = WorkerError("it does not answer")
            left.add(address)
            # Client.restart_workers would not do: a nanny that kills a starting worker does not start another one.
            Thread(
                target=client.run, args=(_kill,), kwargs={"workers": [address], "nanny": True, "on_error": "ignore"}, daemon=True
            ).start()


def _kill(dask_worker: Nanny) -> None:
    """Kill a nanny's worker, so that the nanny starts another; it runs in the nanny because the worker may be stopped."""
    if dask_worker.pid is not None:
        os.kill(dask_worker.pid, signal.SIGKILL)
