"""Run the web server of a cube: address, port and shutdown. The routes are in :mod:`ai4land.serve.app`."""

from __future__ import annotations

import contextlib
import errno
import getpass
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from ai4land.errors import ConfigError

CONNECTIONS = 200  # maximum concurrent requests; further ones get status 503


def serve(
    path: str,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    catalogue: Path | None = None,
    cors: bool = False,
    tell: Callable[[str], None] = print,
) -> None:
    """Serve a cube (folder or URL) until interrupted (Ctrl-C, SIGTERM).

    Parameters
    ----------
    host, port
        Where to listen; port 0 takes a free one.
    catalogue
        Folder of its STAC catalogue. Default: ``stac`` next to the cube, if it exists.
    cors
        Allow pages of all other sites to read the cube, its catalogue and its model in a visitor's browser (CORS).
    tell
        Called with the address and other messages.

    Raises
    ------
    ConfigError
        If the port is in use, the folder is not a catalogue, or a library is missing.
    DataError
        If there is no cube, or no year of it is finished.
    """
    with _needed():
        import uvicorn

        from ai4land.serve.app import make_app
    app = make_app(path, catalogue=catalogue, cors=cors)

    with listen(host, port) as sock:
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                limit_concurrency=CONNECTIONS,
                timeout_keep_alive=15,
                timeout_graceful_shutdown=1,
            )
        )
        port = sock.getsockname()[1]
        for line in greeting(path, host=host, port=port, cors=cors):
            tell(line)
        stops = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            server.run(sockets=[sock])
        except KeyboardInterrupt:  # uvicorn raises the signal again after closing its connections
            pass
        finally:
            for number, stop in stops.items():
                signal.signal(number, stop)
    tell("stopped")


def greeting(path: str, *, host: str, port: int, cors: bool = False) -> list[str]:
    """Say where the page is, how to reach it from another machine, and who else can read it."""
    public = host not in ("127.0.0.1", "localhost", "::1")
    near = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104
    near = f"[{near}]" if ":" in near else near
    lines = [f"{path} is at http://{near}:{port}/ (Ctrl-C ends it)"]
    came = os.environ.get("SSH_CONNECTION", "").split()
    if len(came) == 4 and not public:
        lines.append(
            f"from your own machine: ssh -L {port}:{near}:{port} {getpass.getuser()}@{came[2]}, then open http://127.0.0.1:{port}/"
        )
    if public:
        lines.append(f"warning: --host {host} makes the cube and its catalogue public to everyone who reaches this machine")
    if cors:
        lines.append(
            "warning: --cors lets any web page that is open in a visitor's browser read the cube, its catalogue and its model"
        )
    return lines


def listen(host: str, port: int) -> socket.socket:
    """Open the listening socket first, so that a port in use is reported before anything starts."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"port is {port}, expected 0..65535; give 0 for a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"host is {host!r}, which has no address ({error.strerror}); give 127.0.0.1 or 0.0.0.0") from error
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port is {port}, which is in use on {host}; give another, or --port 0 for a free one") from error
        raise ConfigError(f"port {port} of {host} cannot be opened ({error.strerror}); give another host or port") from error
    return sock


@contextlib.contextmanager
def _needed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ConfigError(f'serving needs {error.name}, which is missing; run: pip install "ai4land[serve]"') from error
