"""A TCP proxy that an object store is reached through, and that fails as networks do."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import Counter
from contextlib import suppress

_REQUEST = re.compile(rb"(GET|PUT|POST|HEAD|DELETE) (\S+) HTTP/1\.1\r\n")
_RANGE = re.compile(rb"\r\nrange: *bytes", re.IGNORECASE)


class Proxy:
    """Passes connections on to a port, as long as ``mode`` is ``pass``.

    ``refuse``: closes them at once. ``cut``: passes some bytes of each request and breaks off. ``hang``: takes all and answers nothing.
    ``requests`` counts what clients asked for, ``asked`` lists it.
    """

    def __init__(self, port: int) -> None:
        self.mode, self.asked = "pass", []
        self._target = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._over = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._over.set()
        self._server.close()

    @property
    def requests(self) -> Counter[str]:
        return Counter(f"{method}{' range' if ranged else ''}" for method, _, ranged in self.asked)

    def fail(self, mode: str, seconds: float) -> threading.Timer:
        """Fail for some time."""
        self.mode = mode
        timer = threading.Timer(seconds, setattr, (self, "mode", "pass"))
        timer.daemon = True
        timer.start()
        return timer

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            if self.mode == "refuse":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, as of a closed port
                return
            with socket.create_connection(("127.0.0.1", self._target)) as server:
                back = threading.Thread(target=self._back, args=(server, client), daemon=True)
                back.start()
                while data := client.recv(65536):
                    for found in _REQUEST.finditer(data):
                        head = data[found.end() :].split(b"\r\n\r\n")[0]
                        self.asked.append((found[1].decode(), found[2].decode(), bool(_RANGE.search(b"\r\n" + head))))
                    if self.mode == "hang":
                        while self.mode == "hang":
                            time.sleep(0.05)
                        return
                    if self.mode == "refuse":
                        return
                    if self.mode == "cut":
                        server.sendall(data[: len(data) // 2])
                        return
                    server.sendall(data)

    def _back(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                if self.mode == "cut":
                    client.sendall(data[: len(data) // 2])
                    client.shutdown(socket.SHUT_RDWR)
                    return
                if self.mode != "pass":
                    return
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)


def s3_environment(proxy: Proxy) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }
