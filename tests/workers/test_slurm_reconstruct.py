"""Reconstruction on real SLURM jobs that come and go (`make test-slurm`): the same bytes whatever happens, and what is done stays done."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from ai4land.cube import ledger
from ai4land.cube.cube import Block
from ai4land.grid import Window
from ai4land.run.file import load_run
from tests.runs import TINY, blocks_of, command, contents, folder_of, write_run
from tests.slurm import squeue
from tests.strangers import assert_strangers_are_refused
from tests.waiting import until

HERE = ("cluster=slurm",)


@pytest.fixture
def trained(whole: Path, tmp_path: Path, slurm_cluster: Path) -> Path:
    """The same run without its cube."""
    file = write_run(tmp_path, Path(load_run(whole).data), **TINY)
    shutil.copytree(folder_of(whole), folder_of(file), ignore=shutil.ignore_patterns("cube*", "figures", "evaluation.json"))
    return file


class Running:
    """A command in a process of its own, what it told, and how far its cube is."""

    def __init__(self, file: Path, *overrides: str, verb: str = "reconstruct") -> None:
        self.file, self.path = file, folder_of(file) / "cube.zarr"
        self.log = file.with_name(f"log-{time.monotonic_ns()}")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(**command(verb, file, *HERE, *overrides), stdout=log, stderr=log)

    @property
    def told(self) -> str:
        return self.log.read_text()

    def counts(self) -> Counter[tuple[int, int, int]]:
        """How often each (row, column, year) was recorded."""
        return Counter((e["row"], e["col"], year) for e in ledger.entries(self.path) for year in e["years"])

    def done(self) -> set[Block]:
        """Blocks whose years are all there."""
        have = self.counts()
        return {b for b in blocks_of(self.file) if all((b.window.row, b.window.col, y) in have for y in b.years)}

    def until_done(self, least: int) -> Counter[tuple[int, int, int]]:
        """Wait until some blocks are done, while there are others; how often each of their years was recorded."""
        until(lambda: self.process.poll() is not None or len(self.done()) >= least)
        done, counts = self.done(), self.counts()
        assert least <= len(done) < len(blocks_of(self.file)) - 4 and self.process.poll() is None, self.told
        return Counter({key: counts[key] for block in done for key in keys(block)})

    def ends(self) -> str:
        """Wait for the end; what was told."""
        assert self.process.wait(timeout=120) == 0, self.told
        return self.told


def block_at(file: Path, row: int, col: int, year: int) -> Block:
    return next(b for b in blocks_of(file) if b.window == Window(row, col, 24, 24) and year in b.years)


def chunks(file: Path) -> dict[str, bytes]:
    return contents(folder_of(file) / "cube.zarr", "*/c/**/*")


def assert_same(run: Running, whole: Path, *, done: Counter[tuple[int, int, int]], lost: int) -> None:
    """The cube is that of the whole run; what was done was not done again, and no more than some blocks were begun twice."""
    assert chunks(run.file) == chunks(whole) and len(chunks(whole)) > 100
    assert ledger.recorded(run.path) == ledger.recorded(folder_of(whole) / "cube.zarr")
    counts = run.counts()
    assert {key: counts[key] for key in done} == done
    assert len({block_at(run.file, *key) for key, n in counts.items() if n > 1}) <= lost


def keys(block: Block) -> list[tuple[int, int, int]]:
    return [(block.window.row, block.window.col, year) for year in block.years]


def running() -> set[str]:
    return set(squeue("%i", "-t", "RUNNING"))


@pytest.mark.slurm
def test_whole_run_on_two_jobs_has_the_bytes_of_one_on_this_machine(whole, tmp_path, slurm_cluster):
    file = write_run(tmp_path, Path(load_run(whole).data), **TINY)
    told = Running(file, verb="run").ends()
    assert "Dask dashboard: http://127.0.0.1" in told and "ssh -N -L" in told
    assert chunks(file) == chunks(whole) and len(chunks(whole)) > 100
    assert load_run(folder_of(file) / "config.yaml").cluster == "slurm"
    assert not squeue("%i")


@pytest.mark.slurm
def test_one_job_and_then_all_are_cancelled(whole, trained):
    run = Running(trained)
    run.until_done(4)
    first = max(running())
    subprocess.run(["scancel", first], check=True)
    done = run.until_done(15)
    rest = set(squeue("%i", "-t", "RUNNING,PENDING"))
    subprocess.run(["scancel", *rest], check=True)
    told = run.ends()
    assert all(re.search(rf"jobs are gone \(.*\b{job}\b.*\); submitting as many", told) for job in {first, *rest})
    assert_same(run, whole, done=done, lost=1 + len(rest))


@pytest.mark.slurm
def test_client_is_killed_and_the_run_is_run_again(whole, trained, monkeypatch):
    monkeypatch.setenv("DASK_JOBQUEUE__SLURM__JOB_CPU", "4")
    run = Running(trained, "reconstruct.workers=3")
    done = run.until_done(4)
    busy, every = running(), set(squeue("%i"))
    assert len(busy) == 2 and len(every) == 3
    run.process.kill()
    until(lambda: not busy & set(squeue("%i")))  # they end by themselves, and the third has its turn
    again = Running(trained)
    told = again.ends()
    (left,) = every - busy
    assert f"cancelling 1 jobs of a client that is gone ({left})" in told
    assert_same(again, whole, done=done, lost=2)


SLOW = """
import time
from ai4land.reconstruct import block as reconstruct

whole = reconstruct.reconstruct_block

def block(block, job):
    time.sleep(0.5)
    return whole(block, job)

def dask_setup(worker):
    reconstruct.reconstruct_block = block
"""


@pytest.mark.slurm
def test_workers_leave_before_their_walltime_and_others_go_on(whole, trained, tmp_path, monkeypatch):
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    monkeypatch.setenv("DASK_DISTRIBUTED__WORKER__PRELOAD", str([str(script)]))
    # The job's shell says how long: the first two workers leave before all can be done.
    first, second = (f"mkdir {tmp_path / time} 2> /dev/null && echo {time}" for time in ("5s", "7s"))
    short = f"$({{ {first}; }} || {{ {second}; }} || echo 600s)"
    monkeypatch.setenv("DASK_JOBQUEUE__SLURM__WORKER_EXTRA_ARGS", json.dumps(["--lifetime", short]))
    run = Running(trained)
    told = run.ends()
    logs = [p.read_text() for p in (folder_of(trained) / "slurm").glob("*.err")]
    assert sum("Reason: worker-lifetime-reached" in log for log in logs) == 2 and len(logs) > 2 and "jobs are gone" in told
    alone = told.count("could not be moved")  # a worker that left while no other was there to take its receipt
    assert told.count("a worker died") <= alone
    assert_same(run, whole, done=Counter(), lost=2 + alone)


BREAKS = """
import os, signal
from ai4land.reconstruct import block as reconstruct

whole = reconstruct.reconstruct_block

def block(block, job):
    place = (block.window.row, block.window.col, 2000 in block.years)
    if place in {places}:
        with open({log!r}, "a") as file:
            file.write(f"{{place}}\\n")
        if place == {places}[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("a disk is full")
    return whole(block, job)

def dask_setup(worker):
    reconstruct.reconstruct_block = block
"""


@pytest.mark.slurm
def test_a_block_that_kills_its_workers_is_named_and_the_rest_is_done(whole, trained, tmp_path, monkeypatch):
    every = blocks_of(trained)
    kills, raises = every[5], every[6]
    places = [(b.window.row, b.window.col, 2000 in b.years) for b in (kills, raises)]
    script, log = tmp_path / "breaks.py", tmp_path / "tries"
    script.write_text(BREAKS.format(places=places, log=str(log)))
    monkeypatch.setenv("DASK_DISTRIBUTED__WORKER__PRELOAD", str([str(script)]))
    run = Running(trained, "reconstruct.at_once=2", "reconstruct.threads=2")
    assert run.process.wait(timeout=120) == 1
    assert Counter(log.read_text().splitlines()) == {str(places[0]): 4, str(places[1]): 3}
    told = run.told
    assert f"2 of {len(every)} blocks failed, the rest is done" in told
    for block, why in ((kills, "4 workers died on it"), (raises, "a disk is full")):
        assert re.search(rf"{re.escape(str(block.window))} of {block.years[0]}-{block.years[-1]}: .*{why}", told)
    assert run.done() == set(every) - {kills, raises}


# -- one allocation -----------------------------------------------------------------------------------------------------


def submit(folder: Path, *lines: str) -> Path:
    """Submit a script of 4 tasks; its output, which ends with what the last line came to."""
    script, out = folder / "allocation.sh", folder / "out"
    script.write_text("\n".join(["#!/bin/bash", *lines, "echo status $?", ""]))
    subprocess.run(["sbatch", "-n", "4", "-c", "1", "-t", "10", "-o", out, script], check=True, capture_output=True, timeout=60)
    return out


def of_command(file: Path, *overrides: str) -> str:
    args = map(str, command("reconstruct", file, "cluster=allocation", *overrides)["args"])
    return " ".join(args)


def tasks() -> dict[str, int]:
    """Process of each task of srun that runs here, by its number."""
    found = {}
    for process in psutil.process_iter():
        try:
            env = process.environ()
            ours = env.get("SLURM_CONF") == os.environ["SLURM_CONF"] and env.get("SLURM_STEP_ID") == "0"
            if ours and process.name() != "srun" and process.parent().name() == "slurmstepd":
                found[env["SLURM_PROCID"]] = process.pid
        except (psutil.Error, AttributeError):
            continue
    return found


@pytest.mark.slurm
def test_an_allocation_does_the_whole_and_ends_with_its_command(whole, trained, tmp_path):
    cut = submit(tmp_path, f"srun {of_command(trained)}")
    path = folder_of(trained) / "cube.zarr"
    until(lambda: len(ledger.recorded(path)) > 5)
    os.kill(tasks()["1"], signal.SIGKILL)  # the one that does the command
    until(lambda: not squeue("%i"))
    assert cut.read_text().endswith("status 137\n")
    assert 5 < len(ledger.recorded(path)) < len(ledger.recorded(folder_of(whole) / "cube.zarr"))
    assert not list((folder_of(trained) / "slurm").iterdir())

    out = submit(tmp_path, f"srun {of_command(trained)}")
    until(lambda: list((folder_of(trained) / "slurm").glob("step-*/scheduler.json")))
    (step,) = (folder_of(trained) / "slurm").iterdir()
    assert step.stat().st_mode & 0o077 == 0
    until(lambda: "Dask dashboard: http://127.0.0.1" in out.read_text())
    address = json.loads((step / "scheduler.json").read_text())["address"]
    assert_strangers_are_refused(address)
    until(lambda: not squeue("%i"))
    assert out.read_text().endswith("status 0\n") and "Traceback" not in out.read_text()
    assert chunks(trained) == chunks(whole)
    assert not step.exists()


@pytest.mark.slurm
def test_an_allocation_without_srun_or_with_too_few_tasks_says_what_to_do(trained, tmp_path):
    out = submit(tmp_path, of_command(trained), f"srun -n 2 {of_command(trained)}")
    until(lambda: not squeue("%i"))
    told = " ".join(out.read_text().split())
    assert told.count("error: cluster is allocation, but") == 2
    assert "this process is no task of srun; inside a job (sbatch, salloc) start it with srun -n 4" in told
    assert "srun has 2 tasks, expected 3 or more" in told and told.endswith("status 1")
