"""A cube on the web: its files, its catalogue, map tiles, and a page to look at it.

Tiles come from rio-tiler's reader through :mod:`ai4land.tiles` and not from the application of titiler-xarray: that one opens
whatever address a visitor names, knows one group of a store and no overviews, keeps no tile, and draws pictures of any size.

======================================  =========================================================================
``/``                                   the page (``ai4land/page``): works without internet, loads nothing from elsewhere
``/info.json``                          title, parts, years, classes with colours, bounds, zooms
``/tiles/{year}/{z}/{x}/{y}.png``       a map tile; ``?part=`` names the part of a cube that has parts
``/point.json``, ``/series.json``       the class of a cell in one year, and in all (``?lon=&lat=&year=&part=``)
``/cube/…`` and ``/<name of cube>/…``   the files of the cube, with ranges; a remote cube is redirected to where it lies
``/stac/…``                             the catalogue, so that its links to ``../<name of cube>`` hold
======================================  =========================================================================

Everything is read-only and public to whoever reaches the port, also to other pages of the same browser (CORS): the loopback is the default.
"""

from __future__ import annotations

import errno
import getpass
import hashlib
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Awaitable, Callable
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ai4land.errors import ConfigError

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from ai4land.tiles import Atlas, Part

THREADS = 4
"""Tiles that are drawn at once."""
KEPT = 4096
"""Tiles that are kept in memory, of a few kB each."""
CONNECTIONS = 200
"""Requests that are taken at once; more are answered 503."""
CUBE_FILE = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*/)*(?:zarr\.json|c(?:/[0-9]+)*)")
"""What of a cube is served: metadata and shards, and nothing else that lies in its folder."""
CATALOGUE_TYPES = {
    ".json": "application/json",
    ".geojson": "application/geo+json",
    ".parquet": "application/vnd.apache.parquet",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".webp": "image/webp",
}
"""What of a catalogue is served: nothing that a browser would run."""
PAGE_TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_log = logging.getLogger(__name__)

Endpoint = Callable[["Request"], Awaitable["Response"]]


def serve(
    path: str, *, host: str = "127.0.0.1", port: int = 0, catalogue: Path | None = None, tell: Callable[[str], None] = print
) -> None:
    """Serve a cube until interrupted (Ctrl-C, SIGTERM).

    Parameters
    ----------
    path
        Folder or address of the cube.
    host, port
        Where to listen; port 0 takes a free one.
    catalogue
        Folder of its STAC catalogue; by default ``stac`` beside the cube, where there is one.
    tell
        Is told the address.

    Raises
    ------
    ConfigError
        If the port is taken, the catalogue is none, or the libraries for it are lacking.
    DataError
        If there is no cube, or no year of it is finished.
    """
    app = make_app(path, catalogue=catalogue)
    import uvicorn

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
        for line in greeting(path, host=host, port=port):
            tell(line)
        stops = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            server.run(sockets=[sock])
        except KeyboardInterrupt:  # uvicorn raises the signal again when it has closed its connections
            pass
        finally:
            for number, stop in stops.items():
                signal.signal(number, stop)
    tell("stopped")


def greeting(path: str, *, host: str, port: int) -> list[str]:
    """Say where the page is, how to reach it from elsewhere, and who else can."""
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
    return lines


def listen(host: str, port: int) -> socket.socket:
    """Open the listening socket, so that a port that is taken is known before anything starts."""
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


def make_app(path: str, *, catalogue: Path | None = None) -> Starlette:
    """Make the application that serves a cube; the cube is opened here, so that what is wrong with it is said at once.

    Parameters
    ----------
    path
        Folder or address of the cube.
    catalogue
        As in :func:`serve`.
    """
    try:
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.cors import CORSMiddleware
        from starlette.routing import Route

        from ai4land import tiles
    except ImportError as error:
        raise ConfigError(f'serving needs {error.name}, which is missing; run: pip install "ai4land[serve]"') from error
    far = tiles.remote(path)
    catalogue = _catalogue(path, catalogue, far=far)
    maps = _Maps(tiles.open_atlas(path), catalogue)
    name = urlsplit(path).path.rstrip("/").rpartition("/")[2] if far else Path(path).resolve().name
    cube = _redirect(path) if far else folder_endpoint(Path(path), CUBE_FILE, {})
    page = Path(str(files("ai4land").joinpath("page")))
    routes = [
        Route("/info.json", maps.info),
        Route("/tiles/{year:int}/{z:int}/{x:int}/{y:int}.png", maps.tile),
        Route("/point.json", maps.point),
        Route("/series.json", maps.series),
        Route("/cube/{path:path}", cube),
    ]
    if catalogue:
        endings = "|".join(re.escape(ending) for ending in CATALOGUE_TYPES)
        kept = re.compile(rf"(?:[A-Za-z0-9_][\w.+~@=,-]*/)*[A-Za-z0-9_][\w.+~@=,-]*(?:{endings})", re.ASCII)
        routes.append(Route("/stac/{path:path}", folder_endpoint(catalogue, kept, CATALOGUE_TYPES)))
    if _PLAIN_NAME.fullmatch(name) and name not in ("cube", "stac", "tiles"):
        routes.append(Route(f"/{name}/{{path:path}}", cube))
    routes.append(Route("/{path:path}", folder_endpoint(page, re.compile(r"[a-z]+\.(?:js|css|svg)"), PAGE_TYPES, "index.html")))
    cors = Middleware(
        CORSMiddleware,
        allow_origins=["*"],
        allow_methods=["GET", "HEAD"],
        allow_headers=["Range", "If-None-Match", "If-Range"],
        expose_headers=["Accept-Ranges", "Content-Length", "Content-Range", "ETag"],
    )
    return Starlette(routes=routes, middleware=[Middleware(_Secure), cors])


def _catalogue(path: str, given: Path | None, *, far: bool) -> Path | None:
    folder = given or (None if far else Path(path).resolve().parent / "stac")
    if folder is None or (given is None and not folder.is_dir()):
        return None
    if _entry(folder) is None:
        if given is None:
            return None
        raise ConfigError(
            f"catalogue is {folder}, which holds no catalog.json or collection.json; give the folder of a STAC catalogue"
        )
    return folder


def _entry(folder: Path) -> str | None:
    return next((name for name in ("catalog.json", "collection.json") if (folder / name).is_file()), None)


class _Secure:
    """Put the security headers on every answer, errors too."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                have = {name.lower() for name, _ in message["headers"]}
                extra = [(n.lower().encode(), v.encode()) for n, v in HEADERS.items() if n.lower().encode() not in have]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        await self.app(scope, receive, guarded)


def folder_endpoint(folder: Path, allowed: re.Pattern[str], types: dict[str, str], index: str | None = None) -> Endpoint:
    """Serve those files of a folder whose path is allowed: GET and HEAD, one range, ETag; never a listing.

    Starlette's ``StaticFiles`` resolves the path and refuses what lies outside, also through a symbolic link.

    Parameters
    ----------
    folder
        Whose files are served.
    allowed
        Matches the whole path of a file within the folder.
    types
        Media types by ending; others are ``application/json`` and ``application/octet-stream``.
    index
        File for the empty path.
    """
    from starlette.exceptions import HTTPException
    from starlette.staticfiles import StaticFiles

    static = StaticFiles(directory=folder)

    async def endpoint(request: Request) -> Response:
        path = request.path_params["path"]
        if index is not None and path == "":
            path = index
        elif not allowed.fullmatch(path):
            raise HTTPException(404)
        if "," in request.headers.get("range", ""):
            raise HTTPException(416, "one range at a time")
        try:
            response = await static.get_response(path, request.scope)
        except OSError as error:
            raise HTTPException(404) from error
        if response.status_code == 200:
            media = types.get(Path(path).suffix)
            if media:
                response.headers["Content-Type"] = media
            if types is CATALOGUE_TYPES:
                response.headers["Content-Security-Policy"] = "default-src 'none'; sandbox"
        response.headers["Cache-Control"] = "no-cache"
        return response

    return endpoint


def _redirect(path: str) -> Endpoint:
    """Send readers of a remote cube to where it lies. What is read with credentials of this machine is not passed on."""
    from starlette.exceptions import HTTPException
    from starlette.responses import RedirectResponse

    parts = urlsplit(path)
    open_to_all = parts.scheme in ("http", "https") and not (parts.username or parts.password or parts.query)

    async def endpoint(request: Request) -> Response:
        inside = request.path_params["path"]
        if not open_to_all or not CUBE_FILE.fullmatch(inside):
            raise HTTPException(404, "the cube lies elsewhere; open it at its own address")
        return RedirectResponse(f"{path.rstrip('/')}/{inside}", status_code=307)

    return endpoint


class _Maps:
    """The open cube, and the endpoints that read it, a few at a time in threads."""

    def __init__(self, atlas: Atlas, catalogue: Path | None) -> None:
        import anyio

        from ai4land import tiles

        self.atlas, self.catalogue = atlas, catalogue
        self.turns = anyio.Semaphore(THREADS)
        self.renewal = threading.Lock()
        self.draw = lru_cache(KEPT)(self._draw)
        self.tiles = tiles

    def _draw(self, atlas: Atlas, part: str, year: int, z: int, x: int, y: int) -> tuple[bytes, str]:
        image = self.tiles.tile(atlas.parts[part], year=year, z=z, x=x, y=y)
        return image, f'"{hashlib.blake2b(image, digest_size=9).hexdigest()}"'

    def _renew(self) -> dict[str, Any]:
        """Open the cube again where it has changed, for example by a year; an unreadable one leaves what is open."""
        with self.renewal:
            try:
                if self.tiles.version(self.atlas.path) != self.atlas.version:
                    self.atlas = self.tiles.open_atlas(self.atlas.path)
            except Exception as error:  # a store may raise anything; what was open stays good
                _log.warning("cube %s was not opened again: %s", self.atlas.path, error)
        return describe(self.atlas, catalogue=self.catalogue)

    async def _run(self, request: Request, work: Callable[[], Any]) -> Any:
        import anyio.to_thread
        from starlette.exceptions import HTTPException

        async with self.turns:
            if await request.is_disconnected():
                raise HTTPException(499, "nobody waits for it")
            try:
                return await anyio.to_thread.run_sync(work, abandon_on_cancel=True)
            except KeyError as error:
                raise HTTPException(404, "no such part, year or tile") from error
            except Exception as error:  # a remote store or a damaged shard
                _log.warning("%s: %s", request.url.path, error)
                raise HTTPException(503, "the cube could not be read") from error

    async def info(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        return JSONResponse(await self._run(request, self._renew), headers={"Cache-Control": "no-cache"})

    async def tile(self, request: Request) -> Response:
        from starlette.responses import Response

        where = tuple(request.path_params[name] for name in ("year", "z", "x", "y"))
        part, atlas = request.query_params.get("part", ""), self.atlas
        image, etag = await self._run(request, lambda: self.draw(atlas, part, *where))
        headers = {"ETag": etag, "Cache-Control": "public, max-age=3600"}
        if etag in [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]:
            return Response(status_code=304, headers=headers)
        return Response(image, media_type="image/png", headers=headers)

    async def point(self, request: Request) -> Response:
        part, lon, lat = self._place(request)
        year = int(_number(request, "year"))
        return self._json(await self._run(request, lambda: self.tiles.point(part, lon=lon, lat=lat, year=year)))

    async def series(self, request: Request) -> Response:
        part, lon, lat = self._place(request)
        return self._json(await self._run(request, lambda: self.tiles.series(part, lon=lon, lat=lat)))

    def _place(self, request: Request) -> tuple[Part, float, float]:
        from starlette.exceptions import HTTPException

        part = self.atlas.parts.get(request.query_params.get("part", ""))
        if part is None:
            raise HTTPException(404, "no such part")
        return part, _number(request, "lon"), _number(request, "lat")

    def _json(self, content: dict[str, Any]) -> Response:
        from starlette.responses import JSONResponse

        return JSONResponse(content, headers={"Cache-Control": "no-cache"})


def _number(request: Request, name: str) -> float:
    from starlette.exceptions import HTTPException

    text = request.query_params.get(name, "")
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < 1e6:
        raise HTTPException(400, f"{name} is {text[:40]!r}, expected a number")
    return value


def describe(atlas: Atlas, *, catalogue: Path | None = None) -> dict[str, Any]:
    """Describe a cube for the page, in plain values; every text in it may come from a stranger."""
    address = urlsplit(atlas.path)
    hidden = address.username or address.password or address.query
    far = "://" in atlas.path

    def text(attrs: dict[str, Any], name: str) -> str:
        value = attrs.get(name, atlas.attrs.get(name, ""))
        return value if isinstance(value, str) else ""

    return {
        "version": atlas.version,
        "cube": "cube" if not far else None if hidden else atlas.path,
        "catalogue": f"stac/{_entry(catalogue)}" if catalogue else None,
        "parts": [
            {
                "name": part.name,
                "title": text(part.attrs, "title"),
                "source": text(part.attrs, "source"),
                "references": text(part.attrs, "references"),
                "license": text(part.attrs, "license"),
                "years": list(part.years),
                "classes": [{"code": e.code, "name": e.name, "colour": e.colour} for e in part.legend],
                "fill": part.fill.name,
                "bounds": list(part.bounds),
                "zooms": list(part.zooms),
                "cell": _side(part),
                "shape": list(part.levels[0].codes.shape[1:]),
            }
            for part in atlas.parts.values()
        ],
    }


def _side(part: Part) -> str:
    """Side of a cell in words."""
    side = part.levels[0].cell
    return f"{side:.4g}°" if part.crs.is_geographic else f"{side:g} m"
