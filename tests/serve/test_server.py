from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

import ai4land.serve
from ai4land.errors import ConfigError, DataError
from ai4land.serve import server
from tests import ROOT
from tests.maps import some_codes, write_maps


@pytest.fixture(scope="module")
def cube(tmp_path_factory):
    return write_maps(tmp_path_factory.mktemp("run") / "cube.zarr", codes=some_codes())


class Command:
    """``ai4land serve`` in a process of its own, as a user starts it."""

    def __init__(self, *args: object, **env: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ai4land.cli", "serve", *map(str, args)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
            cwd=ROOT,
        )
        self.first = self.process.stderr.readline()
        self.url = re.search(r"http://[^/]+/", self.first)[0]
        self.port = int(self.url.rstrip("/").rpartition(":")[2])

    def stop(self, number: int) -> tuple[int, float, str]:
        """Exit status, seconds until the end, and what else it told."""
        start = time.monotonic()
        self.process.send_signal(number)
        try:
            told = self.process.communicate(timeout=15)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, time.monotonic() - start, told


def test_the_command_serves_and_ends_at_once_with_a_reader_attached(cube):
    command = Command(cube)
    with socket.create_connection(("127.0.0.1", command.port)) as reader:
        reader.sendall(b"GET /info.json HTTP/1.1\r\nHost: x\r\n\r\n")
        assert reader.recv(15) == b"HTTP/1.1 200 OK"
        with urllib.request.urlopen(command.url, timeout=10) as page:
            assert b'<script type="module" src="app.js">' in page.read()
        status, seconds, told = command.stop(signal.SIGINT)
    assert status == 0 and seconds < 5 and told == "stopped\n"


def test_it_ends_although_a_remote_store_hangs(cube):
    """A store that accepts and never answers for shards: a real one behind, metadata passed on."""
    inner = Command(cube)
    with socket.create_server(("127.0.0.1", 0)) as door:

        def answer(client):
            asked = client.recv(65536)
            if b"/c/" in asked.split(b"\r\n")[0] and b"land_cover" in asked:
                return  # the connection stays open and silent
            with socket.create_connection(("127.0.0.1", inner.port)) as behind:
                behind.sendall(asked.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
                for part in iter(lambda: behind.recv(65536), b""):
                    client.sendall(part)
            client.close()

        def accept():
            kept = []
            while True:
                try:
                    kept.append(door.accept()[0])
                except OSError:
                    return
                threading.Thread(target=answer, args=(kept[-1],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        outer = Command(f"http://127.0.0.1:{door.getsockname()[1]}/cube")
        with socket.create_connection(("127.0.0.1", outer.port)) as reader:
            reader.sendall(b"GET /tiles/2000/0/0/0.png HTTP/1.1\r\nHost: x\r\n\r\n")
            time.sleep(0.5)
            status, seconds, told = outer.stop(signal.SIGINT)
        assert status == 0 and seconds < 6 and "Traceback" not in told
        door.close()
    inner.stop(signal.SIGINT)


def test_sigterm_ends_it_too(cube):
    assert Command(cube).stop(signal.SIGTERM)[1] < 5


def test_it_says_how_to_reach_it_from_elsewhere_and_who_can(monkeypatch):
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    assert server.greeting("c.zarr", host="127.0.0.1", port=8123) == ["c.zarr is at http://127.0.0.1:8123/ (Ctrl-C ends it)"]
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.7 50000 192.0.2.5 22")
    line = server.greeting("c.zarr", host="127.0.0.1", port=8123)[1]
    assert re.search(r"ssh -L 8123:127\.0\.0\.1:8123 \S+@192\.0\.2\.5, then open http://127\.0\.0\.1:8123/", line)
    lines = server.greeting("c.zarr", host="0.0.0.0", port=8123)
    assert lines[0].startswith("c.zarr is at http://127.0.0.1:8123/") and "public to everyone" in lines[1] and len(lines) == 2
    assert "any web page" in server.greeting("c.zarr", host="127.0.0.1", port=8123, cors=True)[-1]
    assert "http://[::1]:8123/" in server.greeting("c.zarr", host="::1", port=8123)[0]


def test_a_port_that_is_taken_and_one_that_is_none(cube):
    text = r"which is in use on 127\.0\.0\.1; give another, or --port 0"
    with server.listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match=text):
        server.serve(str(cube), port=taken.getsockname()[1])
    with pytest.raises(ConfigError, match="port is 70000, expected 0"):
        server.listen("127.0.0.1", 70000)
    with pytest.raises(ConfigError, match="which has no address"):
        server.listen("no.such.host.invalid", 0)
    with pytest.raises(ConfigError, match="cannot be opened"):
        server.listen("192.0.2.77", 0)


def test_what_is_no_cube_is_said_before_listening(tmp_path):
    with pytest.raises(DataError, match="no cube at"):
        server.serve(str(tmp_path / "none.zarr"))
    done = subprocess.run(
        [sys.executable, "-m", "ai4land.cli", "serve", tmp_path / "none.zarr"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stderr.startswith("error: no cube at") and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["uvicorn", "starlette.applications", "PIL"])
def test_a_missing_library_is_named(monkeypatch, cube, name):
    monkeypatch.setitem(sys.modules, name, None)
    for module in ("app", "tiles"):
        monkeypatch.delitem(sys.modules, f"ai4land.serve.{module}", raising=False)
        monkeypatch.delattr(ai4land.serve, module, raising=False)
    with pytest.raises(ConfigError, match=r'serving needs .* run: pip install "ai4land\[serve\]"'):
        server.serve(str(cube))


def test_a_catalogue_elsewhere_and_readers_of_other_sites_are_asked_for(cube, tmp_path):
    (tmp_path / "catalog.json").write_text(json.dumps({"type": "Catalog", "id": "x"}))
    command = Command(cube, "--catalog", tmp_path, "--cors")
    try:
        with urllib.request.urlopen(f"{command.url}stac/catalog.json", timeout=10) as answer:
            assert json.load(answer)["id"] == "x"
        asked = urllib.request.Request(f"{command.url}info.json", headers={"Origin": "https://example.org"})
        with urllib.request.urlopen(asked, timeout=10) as answer:
            assert answer.headers["Access-Control-Allow-Origin"] == "*"
    finally:
        command.stop(signal.SIGINT)
