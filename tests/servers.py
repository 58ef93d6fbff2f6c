"""HTTP servers on the loopback."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn

from ai4land.serve.server import listen


@contextlib.contextmanager
def running(app: Any) -> Iterator[tuple[str, list[tuple[str, str, int]]]]:
    """Serve an application on a free port; gives its address and what was answered: method, path, status."""
    answered: list[tuple[str, str, int]] = []

    async def watched(scope, receive, send):
        async def noted(message):
            if message["type"] == "http.response.start":
                answered.append((scope["method"], scope["path"], message["status"]))
            await send(message)

        await app(scope, receive, noted)

    with listen("127.0.0.1", 0) as sock:
        server = uvicorn.Server(
            uvicorn.Config(watched, log_level="error", lifespan="off", ws="none", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}", answered
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()
