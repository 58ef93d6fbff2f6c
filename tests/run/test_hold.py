from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from ai4land.errors import MismatchError
from ai4land.run.align import align
from ai4land.run.hold import hold
from ai4land.run.train import train
from tests.runs import another_process, run_of


def test_second_process_is_refused_by_every_verb_and_a_killed_one_is_taken_over_at_once(tmp_path):
    run = run_of(runs=str(tmp_path))
    with another_process(run.folder) as first:
        there = sorted(run.folder.iterdir())
        for verb in (align, train):
            with pytest.raises(
                MismatchError, match=rf"in use by process {first.pid} on {socket.gethostname()} since .* delete .*claim"
            ):
                verb(run)
        assert sorted(run.folder.iterdir()) == there
        first.send_signal(signal.SIGKILL)
        first.wait()
        with hold(run.folder):
            assert json.loads((run.folder / "claim").read_text())["pid"] == os.getpid()
    assert not run.folder.exists()


def test_verbs_may_call_one_another_and_leave_no_trace_but_results(tmp_path):
    folder = tmp_path / "runs" / "a"
    with hold(folder), hold(folder):
        (folder / "result").touch()
    assert [p.name for p in folder.iterdir()] == ["result"]
    with pytest.raises(RuntimeError, match="stop"), hold(folder):
        raise RuntimeError("stop")
    with another_process(folder), pytest.raises(MismatchError), hold(folder):
        pass


def test_only_the_first_process_of_torchrun_holds_the_folder(tmp_path, monkeypatch):
    with another_process(tmp_path / "a"):
        monkeypatch.setenv("RANK", "1")
        with hold(tmp_path / "a"):
            pass


def test_without_locks_a_file_stands_for_the_lock(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    folder, file = tmp_path / "a", tmp_path / "a" / "claim.host"
    with hold(folder):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert not folder.exists()
    folder.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    file.write_text(json.dumps({"host": socket.gethostname(), "pid": dead.pid}))
    with hold(folder):
        pass
    folder.mkdir()
    file.write_text(json.dumps({"host": "elsewhere", "pid": 1, "since": "2020"}))
    with (
        pytest.raises(MismatchError, match=r"process 1 on elsewhere since 2020, .* If it no longer exists, delete .*claim\.host"),
        hold(folder),
    ):
        pass
