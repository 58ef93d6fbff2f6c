"""Training on real SLURM (`make test-slurm`): jobs are cancelled, killed, stopped and run out of time, and the weights are those of a training that was not."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from functools import partial

import dask
import pytest

from ai4land.run import train as training
from ai4land.run.file import load_run
from tests.gangs import CHECKPOINT, STEPS, losses, pids, steps, train, weights
from tests.runs import ai4land, command
from tests.waiting import until

pytestmark = pytest.mark.slurm


def job_ids(client):
    """Job of each rank."""
    there = client.scheduler_info(n_workers=-1)["workers"]
    found = client.run(lambda: os.environ["SLURM_JOB_ID"])
    return [found[a] for a in sorted(there, key=lambda a: str(there[a]["name"]))]


def cancel(client, rank: int) -> None:
    subprocess.run(["scancel", job_ids(client)[rank]], check=True, timeout=60)


def send(client, rank: int, number: int) -> None:
    os.kill(pids(client)[rank], number)


@pytest.mark.parametrize(
    ("name", "what", "timeout"),
    [
        ("scancel of a job", partial(cancel, rank=1), 60.0),
        ("SIGKILL of rank 0", partial(send, rank=0, number=signal.SIGKILL), 60.0),
        ("SIGSTOP of a rank", partial(send, rank=1, number=signal.SIGSTOP), 4.0),
    ],
)
def test_what_happens_to_a_job_changes_nothing(jobs, lessons, unbroken, name, what, timeout):
    with jobs(2, lasting=True) as workers:
        event = (CHECKPOINT + 4, partial(what, workers))
        run, told = train(lessons(name.replace(" ", "_")), workers, events=[event], timeout=timeout)
    assert weights(run) == weights(unbroken) and losses(run) == losses(unbroken)
    assert any("goes on from its last state" in line for line in told)


def test_training_leaves_a_job_before_its_end_and_goes_on_in_the_next(jobs, lessons):
    """The time of a job of one minute is over after 2 s, so that every job takes one step."""
    made = {"steps": 3, "checkpoint_every": 100}
    whole, lesson = lessons("few", **made)
    training.learn(whole, lesson)
    with dask.config.set({"jobqueue.slurm.walltime": "00:01:00"}), jobs(1, lasting=True) as workers:
        run, told = train(lessons("left", **made, leave=58), workers, workers=1)
    assert weights(run) == weights(whole) and [r["step"] for r in steps(run)] == [0, 1, 2, 3]
    assert sum("goes on in the next ones" in line for line in told) == 2
    assert len({line for line in jobs.told if "gone" in line}) == 2


def test_training_works_with_the_jobs_that_are_granted(jobs, lessons):
    with jobs(4, cores=4, lasting=True) as workers:
        run, told = train(lessons("granted", steps=4), workers, workers=4, patience=3.0)
    assert "training on 2 of 4 workers" in told and steps(run)[-1]["workers"] == 2
    assert any("2 of 4 jobs wait: " in line for line in jobs.told)


def test_the_command_trains_on_jobs(slurm_cluster, planet, lessons, unbroken, tmp_path):
    run, _ = lessons("command")
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(run.model_dump(mode="json")))
    done = ai4land("train", file, "cluster=slurm", "train.workers=2")
    assert weights(load_run(file)) == weights(unbroken)
    assert "training on 2 of 2 workers" in done.stderr and f"train: {STEPS} of {STEPS}" in done.stderr


def test_a_killed_client_is_run_again_to_the_same_weights(slurm_cluster, lessons, client, tmp_path):
    made = {"steps": 200, "validate_every": 200}  # for more seconds than the second command takes to start
    whole, _ = train(lessons("client_whole", **made), client)
    run, _ = lessons("client", **made)
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(run.model_dump(mode="json")))
    call = ("train", file, "cluster=slurm", "train.workers=2")
    process = subprocess.Popen(**command(*call), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: len(steps(run)) > CHECKPOINT + 3 or process.poll() is not None)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = ai4land(*call)
    assert weights(run) == weights(whole) and losses(run) == losses(whole)
    assert "cancelling 2 jobs of a client that is gone" in done.stderr


def test_torchrun_under_srun_trains_on_two_nodes_and_leaves_in_time(slurm_cluster, lessons, tmp_path):
    """The time of an allocation of one minute is over after 2 s, so that each takes one step and ends well."""
    run, _ = lessons("srun", steps=2, leave=58)
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(run.model_dump(mode="json")))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launch = ["srun", "-N2", "--ntasks-per-node=1", "--cpus-per-task=2", "--time=1", "--chdir", str(tmp_path)]
    runner = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=1", "--rdzv-backend=c10d"]
    place = [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=here", "-m", "ai4land.cli", "train", str(file)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    for turn in (1, 2):
        done = subprocess.run([*launch, sys.executable, *runner, *place], capture_output=True, text=True, env=env, timeout=120)
        assert done.returncode == 0, done.stderr
        assert ("stopped at step 1 of 2" in done.stderr) == (turn == 1)
        assert [r["step"] for r in steps(run)] == list(range(turn + 1)) and steps(run)[-1]["workers"] == 2
    whole, lesson = lessons("srun_whole", steps=2)
    training.learn(whole, lesson)
    assert losses(whole) == pytest.approx(losses(run), abs=1e-5) and (run.folder / "model.json").is_file()


def test_a_training_that_leaves_its_allocation_says_so_by_its_exit_status(slurm_cluster, lessons, tmp_path):
    run, _ = lessons("alone_in_a_job", steps=2, leave=58)
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(run.model_dump(mode="json")))
    launch = ["srun", "-N1", "--time=1", "--chdir", str(tmp_path), sys.executable, "-m", "ai4land.cli", "train", str(file)]
    ends = [subprocess.run(launch, capture_output=True, text=True, timeout=120) for _ in range(2)]
    assert [done.returncode for done in ends] == [75, 0] and "run it again to resume" in ends[0].stderr
    assert [r["step"] for r in steps(run)] == [0, 1, 2]
