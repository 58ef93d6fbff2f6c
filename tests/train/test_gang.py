"""Training on the workers of a Dask cluster on this machine: the same as unbroken, whatever happens to the workers."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import dask
import pytest

from ai4land.errors import DataError, WorkerError
from ai4land.run import train as training
from ai4land.train.gang import Member, gang
from ai4land.workers.cluster import local
from tests.gangs import CHECKPOINT, STEPS, losses, pids, steps, train, weights


def test_two_workers_train_as_one_does(lessons, unbroken):
    run, lesson = lessons("alone")
    training.learn(run, lesson)
    one, two = losses(run), losses(unbroken)
    assert len(one) == len(two) == STEPS
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-4
    assert {row["workers"] for row in steps(unbroken)[1:]} == {2} and {row["workers"] for row in steps(run)[1:]} == {1}
    scores = [[r["validation_loss"] for r in steps(x) if "validation_loss" in r] for x in (run, unbroken)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4) and scores[0][-1] < scores[0][0]


@pytest.mark.parametrize(("rank", "at"), [(0, CHECKPOINT + 4), (1, 3)])
def test_a_killed_worker_changes_nothing(lessons, unbroken, client, rank, at):
    kill = partial(lambda: os.kill(pids(client)[rank], signal.SIGKILL))
    run, told = train(lessons(f"killed_{rank}_{at}"), client, events=[(at, kill)])
    assert weights(run) == weights(unbroken) and losses(run) == losses(unbroken)
    assert sum("generation 2" in line for line in told) == 1 and any("goes on from its last state" in line for line in told)


def test_a_worker_that_hangs_is_given_up_and_changes_nothing(lessons, unbroken, client):
    stop = partial(lambda: os.kill(pids(client)[1], signal.SIGSTOP))
    run, told = train(lessons("hung"), client, events=[(CHECKPOINT + 2, stop)], timeout=4.0)
    assert weights(run) == weights(unbroken)
    assert any("does not answer" in line for line in told)


def leaves(dask_worker) -> None:
    """End a worker for good; it runs in its nanny."""
    dask_worker.close_gracefully()
    os.kill(dask_worker.pid, signal.SIGKILL)


def test_training_goes_on_with_the_workers_that_are_there(lessons, unbroken):
    with local(2, dashboard=False) as client:

        def lose():
            address = next(iter(client.scheduler_info(n_workers=-1)["workers"]))
            client.run(leaves, workers=[address], nanny=True)

        run, told = train(lessons("fewer"), client, events=[(CHECKPOINT + 2, lose)], patience=0.5)
    assert "training on 1 of 2 workers, generation 2" in told
    rows = steps(run)
    assert [r["step"] for r in rows] == list(range(STEPS + 1))
    assert {r["workers"] for r in rows[1 : CHECKPOINT + 1]} == {2} and rows[-1]["workers"] == 1
    assert losses(run) == pytest.approx(losses(unbroken), abs=1e-4)


def test_an_error_of_the_data_is_raised_at_once(lessons, client):
    run, lesson = lessons("spoiled", learning_rate=1e30, clip=1e30)
    with pytest.raises(DataError, match=r"training loss is (nan|inf) at step"):
        train((run, lesson), client)


def test_a_scheduler_that_is_gone_ends_the_training(lessons):
    with dask.config.set({"distributed.comm.timeouts.connect": "3s"}), local(1, dashboard=False) as client:
        event = (2, lambda: client.cluster.sync(client.cluster.scheduler.close))
        with pytest.raises(WorkerError, match="the scheduler is gone"):
            train(lessons("without", steps=1000), client, events=[event], workers=1)


def dies(member: Member) -> None:
    """Join the others and die; the task of a worker."""
    with member.joined():
        if member.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # it keeps nobody waiting, and has to be ended


def test_workers_that_die_without_progress_are_given_up(client):
    told = []
    shape = {"workers": 2, "timeout": 2.0, "patience": 30.0, "restarts": 1}
    with pytest.raises(WorkerError, match=r"training failed 2 times in a row without progress, .* its last state is kept"):
        gang(client, dies, **shape, state=lambda: "the same", tell=told.append)
    assert sum("goes on" in line for line in told) == 1
    client.wait_for_workers(2, timeout=60)


def test_the_run_trains_on_workers_by_its_own_word(lessons, unbroken, tmp_path):
    run, _ = lessons("whole", workers=2)
    shown, told = [], []
    assert training.train(run, tell=told.append, progress=lambda step, row: shown.append((step, row["loss"]))) == run.folder
    assert weights(run) == weights(unbroken)
    assert shown[-1][0] == STEPS and "training on 2 of 2 workers" in told
    again = run.model_copy(update={"train": run.train.model_copy(update={"workers": 1})})
    told.clear()
    training.train(again, tell=told.append)
    assert not any("training" in line for line in told)
    assert not list(Path(run.folder).glob("**/*.part*"))
