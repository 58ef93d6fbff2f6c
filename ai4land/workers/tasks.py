"""Tasks on workers that come and go: failures are retried, and no task fails for what another did to its worker."""

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
"""Worker deaths that a task may share with others before it is tried alone."""
_ALONE = 2
"""Workers that may die while running only one task before it counts as failed; a single one may die by chance."""
_HOPELESS = 10
"""Tasks that may be set aside after worker deaths before any task succeeds; then all are given up."""

T = TypeVar("T", bound=Hashable)
Item = TypeVar("Item")


def outcomes(futures: Mapping[Future[Any], T], again: Callable[[T], Future[Any]], *, client: Client) -> Iterator[tuple[T, Any]]:
    """Yield each task as it ends, with its result or its last exception.

    A task whose worker died is submitted again. A dying worker takes all its tasks along, so one death proves little. A task
    present at two deaths waits until the others are done; it is then tried alone, and fails if two more workers die on it.
    The scheduler must report each death (``distributed.scheduler.allowed-failures`` 0, as in
    :data:`ai4land.workers.cluster.SETTINGS`).

    ``futures`` gives the task of each future, submitted with ``retries=TRIES - 1``. ``again`` submits a task again, best
    with a higher priority, so that hopeless tasks show early.

    Raises
    ------
    WorkerError
        If workers keep dying before any task succeeds (remaining tasks are cancelled), or if the scheduler is gone.
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
            outcome = future.result()  # may block: a dead worker's unfetched result is computed again
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
    """Run a task for every item, and yield each item with its result as they end.

    With a ``client``, task and items must be picklable, and a task may run twice for an item. Without one, this process runs
    them one after another. Error messages call an item ``what``.

    Raises
    ------
    AI4LandError
        The first one that a task raises; remaining tasks are cancelled, but running ones continue to their end.
    WorkerError
        If an item fails because its workers die, or raises another error three times; the message names the item.
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
    """Return an AI4LandError instead of raising it, so that Dask does not retry what no retry can mend."""
    try:
        return None, task(item)
    except AI4LandError as error:
        return error, None
