"""Slots are claimed by real processes; this machine need not have a GPU for that."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from ai4land.errors import ConfigError, StoreError
from ai4land.model import device as module
from ai4land.model.device import release, slot_folder, take_slot

HOLDER = """
import sys
from pathlib import Path
from ai4land.model.device import take_slot
slot = take_slot(int(sys.argv[1]), Path(sys.argv[2]))
print(slot.number, slot.index, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holders(tmp_path):
    """Start processes that claim a slot of ``tmp_path`` each, side by side, and hold it; their slots' numbers and devices."""
    started: list[subprocess.Popen] = []

    def start(processes: int, *, devices: int) -> list[tuple[int, int]]:
        command = [sys.executable, "-c", HOLDER, str(devices), str(tmp_path / "slots")]
        new = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
        started.extend(new)
        return [tuple(int(word) for word in p.stdout.readline().split()) for p in new]

    start.started = started
    yield start
    for p in started:
        p.kill()
        p.communicate()


def test_processes_get_devices_of_their_own_and_a_killed_ones_is_free_again(holders):
    slots = holders(4, devices=4)
    assert sorted(slots) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    victim = slots.index((2, 2))
    holders.started[victim].send_signal(signal.SIGKILL)
    holders.started[victim].wait()
    assert holders(2, devices=4) in ([(2, 2), (4, 0)], [(4, 0), (2, 2)])


def test_more_processes_than_devices_share_them_by_turn(tmp_path, caplog):
    slots = [take_slot(2, tmp_path / "slots") for _ in range(5)]
    assert [s.index for s in slots] == [0, 1, 0, 1, 0]
    assert [r.getMessage().split(";")[0] for r in caplog.records] == [f"{n} processes share 2 devices" for n in (3, 4, 5)]
    slots[1].release()
    slots[1] = take_slot(2, tmp_path / "slots")
    assert slots[1].number == 1
    for slot in slots:
        slot.release()


def test_folder_is_that_of_this_user_job_and_view(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = set()
    for job, visible in ((None, None), ("7", None), ("7", "0,1"), ("8", "0,1")):
        for key, value in (("SLURM_JOB_ID", job), ("CUDA_VISIBLE_DEVICES", visible)):
            monkeypatch.delenv(key, raising=False) if value is None else monkeypatch.setenv(key, value)
        take_slot(4).release()
        names.add(slot_folder())
        assert slot_folder().stat().st_mode & 0o777 == 0o700
    assert len(names) == 4 and all(n.parent == tmp_path and f"-{os.geteuid()}-" in n.name for n in names)


def test_a_folder_that_others_could_have_made_is_refused(tmp_path):
    (mine := tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(mine)
    with pytest.raises(ConfigError, match="link is not a folder"):
        take_slot(2, tmp_path / "link")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is not a folder"):
        take_slot(2, tmp_path / "file")
    mine.chmod(0o770)
    with pytest.raises(ConfigError, match=r"with mode 770, expected user \d+ and mode 700"):
        take_slot(2, mine)
    mine.chmod(0o700)
    (victim := tmp_path / "victim").write_text("theirs")
    (mine / "slot-0").symlink_to(victim)
    with pytest.raises(StoreError, match="symbolic link"):
        take_slot(2, mine)
    assert victim.read_text() == "theirs"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path):
    (theirs := tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(theirs, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        take_slot(2, theirs)


def test_a_folder_without_locks_is_refused(tmp_path, monkeypatch):
    def lockless(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", lockless)
    with pytest.raises(ConfigError, match=r"slot-0 cannot be locked: .*No locks available.*set TMPDIR"):
        take_slot(2, tmp_path / "slots")


def test_without_a_gpu_it_is_the_cpu():
    if torch.cuda.is_available():
        assert module.device().type == "cuda"
    else:
        assert module.device() == torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Make torch say that it has GPUs, which this machine may lack; what was made current."""
    current: list[int] = []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", current.append)

    def count(number: int) -> list[int]:
        monkeypatch.setattr("torch.cuda.device_count", lambda: number)
        return current

    yield count
    release()


def test_the_only_gpu_needs_no_slot(gpus, tmp_path):
    current = gpus(1)
    assert module.device() == torch.device("cuda", 0)
    assert current == [0] and not list(tmp_path.iterdir())


def test_local_rank_decides_where_a_launcher_set_it(gpus, monkeypatch, tmp_path, caplog):
    current = gpus(4)
    for rank, index in (("2", 2), ("5", 1)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert module.device() == torch.device("cuda", index)
    assert current == [2, 1] and not list(tmp_path.iterdir())
    assert [r.getMessage() for r in caplog.records] == ["LOCAL_RANK is 5 with 4 devices; it shares device 1"]


def test_a_process_keeps_its_slot_in_all_threads_until_it_is_released(gpus):
    current = gpus(4)
    other = take_slot(4)
    found: list[torch.device] = []
    threads = [threading.Thread(target=lambda: found.append(module.device())) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [torch.device("cuda", 1)] * 8 and current == [1] * 8
    other.release()
    assert module.device().index == 1
    release()
    assert module.device().index == 0


def test_a_forked_child_has_a_slot_of_its_own_and_does_not_keep_its_parents(gpus):
    gpus(4)
    assert module.device().index == 0
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, str(module.device().index).encode())
            signal.pause()
        finally:
            os._exit(0)
    try:
        assert os.read(reader, 8) == b"1"
        release()
        again = take_slot(4)
        assert again.number == 0
        again.release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_of_this_process_is_current():
    chosen = module.device()
    assert torch.ones(1, device="cuda").device == chosen
    release()
