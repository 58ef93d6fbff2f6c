"""Real SLURM on this machine (`make test-slurm`): a private cluster of two virtual nodes with fake GPUs, started and stopped here."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import dask
import pytest

from ai4land.errors import ConfigError
from ai4land.workers import jobs
from ai4land.workers.cluster import connect
from ai4land.workers.jobs import queue
from ai4land.workers.slurm import check, cores_of_worker, private
from tests.slurm import workers_of
from tests.strangers import assert_strangers_are_refused
from tests.waiting import until


@pytest.mark.slurm
def test_jobs_are_workers_with_our_settings_and_gone_afterwards(jobs, tmp_path):
    with jobs(2) as client:
        client.wait_for_workers(2, timeout=60)
        assert sum(client.gather(client.map(lambda x: x + 1, range(10)))) == 55
        found = client.run(lambda: (os.environ.get("MALLOC_TRIM_THRESHOLD_"), os.environ.get("SLURM_JOB_ID")))
        assert {trim for trim, _ in found.values()} == {None}
        assert {job for _, job in found.values()} == set(queue())
        assert all(address.startswith("tls://") for address in found)
        assert "127.0.0.1" in jobs.told[0] and "ssh -N -L" in jobs.told[0]
    until(lambda: not queue())
    assert (tmp_path / "slurm").stat().st_mode & 0o077 == 0


@pytest.mark.slurm
def test_a_job_that_is_cancelled_is_replaced(jobs):
    with jobs(2) as client:
        client.wait_for_workers(2, timeout=60)
        before = set(queue())
        subprocess.run(["scancel", min(before)], check=True)
        until(lambda: len(set(queue()) - before) == 1)
        client.wait_for_workers(2, timeout=60)
        until(lambda: len(workers_of(client)) == 2)
        assert any(min(before) in line and "gone" in line for line in jobs.told)


@pytest.mark.slurm
def test_what_is_granted_works_and_why_the_rest_waits_is_said(jobs):
    with jobs(10, cores=4) as client:
        client.wait_for_workers(2, timeout=60)
        assert client.submit(sum, [1, 2]).result() == 3
        until(lambda: any("8 of 10 jobs wait: " in line and "Resources" in line for line in jobs.told))
        assert len(workers_of(client)) == 2


@pytest.mark.slurm
def test_number_of_jobs_follows_the_file(jobs, tmp_path):
    file = tmp_path / "slurm" / "jobs"
    with jobs(1) as client:
        # A worker that died, in place of leaving, would fail what it has in hand.
        futures = client.map(lambda value: time.sleep(0.3) or value, range(36))
        client.wait_for_workers(1, timeout=60)
        assert file.read_text() == "1\n"
        file.write_text("3")
        until(lambda: len(workers_of(client)) == 3)
        file.write_text("three")
        until(lambda: file.read_text() == "3\n")
        file.write_text("1")
        until(lambda: len(workers_of(client)) == 1 and len(queue()) == 1)
        assert client.gather(futures) == list(range(36))
        del futures  # else they would be computed again
        file.write_text("0")
        until(lambda: not workers_of(client) and not queue())
        later = client.submit(sum, [1, 2])
        file.write_text("1")
        assert later.result(timeout=60) == 3 and len(queue()) == 1
    wanted = [line.partition(" jobs are wanted in place of ") for line in jobs.told if "wanted" in line]
    assert [(int(new), int(old)) for new, _, old in wanted] == [(3, 1), (1, 3), (0, 1), (1, 0)]
    assert any("jobs says 'three', expected a number of jobs; there stay 3" in line for line in jobs.told)
    assert not file.exists()


@pytest.mark.slurm
def test_jobs_that_end_before_they_are_workers_end_the_run_with_their_last_words(jobs):
    refused = pytest.raises(ConfigError, match=r"nothing 5 times in a row; the last line of .* (no|No) such file")
    with dask.config.set({"jobqueue.slurm.python": "/none/python"}), refused, jobs(2, every=0.1) as client:
        client.wait_for_workers(1, timeout=60)
    assert sum("never became workers" in line for line in jobs.told) == 5
    assert not queue()


@pytest.mark.slurm
def test_a_second_client_of_the_same_folder_is_refused(jobs):
    with jobs(1) as client:
        client.wait_for_workers(1, timeout=60)
        before = set(queue())
        with pytest.raises(ConfigError, match=r"another client computes in .* end it first"), jobs(1):
            pass
        assert set(queue()) == before and client.submit(sum, [1, 2]).result() == 3


@pytest.mark.slurm
def test_sigterm_cancels_the_jobs(jobs):
    with pytest.raises(SystemExit) as end, jobs(2) as client:
        client.wait_for_workers(2, timeout=60)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    assert end.value.code == 143
    until(lambda: not queue())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("settings", "directive"),
    [
        ({"jobqueue.slurm.queue": "nope"}, "-p nope"),
        ({"jobqueue.slurm.job-cpu": 200}, "--cpus-per-task=200"),
        ({"jobqueue.slurm.job-extra-directives": ["--gres=gpu:9"]}, "--gres=gpu:9"),
        ({"jobqueue.slurm.memory": "900GB"}, "--mem="),
    ],
)
def test_a_job_that_would_never_run_is_refused_with_its_directive(jobs, settings, directive):
    with dask.config.set(settings), pytest.raises(ConfigError, match="because of #SBATCH") as error, jobs(1):
        pass
    assert directive in str(error.value) and " or " not in str(error.value).split("; change")[0]
    assert not queue()


@pytest.mark.slurm
def test_a_worker_that_needs_more_memory_than_was_thought_is_not_paused(jobs):
    """Dask would pause it at 80 % of what its job asks for, and have it wait for ever, as there is nothing to put aside."""
    with jobs(1, memory=4e7) as client:
        client.wait_for_workers(1, timeout=60)
        (info,) = workers_of(client).values()
        until(lambda: next(iter(workers_of(client).values()))["metrics"]["memory"] > info["memory_limit"])
        time.sleep(1.0)  # some looks of Dask at its memory
        assert client.submit(sum, [1, 2]).result(timeout=30) == 3
        assert client.run(lambda dask_worker: dask_worker.status.name).popitem()[1] == "running"


@pytest.mark.slurm
def test_a_stranger_without_the_certificate_is_refused(jobs):
    with jobs(1) as client:
        client.wait_for_workers(1, timeout=60)
        for address in (client.scheduler.address, *workers_of(client)):
            assert_strangers_are_refused(address)
        assert client.submit(sum, [1, 2]).result() == 3


@pytest.mark.parametrize("mode", [None, 0o777])
def test_the_folder_of_keys_is_closed_to_others(tmp_path, mode):
    folder = tmp_path / "run" / "slurm"
    if mode:
        folder.mkdir(parents=True)
        folder.chmod(mode)
    private(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_keys_that_is_not_ours_is_refused(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "slurm").symlink_to(tmp_path / "mine")
    with pytest.raises(ConfigError, match=r"slurm is not a folder"):
        private(tmp_path / "slurm")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ConfigError, match=rf"of user {os.getuid()}, expected user {os.getuid() + 1}"):
        private(tmp_path / "mine")


def test_without_sbatch_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    shape = {"workers": 1, "threads": 1, "cores": 1, "memory": 1e9, "folder": tmp_path, "tell": print}
    with pytest.raises(ConfigError, match=r"sbatch is not on the path.*cluster=local"), connect("slurm", **shape):
        pass
    assert not list(tmp_path.iterdir())


def test_a_command_that_does_not_answer_is_an_error_not_a_wait(monkeypatch, tmp_path):
    slow = tmp_path / "sbatch"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(jobs, "_PATIENCE", 0.2)
    with pytest.raises(ConfigError, match="did not answer"):
        check("#!/bin/sh\n", tmp_path)


@pytest.mark.slurm
def test_a_job_of_a_whole_node_holds_several_workers_and_is_replaced_as_one(jobs):
    with dask.config.set({"jobqueue.slurm.processes": 2, "jobqueue.slurm.job-cpu": 4}), jobs(3) as client:
        client.wait_for_workers(4, timeout=60)  # of two jobs
        found = client.run(lambda: (os.environ["SLURM_JOB_ID"], os.environ["SLURM_CPUS_PER_TASK"]))
        before = {job for job, _ in found.values()}
        assert sorted(found.values()) == sorted((job, "4") for job in before for _ in range(2)) and before == set(queue())
        assert cores_of_worker(1) == 2
        subprocess.run(["scancel", min(before)], check=True)
        until(lambda: len(set(queue()) - before) == 1)
        until(lambda: len(workers_of(client)) == 4)
