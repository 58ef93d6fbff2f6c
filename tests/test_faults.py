"""What a reconstruction comes through (`make test-faults`): killed processes, full and lost disks, an object store that is away."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from ai4land.cube import cube, ledger
from ai4land.cube.verify import verify
from ai4land.places import names, read
from ai4land.run.file import load_run
from tests.proxy import s3_environment
from tests.runs import TINY, ai4land, blocks_of, command, contents, folder_of, write_run
from tests.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
KILLS = 30


def trained_in(folder: Path, whole: Path, **others) -> Path:
    """Copy a run without its cube."""
    file = write_run(folder, Path(load_run(whole).data), **TINY, **others)
    shutil.copytree(folder_of(whole), folder_of(file), ignore=shutil.ignore_patterns("cube*", "figures", "evaluation.json"))
    return file


def chunks(file: Path) -> dict[str, bytes]:
    return contents(folder_of(file) / "cube.zarr", "*/c/**/*")


class Cluster:
    """A scheduler, two workers and a client, each a process of its own that may be killed."""

    def __init__(self, file: Path, folder: Path) -> None:
        self.file, self.folder = file, folder
        self.log = (folder / "log").open("ab")
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.start()

    def _run(self, name: str, *args: str) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "DASK_DISTRIBUTED__WORKER__DAEMON": "false"}
        self.processes[name] = subprocess.Popen([sys.executable, *args], stdout=self.log, stderr=self.log, env=env)

    def start(self) -> None:
        """Start what is not there; workers of a scheduler that is gone, too."""
        if not self.alive("scheduler"):
            self.stop()
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                self.address = f"tcp://127.0.0.1:{s.getsockname()[1]}"
            port = self.address.rpartition(":")[2]
            self._run(
                "scheduler", "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard"
            )
        for name in ("worker 1", "worker 2"):
            if not self.alive(name):
                self._run(
                    name, "-m", "distributed.cli.dask_worker", self.address, "--no-nanny", "--nthreads", "1", "--no-dashboard"
                )
        if not self.alive("client"):
            made = command("reconstruct", self.file, f"cluster={self.address}")
            self.processes["client"] = subprocess.Popen(**made, stdout=self.log, stderr=self.log)

    def alive(self, name: str) -> bool:
        return name in self.processes and self.processes[name].poll() is None

    def kill(self, name: str) -> None:
        """Kill a process and all that it started, as when its node dies."""
        with psutil.Process(self.processes[name].pid).oneshot():
            family = psutil.Process(self.processes[name].pid).children(recursive=True)
        for process in (self.processes[name], *family):
            process.kill()
        self.processes[name].wait()

    def stop(self) -> None:
        for name in self.processes:
            if self.alive(name):
                self.kill(name)

    def told(self) -> str:
        return (self.folder / "log").read_text(errors="replace")


def test_killed_at_thirty_random_moments(whole, tmp_path):
    """Workers, scheduler and client are killed while cubes are made, one after the other; every cube has the bytes of the unbroken one."""
    dice = random.Random(6)
    kills: Counter[str] = Counter()
    expected, digests = chunks(whole), ledger.recorded(folder_of(whole) / "cube.zarr")
    number = 0
    while kills.total() < KILLS:
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        file = trained_in(folder, whole)
        path = folder_of(file) / "cube.zarr"
        cluster = Cluster(file, folder)
        here: Counter[str] = Counter()
        try:
            until(lambda p=path: (p / "zarr.json").is_file(), seconds=60)
            while True:
                time.sleep(dice.uniform(0.05, 1.2))
                if not cluster.alive("client"):
                    if cluster.processes["client"].returncode == 0:
                        break
                    cluster.start()  # it ended as what it needs was gone
                    continue
                seen = cube.open_cube(path)["year"].values.tolist()
                assert seen == cube.whole_years(path)[: len(seen)]  # no year is to be seen that is not whole
                if kills.total() < KILLS and sum(here.values()) < 8:
                    victim = dice.choice(["worker 1", "worker 2", "scheduler", "client"])
                    cluster.kill(victim)
                    kills[victim] += 1
                    here[victim] += 1
                    cluster.start()
        finally:
            cluster.stop()
        assert chunks(file) == expected, cluster.told()[-3000:]
        assert ledger.recorded(path) == digests and verify(path) == []
        done = Counter((e["row"], e["col"], e["years"][0]) for e in ledger.entries(path))
        # A kill costs at most what the two workers had in hand; what was recorded is never done again.
        assert done.total() - len(done) == 0, done
        assert not list(folder_of(file).rglob("*.partial"))
        shutil.rmtree(folder)


# -- disks --------------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own in memory."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(whole, tmp_path):
    with small_disk(tmp_path / "disk", "200m") as disk:
        file = trained_in(disk, whole)
        held = psutil.disk_usage(str(disk)).used
        need = sum(len(v) for v in chunks(whole).values())
        remount(disk, f"size={(held + need // 2) // 1024}k")
        process = subprocess.run(**command("reconstruct", file), capture_output=True, text=True, timeout=120)
        assert process.returncode == 1 and "Traceback" not in process.stderr.split("error: ")[-1]
        assert "No space left on device" in process.stderr and "what is done stays done" in process.stderr
        done = ledger.recorded(folder_of(file) / "cube.zarr")
        assert len(done) > 0 and cube.open_cube(folder_of(file) / "cube.zarr")["year"].size == 0
        assert [d for d in verify(folder_of(file) / "cube.zarr") if d.keys] == []
        remount(disk, "size=200m")
        ai4land("reconstruct", file)
        assert chunks(file) == chunks(whole) and verify(folder_of(file) / "cube.zarr") == []
        assert not list(folder_of(file).rglob("*.partial"))


def test_a_cube_that_may_no_longer_be_written_is_named_and_the_run_goes_on_later(whole, tmp_path):
    """Its folders become immutable: what root, too, has no permission for."""
    file = trained_in(tmp_path, whole)
    path = folder_of(file) / "cube.zarr"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(**command("reconstruct", file), stdout=log, stderr=log)
        until(lambda: len(ledger.recorded(path)) > 8)
        lost = subprocess.run(["chattr", "-R", "+i", path], capture_output=True, text=True, check=False)
        try:
            if subprocess.run(["lsattr", "-d", path], capture_output=True, text=True, check=False).stdout[4:5] != "i":
                process.kill()
                pytest.skip(f"a folder cannot be made immutable here: {lost.stderr.strip()[:200]}")
            assert process.wait(timeout=120) == 1
        finally:
            subprocess.run(["chattr", "-R", "-i", path], check=False)
    told = (tmp_path / "log").read_text()
    assert "not permitted" in told and "what is done stays done" in told
    ai4land("reconstruct", file)
    assert chunks(file) == chunks(whole) and verify(path) == []


# -- an object store ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["refuse", "cut", "hang"])
def test_an_object_store_that_is_away_for_half_a_minute_is_waited_for(whole, tmp_path, s3, bucket, mode):
    file = trained_in(tmp_path, whole)
    place = f"{bucket}/world.zarr"
    env = {**os.environ, **s3_environment(s3)}
    log = (tmp_path / "log").open("wb")
    made = command("reconstruct", file, f"reconstruct.cube={place}")
    process = subprocess.Popen(**{**made, "env": {**made.get("env", {}), **env}}, stdout=log, stderr=log)
    until(lambda: len(ledger.recorded(place)) > 8 or process.poll() is not None)
    s3.fail(mode, 30.0)
    assert process.wait(timeout=240) == 0, (tmp_path / "log").read_text()
    made_there = {name: read(place, name) for name in names(place) if "/c/" in name}
    expected = chunks(whole)
    assert {k: made_there[k] for k in expected} == expected
    assert verify(place) == [] and cube.open_cube(place)["year"].size == 8


def test_a_run_into_an_object_store_that_is_killed_is_run_again(whole, tmp_path, s3, bucket):
    file = trained_in(tmp_path, whole)
    place = f"{bucket}/world.zarr"
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(**command("reconstruct", file, f"reconstruct.cube={place}"), stdout=log, stderr=log)
    until(lambda: len(ledger.recorded(place)) > 8)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in children:
        if child.is_running():
            child.send_signal(signal.SIGKILL)
    process.wait()
    done = ledger.recorded(place)
    assert 8 < len(done) < 8 * len({b.window for b in blocks_of(file)})
    ai4land("reconstruct", file, f"reconstruct.cube={place}")
    assert verify(place) == [] and ledger.recorded(place) == ledger.recorded(folder_of(whole) / "cube.zarr")
    counts = Counter((e["row"], e["col"], y) for e in ledger.entries(place) for y in e["years"])
    assert all(counts[key] == 1 for key in done)
