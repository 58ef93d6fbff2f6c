"""Tasks on workers that come and go: what fails is tried again, and nothing is given up for what another task did to its worker."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from functools import partial
from typing import Any, TypeVar

from distributed import Client, Future, KilledWorker, as_completed

from ai4land.errors import AI4LandError, WorkerError

_log = logging.getLogger(__name__)

TRIES = 3
"""Times that a task may raise an error before it counts as failed."""
_SHARED = 2
"""Workers that may die with a task and others in hand before it is tried alone."""
_ALONE = 2
"""Workers that may die with nothing but a task in hand before it counts as failed; one may die by chance."""
_HOPELESS = 10
"""Tasks that lose their workers again and again before any one succeeds, until all are given up."""

T = TypeVar("T", bound=Hashable)
Item = TypeVar("Item")


def outcomes(futures: Mapping[Future[Any], T], again: Callable[[T], Future[Any]], *, client: Client) -> Iterator[tuple[T, Any]]:
    """Give each task as it ends, with what it came to: its result, or the last exception.

    A task whose worker died is submitted again. All that a worker has in hand dies with it, begun or not, so a death says little of any one
    task: one that has seen two is set aside until all others are done. It is then tried alone and fails when two more workers die on it.
    The scheduler is to report each death (``distributed.scheduler.allowed-failures`` 0, as in :data:`ai4land.workers.cluster.SETTINGS`).

    Parameters
    ----------
    futures
        What each future is to come to; submitted with ``retries`` of ``TRIES - 1``.
    again
        Submits one of them anew, best before the others, so that what is hopeless shows early.

    Raises
    ------
    WorkerError
        If workers die so that nothing succeeds at all (what is left is cancelled), or if the scheduler is gone.
    """
    place = {future.key: task for future, task in futures.items()}
    ended = as_completed(futures, loop=client.loop)
    deaths: Counter[T] = Counter()
    aside: list[T] = []
    succeeded = False

    def submit(task: T) -> None:
        future = again(task)
        place[future.key] = task
        ended.add(future)

    for future in ended:
        task, outcome = place.pop(future.key), None
        try:
            outcome = future.result()  # waits where a worker took a result along that nobody had fetched
            succeeded = True
        except KilledWorker:
            deaths[task] += 1
            _log.warning("a worker died with %s in hand, %d of %d", task, deaths[task], _SHARED + _ALONE)
            if deaths[task] == _SHARED + _ALONE:
                outcome = WorkerError(
                    f"{deaths[task]} workers died on it, the last {_ALONE} with nothing else in hand (memory? see their logs)"
                )
            elif deaths[task] == _SHARED:
                aside.append(task)
            else:
                submit(task)
        except CancelledError as error:
            raise WorkerError(f"the scheduler is gone ({' '.join(str(error).split())}); run again to go on") from error
        except Exception as error:
            outcome = error
        future.release()
        if outcome is not None:
            yield task, outcome
        if len(aside) == _HOPELESS and not succeeded:
            client.cancel([f for f in ended.futures if f.key in place])
            raise WorkerError(
                f"workers died on {_HOPELESS} tasks, {_SHARED} times on each, and no task succeeded, the last one {task}; see the logs "
                "of the workers (memory? does their Python have ai4land and what it needs?), mend the cause and run again"
            )
        if aside and ended.is_empty():
            submit(aside.pop())


def each(
    task: Callable[[Item], Any], items: Sequence[Item], *, what: str = "item", client: Client | None = None
) -> Iterator[tuple[Item, Any]]:
    """Do a task for every item and give each with its result, as they end.

    Parameters
    ----------
    task, items
        Picklable where there are workers. A task may be done twice.
    what
        An item is called in errors.
    client
        Of the workers; this process does one item after the other if None.

    Raises
    ------
    AI4LandError
        The first that a task raises; what is left is cancelled, though tasks that have begun go on to their end.
    WorkerError
        If an item fails three times, with its name: because workers die, or for an error that is not ours.
    """
    if client is None:
        for item in items:
            yield item, task(item)
        return

    def submit(number: int, priority: int = 0) -> Future[Any]:
        return client.submit(_caught, task, items[number], retries=TRIES - 1, priority=priority, pure=False)

    futures = {submit(number): number for number in range(len(items))}
    try:
        for number, outcome in outcomes(futures, partial(submit, priority=1), client=client):
            if isinstance(outcome, BaseException):
                raise WorkerError(
                    f"{what} {items[number]} failed {TRIES} times: {outcome!r}; mend the cause and run again"
                ) from outcome
            error, result = outcome
            if error is not None:
                raise error
            yield items[number], result
    finally:
        client.cancel(list(futures))


def _caught(task: Callable[[Item], Any], item: Item) -> tuple[AI4LandError | None, Any]:
    """Give an error of ours beside the result, so that Dask does not try again what no other try would mend."""
    try:
        return None, task(item)
    except AI4LandError as error:
        return error, None
