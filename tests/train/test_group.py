"""Process groups that torchrun starts, and the end of a SLURM job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ai4land.errors import ConfigError
from ai4land.model.checkpoint import WEIGHTS
from ai4land.run.file import load_run
from ai4land.train.group import torchrun_group
from ai4land.workers.slurm import job_end
from tests.runs import command, write_run


def test_a_store_that_outlives_a_restart_is_refused(monkeypatch):
    names = {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"), torchrun_group(timeout=1):
        pass


def test_end_of_a_job_is_unknown_outside_of_one(monkeypatch, tmp_path):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert job_end() is None
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_end() is None


def torchrun(file: Path, *overrides: str) -> subprocess.Popen[str]:
    run = command("train", file, *overrides)
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2", "-m", "ai4land.cli"]
    args = [run["args"][0], *runner, *run["args"][3:]]
    env = run["env"] | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_torchrun_starts_the_same_training_and_restarts_what_dies(planet, tmp_path):
    file = write_run(tmp_path, planet)
    small = ["train.members=1", "train.steps=30", "train.checkpoint_every=10"]
    runs = [load_run(file, [*small, f"name={name}"]) for name in ("whole", "killed")]
    for run in runs:
        launcher = torchrun(file, *small, f"name={run.name}")
        rows = run.folder / "metrics.jsonl"
        if run.name == "killed":
            end = time.monotonic() + 120
            while not rows.is_file() or rows.read_bytes().count(b"\n") < 15:
                assert launcher.poll() is None and time.monotonic() < end
                time.sleep(0.01)
            os.kill(children(launcher.pid)[0], signal.SIGKILL)
        out, _ = launcher.communicate(timeout=200)
        assert launcher.returncode == 0, out
    kept = [[json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert [r["step"] for r in kept[1]] == list(range(31)) and {r["workers"] for r in kept[1][1:]} == {2}
    assert [r.get("loss") for r in kept[0]] == [r.get("loss") for r in kept[1]]
    assert (runs[0].folder / WEIGHTS).read_bytes() == (runs[1].folder / WEIGHTS).read_bytes()
