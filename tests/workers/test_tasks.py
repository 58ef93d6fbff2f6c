"""Tasks whose workers die, on real processes."""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from distributed import Future

from ai4land.errors import DataError, WorkerError
from ai4land.workers import tasks
from ai4land.workers.cluster import local
from ai4land.workers.tasks import TRIES, each, outcomes


def begun(task: int, *, folder: Path, kills: range, raises: range = range(0)) -> int:
    """Note that a task was begun, and do as it is told; it runs on a worker."""
    with (folder / f"{task}-{os.getpid()}").open("a") as file:
        file.write("x")
    if task in kills:
        os.kill(os.getpid(), signal.SIGKILL)
    if task in raises:
        raise OSError("a disk is full")
    return task


def all_outcomes(client, tasks, **options):
    # By value: the workers' Python need not have the tests.
    work = lambda task, begun=begun, options=options: begun(task, **options)  # noqa: E731
    futures = dict(zip(client.map(work, tasks, retries=TRIES - 1, pure=False), tasks, strict=True))
    return dict(
        outcomes(futures, lambda task: client.submit(work, task, retries=TRIES - 1, priority=1, pure=False), client=client)
    )


def times_begun(folder: Path) -> Counter[int]:
    times: Counter[int] = Counter()
    for path in folder.iterdir():
        times[int(path.name.split("-")[0])] += len(path.read_text())
    return times


def test_only_what_kills_its_workers_is_given_up(tmp_path):
    with local(1, threads=2, dashboard=False) as client:
        found = all_outcomes(client, range(12), folder=tmp_path, kills=range(3, 5), raises=range(7, 8))
    assert {task for task, outcome in found.items() if isinstance(outcome, WorkerError)} == {3, 4}
    assert "4 workers died on it, the last 2 with nothing else in hand" in str(found[3])
    assert isinstance(found[7], OSError)
    assert {task: found[task] for task in range(12) if task not in (3, 4, 7)} == {t: t for t in range(12) if t not in (3, 4, 7)}
    times = times_begun(tmp_path)
    assert all(
        2 <= times[task] <= 4 for task in (3, 4)
    )  # twice alone; before that the other may kill the worker before they begin
    assert times[7] >= TRIES


def test_what_others_took_along_before_it_began_is_tried_alone_more_than_once(tmp_path):
    """On one thread the first task kills the worker, and the second, which the worker has too, never begins; alone it dies by chance, once."""
    folder = str(tmp_path)

    def work(task: int) -> int:
        import os
        import signal
        from pathlib import Path

        with (Path(folder) / str(task)).open("a") as file:
            file.write("x")
        if task == 0 or (Path(folder) / "1").read_text() == "x":
            os.kill(os.getpid(), signal.SIGKILL)
        return task

    def submit(task: int) -> Future:
        # Few tasks of a name are on the worker at once, in the order of their priorities.
        return client.submit(work, task, retries=TRIES - 1, priority=1 - task, pure=False)

    with local(1, dashboard=False) as client:
        found = dict(outcomes({submit(task): task for task in (0, 1)}, submit, client=client))
    assert isinstance(found[0], WorkerError) and found[1] == 1
    assert [len((tmp_path / str(task)).read_text()) for task in (0, 1)] == [4, 2]


def test_where_every_worker_dies_it_ends_before_all_is_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "_HOPELESS", 3)
    with local(2, dashboard=False) as client, pytest.raises(WorkerError, match=r"no task succeeded.*have ai4land"):
        all_outcomes(client, range(40), folder=tmp_path, kills=range(40))
    assert len(times_begun(tmp_path)) < 20


def test_each_item_comes_with_its_result_and_a_failure_with_its_name(tmp_path):
    folder = str(tmp_path)

    def work(task: int) -> int | None:
        from pathlib import Path

        from ai4land.errors import DataError

        with (Path(folder) / str(task)).open("a") as file:
            file.write("x")
        if task == 7:
            raise DataError("seven is odd, expected even")
        if task == 8:
            raise OSError("a disk is full")
        return None if task == 3 else task

    with local(2, dashboard=False) as client:
        for where in (None, client):
            assert dict(each(work, [1, 3, 5], client=where)) == {1: 1, 3: None, 5: 5}
            with pytest.raises(DataError, match="seven is odd"):
                dict(each(work, [1, 7], client=where))
        with pytest.raises(WorkerError, match=r"shard 8 failed 3 times: OSError\('a disk is full'\); mend the cause"):
            dict(each(work, [8], what="shard", client=client))
    assert [len((tmp_path / str(n)).read_text()) for n in (7, 8)] == [2, TRIES]
