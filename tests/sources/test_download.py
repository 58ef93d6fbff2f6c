"""Downloads from a real server on this machine that can cut, change, refuse and lie."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from ai4land.errors import ConfigError, DataError
from ai4land.sources.download import LONGEST_PAUSE, TRIES, copy, download, split_multihash, verify

CONTENT = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(300_000)


class Files(ThreadingHTTPServer):
    """Serves one file, with ranges; what is set on it makes it a bad server."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.tag, self.modified = CONTENT, '"one"', None
        self.ranges, self.heeds_if_range = True, True
        self.cuts: list[int] = []
        """Bytes after which the connections that come next are cut."""
        self.after_cut = lambda: None
        self.hold = threading.Event()
        """Set while a connection is held after the bytes of a cut."""
        self.holds = False
        self.statuses: list[tuple[int, dict[str, str]]] = []
        self.asked: list[dict[str, str]] = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/file.bin"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        server.asked.append(dict(self.headers))
        if server.statuses:
            status, headers = server.statuses.pop(0)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(key, value)
            self.end_headers()
            return
        validator = server.tag or server.modified
        start, wanted = 0, self.headers.get("Range")
        fresh = self.headers.get("If-Range") in (None, validator) or not server.heeds_if_range
        if wanted and server.ranges and fresh:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
        else:
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        body = server.content[start:]
        if server.tag:
            self.send_header("ETag", server.tag)
        if server.modified:
            self.send_header("Last-Modified", server.modified)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.cuts:
            self.wfile.write(body[: server.cuts.pop(0)])
            self.wfile.flush()
            while server.holds and not self.gone():
                server.hold.set()
            self.connection.close()
            server.after_cut()
        else:
            self.wfile.write(body)

    def gone(self):
        """Whether the client has gone; waits a moment for it."""
        self.connection.settimeout(0.05)
        try:
            return self.connection.recv(1) == b""
        except TimeoutError:
            return False
        except OSError:
            return True

    def finish(self):
        with suppress(OSError, ValueError):
            super().finish()


@contextmanager
def serving():
    http = Files()
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield http
    finally:
        http.shutdown()
        http.server_close()


@pytest.fixture
def server():
    with serving() as http:
        yield http


def get(server, path, **options):
    return download(lambda: server.url, path, name=server.url, pause=0.01, timeout=5, **options)


def ranges(server):
    return [asked.get("Range") for asked in server.asked]


def test_a_file_comes_whole_and_leaves_no_part(server, tmp_path):
    stored = get(server, tmp_path / "a.bin", size=len(CONTENT), headers={"X-Mine": "1"})
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert stored.size == len(CONTENT) and stored.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    assert server.asked[0]["Accept-Encoding"] == "identity" and server.asked[0]["X-Mine"] == "1"


@pytest.mark.parametrize("by", ["tag", "time"])
def test_a_connection_that_is_cut_is_gone_on_with(server, tmp_path, by):
    if by == "time":
        server.tag, server.modified = None, formatdate(1_700_000_000, usegmt=True)
    server.cuts = [100_000, 50_000]
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert len(server.asked) == 3 and server.asked[1]["If-Range"] == (server.tag or server.modified)
    starts = [int(r.removeprefix("bytes=").removesuffix("-")) for r in ranges(server)[1:]]
    assert 0 < starts[0] <= 100_000 and starts[0] < starts[1] <= 150_000


def test_a_download_that_was_given_up_is_gone_on_with(server, tmp_path):
    path = tmp_path / "a.bin"
    server.cuts = [100_000] + [0] * (TRIES + 2)
    with pytest.raises(DataError, match=rf"failed {TRIES} times without progress"):
        get(server, path)
    assert not path.exists() and (tmp_path / "a.bin.part").stat().st_size > 0
    server.cuts, server.asked = [], []
    get(server, path)
    assert path.read_bytes() == CONTENT and ranges(server)[0] is not None


def test_a_process_that_was_killed_is_gone_on_with(server, tmp_path):
    path = tmp_path / "a.bin"
    server.cuts, server.holds = [200_000], True
    program = "import sys; from pathlib import Path; from ai4land.sources.download import download; url = sys.argv[1]; "
    program += "download(lambda: url, Path(sys.argv[2]), name=url)"
    process = subprocess.Popen([sys.executable, "-c", program, server.url, str(path)])
    try:
        assert server.hold.wait(30)
        part = tmp_path / "a.bin.part"
        for _ in range(200):
            if part.is_file() and part.stat().st_size > 100_000:
                break
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait(10)
    have = part.stat().st_size
    assert 100_000 < have <= 200_000 and not path.exists()
    server.holds, server.asked = False, []
    get(server, path)
    assert path.read_bytes() == CONTENT and ranges(server) == [f"bytes={have}-"]


def test_a_file_that_changed_is_never_spliced(server, tmp_path):
    def change():
        server.content, server.tag = OTHER, '"two"'

    server.cuts, server.after_cut = [100_000], change
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == OTHER
    assert ranges(server)[1] is not None


def test_a_server_that_ignores_if_range_is_not_believed(server, tmp_path):
    def change():
        server.content, server.tag = OTHER, '"two"'

    server.cuts, server.after_cut, server.heeds_if_range = [100_000], change, False
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == OTHER
    assert ranges(server)[1] is not None and ranges(server)[2] is None


def test_a_server_without_ranges_or_validators_is_asked_from_the_beginning(server, tmp_path):
    server.cuts, server.ranges = [100_000], False
    get(server, tmp_path / "a.bin")
    server.cuts, server.ranges, server.tag, server.asked = [100_000], True, 'W/"weak"', []
    get(server, tmp_path / "b.bin")
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes() == CONTENT
    assert ranges(server) == [None, None]


def test_a_part_of_another_address_is_not_gone_on_with(server, tmp_path):
    server.cuts = [100_000] + [0] * (TRIES + 2)
    with pytest.raises(DataError):
        get(server, tmp_path / "a.bin")
    server.cuts, server.asked = [], []
    download(lambda: server.url, tmp_path / "a.bin", name="http://elsewhere/file.bin", pause=0.01)
    assert ranges(server) == [None] and (tmp_path / "a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("tag", ['"one"', '"two"'])
def test_a_whole_part_is_only_moved_if_the_server_agrees(server, tmp_path, tag):
    (tmp_path / "a.bin.part").write_bytes(CONTENT if tag == '"one"' else OTHER)
    (tmp_path / "a.bin.part.json").write_text(json.dumps({"name": server.url, "validator": '"one"'}))
    server.tag, server.heeds_if_range = tag, False
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert ranges(server) == ([f"bytes={len(CONTENT)}-"] if tag == '"one"' else [f"bytes={len(CONTENT)}-", None])


def test_busy_servers_are_asked_again_when_they_say(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout=None: waits.append(timeout))
    server.statuses = [(503, {"Retry-After": "7"}), (429, {}), (500, {"Retry-After": "9999"}), (502, {})]
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert [w for w in waits if w is not None][:4] == [7, 0.02, LONGEST_PAUSE, 0.08]


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_refusal_is_final_and_named(server, tmp_path, status):
    server.statuses = [(status, {})] * 3
    with pytest.raises(DataError, match=rf"file.bin can not be downloaded \(status {status} .*check its address"):
        get(server, tmp_path / "a.bin")
    assert len(server.asked) == 1


def test_a_dead_server_is_given_up(tmp_path):
    with serving() as http:
        url = http.url
    with pytest.raises(DataError, match=rf"failed {TRIES} times without progress \(.*refused"):
        download(lambda: url, tmp_path / "a.bin", name=url, pause=0.001)


def test_a_silent_server_is_not_waited_for_for_ever(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/a"
        with pytest.raises(DataError, match=rf"failed {TRIES} times without progress \(.*timed out"):
            download(lambda: url, tmp_path / "a.bin", name=url, pause=0.001, timeout=0.1)


@pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha256", "sha512"])
def test_checksums_are_verified(server, tmp_path, algorithm):
    prefix = {"md5": "d50110", "sha1": "1114", "sha256": "1220", "sha512": "1340"}[algorithm]
    right = prefix + hashlib.new(algorithm, CONTENT).hexdigest()
    get(server, tmp_path / "a.bin", checksum=right)
    assert split_multihash(right, name="a") == (algorithm, right[len(prefix) :])
    server.asked, server.content = [], OTHER
    with pytest.raises(DataError, match=rf"{algorithm} of .*file.bin is .*, expected {right[len(prefix) :]}"):
        get(server, tmp_path / "b.bin", checksum=right)
    assert len(server.asked) == 2 and not (tmp_path / "b.bin").exists() and not (tmp_path / "b.bin.part").exists()


def test_another_size_than_promised_is_refused_at_once(server, tmp_path):
    with pytest.raises(DataError, match=r"can not be downloaded \(it has 300000 bytes, expected 5\)"):
        get(server, tmp_path / "a.bin", size=5)
    assert len(server.asked) == 1 and list(tmp_path.iterdir()) == []
    (tmp_path / "b").write_bytes(b"abc")
    with pytest.raises(DataError, match="b has 3 bytes, expected 5"):
        verify(tmp_path / "b", name="b", size=5)


@pytest.mark.parametrize("checksum", ["", "zz", "1220abcd", "d501100", "ff20" + "0" * 64])
def test_unknown_checksums_are_refused(tmp_path, checksum):
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(ConfigError, match="expected a multihash of"):
        verify(tmp_path / "a", name="a", checksum=checksum)


def test_an_address_is_made_anew_for_every_attempt(server, tmp_path):
    seen = []

    def address():
        seen.append(len(seen))
        return f"{server.url}?sig={len(seen)}"

    server.cuts = [100_000]
    download(address, tmp_path / "a.bin", name=server.url, pause=0.01)
    assert seen == [0, 1]


def test_a_stopped_download_keeps_its_part(server, tmp_path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(DataError, match="stopped"):
        get(server, tmp_path / "a.bin", stop=stop)
    assert server.asked == []


def test_local_files_are_copied_and_checked(tmp_path):
    (tmp_path / "a").write_bytes(CONTENT)
    stored = copy(tmp_path / "a", tmp_path / "b", name="a", size=len(CONTENT))
    assert (tmp_path / "b").read_bytes() == CONTENT and stored.multihash == "1220" + hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(DataError, match="expected 3"):
        copy(tmp_path / "a", tmp_path / "c", name="a", size=3)
    with pytest.raises(DataError, match="none can not be copied"):
        copy(tmp_path / "none", tmp_path / "c", name="none")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
