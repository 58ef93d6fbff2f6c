"""Training on the workers of a Dask cluster."""

from __future__ import annotations

import json
import os
from functools import partial

import pytest

from ai4land.model.checkpoint import WEIGHTS
from ai4land.run import train as training
from ai4land.run.file import load_run
from ai4land.run.inputs import Inputs
from ai4land.train.gang import gang
from ai4land.workers.cluster import local
from tests.runs import write_run

STEPS, CHECKPOINT = 30, 10


@pytest.fixture(scope="module")
def lessons(planet, tmp_path_factory):
    """Make a run that is aligned and not trained."""
    folder = tmp_path_factory.mktemp("gang")
    # Rounding grows from step to step, the faster the larger the steps: these are small ones.
    small = {"learning_rate": 5e-4, "change_weight": 5, "class_balance": 0, "members": 1}
    changes = [f"train.{k}={v}" for k, v in {**small, "steps": STEPS, "checkpoint_every": CHECKPOINT}.items()]
    file = write_run(folder, planet)
    whole = load_run(file, changes)
    assert not training._prepare(Inputs.of(whole), print)

    def make(name: str, **train):
        values = [*changes, f"name={name}", *(f"train.{k}={v}" for k, v in train.items())]
        run = load_run(file, values)
        run.folder.mkdir()
        (run.folder / "store.zarr").symlink_to(whole.folder / "store.zarr")
        return run, training._lesson(Inputs.of(run), print)

    return make


@pytest.fixture(scope="module")
def client():
    with local(2, dashboard=False) as client:
        yield client


@pytest.fixture(scope="module")
def unbroken(lessons, client):
    run, _ = train(lessons("unbroken"), client)
    return run


def steps(run):
    path = run.folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []


def train(made, client, *, events=(), workers=2, **others):
    """Train with a gang; each of the events, a step and what to do then, comes once. What was told."""
    run, lesson = made
    left, told = list(events), []

    def look():
        if left and len(steps(run)) > left[0][0]:
            left.pop(0)[1]()

    gang(
        client,
        partial(training._take_part, run=run, lesson=lesson),
        workers=workers,
        **{"timeout": 60.0, "patience": 30.0, **others},
        state=partial(training._states, run.folder),
        tell=told.append,
        look=look,
    )
    assert not left
    return run, told


def pids(client):
    """Process of each rank."""
    there = client.scheduler_info(n_workers=-1)["workers"]
    found = client.run(os.getpid)
    return [found[a] for a in sorted(there, key=lambda a: str(there[a]["name"]))]


def weights(run) -> bytes:
    return (run.folder / WEIGHTS).read_bytes()


def losses(run):
    return [row["loss"] for row in steps(run)[1:]]
