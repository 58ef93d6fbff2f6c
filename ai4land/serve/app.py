"""Web application of a cube: its files, its catalogue, map tiles, and a page with a map.

=======================================  =========================================================================
``/``                                    the page (``ai4land/serve/page``); works offline, loads nothing from other sites
``/info.json``                           title, parts, years, classes with colours, bounds, zooms
``/tiles/{year}/{z}/{x}/{y}.png``        a map tile; ``?part=`` selects a part of a cube in parts
``/point.json``, ``/series.json``        the class of a cell in one year, and in all (``?lon=&lat=&year=&part=``)
``/cube/…`` and ``/<name of cube>/…``    the files of the cube, with ranges; redirects to the address of a remote cube
``/stac/…``                              the catalogue, whose links to ``../<name of cube>`` work here
``/model.json``, ``/model.safetensors``  the model, if the catalogue lies next to the cube
=======================================  =========================================================================

Everything is read-only and public to whoever reaches the port, by default only this machine. Pages of other sites cannot
read it in a browser unless cross-origin requests are allowed (``cors``).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import threading
from collections.abc import Awaitable, Callable
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from ai4land.errors import ConfigError
from ai4land.places import folder_of
from ai4land.serve import tiles
from ai4land.serve.atlas import Atlas, Part, open_atlas, remote, version_of

THREADS = 4  # reads of the cube at once
KEPT = 4096  # tiles cached in memory, a few kB each
CUBE_FILE = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*/)*(?:zarr\.json|c(?:/[0-9]+)*)")
"""Served files of a cube: metadata and shards only."""
TILE = re.compile(r"([0-9]{1,4})/([0-9]{1,2})/([0-9]{1,8})/([0-9]{1,8})\.png")
CATALOGUE_TYPES = {
    ".json": "application/json",
    ".geojson": "application/geo+json",
    ".parquet": "application/vnd.apache.parquet",
    ".tif": "image/tiff; application=geotiff; profile=cloud-optimized",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".webp": "image/webp",
}
"""Served types of catalogue files: none that a browser would run."""
MODEL_FILE = re.compile(r"model\.(?:json|safetensors)")
"""Files of the model to which a catalogue next to the cube refers."""
PAGE_TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_log = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(path: str, *, catalogue: Path | None = None, cors: bool = False) -> Starlette:
    """Open a cube and make the application that serves it; parameters as in :func:`ai4land.serve.server.serve`."""
    folder = folder_of(path)
    catalogue = _catalogue(folder, catalogue)
    maps = _Maps(open_atlas(path), catalogue)
    name = folder.resolve().name if folder else urlsplit(path).path.rstrip("/").rpartition("/")[2]
    cube = folder_endpoint(folder, CUBE_FILE, {}) if folder else _redirect(path)
    page = Path(str(files("ai4land").joinpath("serve", "page")))
    routes = [
        Route("/info.json", maps.info),
        Route("/tiles/{tile:path}", maps.tile),
        Route("/point.json", maps.point),
        Route("/series.json", maps.series),
        Route("/cube/{path:path}", cube),
    ]
    if catalogue:
        endings = "|".join(re.escape(ending) for ending in CATALOGUE_TYPES)
        kept = re.compile(rf"(?:[A-Za-z0-9_][\w.+~@=,-]*/)*[A-Za-z0-9_][\w.+~@=,-]*(?:{endings})", re.ASCII)
        routes.append(Route("/stac/{path:path}", folder_endpoint(catalogue, kept, CATALOGUE_TYPES)))
        if folder and catalogue.resolve().parent == folder.resolve().parent:
            model = folder_endpoint(folder.resolve().parent, MODEL_FILE, {})
            routes += [Route("/model.json", model), Route("/model.safetensors", model)]
    if _PLAIN_NAME.fullmatch(name) and name not in ("cube", "stac", "tiles"):
        routes.append(Route(f"/{name}/{{path:path}}", cube))
    routes.append(Route("/{path:path}", folder_endpoint(page, re.compile(r"[a-z]+\.(?:js|css|svg)"), PAGE_TYPES, "index.html")))
    middleware = [Middleware(_Secure)]
    if cors:
        cross_origin = Middleware(
            CORSMiddleware,
            allow_origins=["*"],
            allow_methods=["GET", "HEAD"],
            allow_headers=["Range", "If-None-Match", "If-Range"],
            expose_headers=["Accept-Ranges", "Content-Length", "Content-Range", "ETag"],
        )
        middleware.append(cross_origin)
    return Starlette(routes=routes, middleware=middleware)


def _catalogue(cube: Path | None, given: Path | None) -> Path | None:
    folder = given or (cube.resolve().parent / "stac" if cube else None)
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
    """Add the security headers to every response, including errors."""

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
    """Serve the files of a folder whose whole relative path matches ``allowed``: GET and HEAD, one range, ETag, no listing.

    Starlette's ``StaticFiles`` refuses files outside the folder, also through symbolic links. ``types`` gives media types by
    suffix; other files keep the type that Starlette guesses. ``index`` is the file for the empty path.
    """
    static = StaticFiles(directory=folder)

    async def endpoint(request: Request) -> Response:
        path = request.path_params.get("path", request.url.path.lstrip("/"))
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
    """Redirect to the address of a remote cube, unless it has credentials or is not HTTP."""
    parts = urlsplit(path)
    open_to_all = parts.scheme in ("http", "https") and not (parts.username or parts.password or parts.query)

    async def endpoint(request: Request) -> Response:
        inside = request.path_params["path"]
        if not open_to_all or not CUBE_FILE.fullmatch(inside):
            raise HTTPException(404, "the cube lies elsewhere; open it at its own address")
        return RedirectResponse(f"{path.rstrip('/')}/{inside}", status_code=307)

    return endpoint


class _Maps:
    """The open cube and the endpoints that read it, a few at a time in threads."""

    def __init__(self, atlas: Atlas, catalogue: Path | None) -> None:
        self.atlas, self.catalogue = atlas, catalogue
        self.turns = asyncio.Semaphore(THREADS)
        self.renewal = threading.Lock()
        self.draw = lru_cache(KEPT)(self._draw)

    def _draw(self, atlas: Atlas, part: str, year: int, z: int, x: int, y: int) -> tuple[bytes, str]:
        image = tiles.tile(atlas.parts[part], year=year, z=z, x=x, y=y)
        return image, f'"{hashlib.blake2b(image, digest_size=9).hexdigest()}"'

    def _renew(self) -> dict[str, Any]:
        """Reopen the cube if it has changed, for example by a new year; keep the open one if that fails."""
        with self.renewal:
            try:
                if version_of(self.atlas.path) != self.atlas.version:
                    self.atlas = open_atlas(self.atlas.path)
            except Exception as error:  # a store may raise anything; the open cube stays usable
                _log.warning("cube %s was not opened again: %s", self.atlas.path, error)
        return describe(self.atlas, catalogue=self.catalogue)

    async def _run(self, request: Request, work: Callable[[], Any]) -> Any:
        try:
            async with self.turns:
                if await request.is_disconnected():
                    raise HTTPException(499, "nobody waits for it")
                return await _aside(work)
        except HTTPException:
            raise
        except asyncio.CancelledError as error:
            raise HTTPException(503, "the server ends") from error
        except KeyError as error:
            raise HTTPException(404, "no such part, year or tile") from error
        except Exception as error:  # a remote store or a damaged shard
            _log.warning("%s: %s", request.url.path, error)
            raise HTTPException(503, "the cube could not be read") from error

    async def info(self, request: Request) -> Response:
        return JSONResponse(await self._run(request, self._renew), headers={"Cache-Control": "no-cache"})

    async def tile(self, request: Request) -> Response:
        named = TILE.fullmatch(request.path_params["tile"])
        if not named:
            raise HTTPException(404)
        where = tuple(int(number) for number in named.groups())
        part, atlas = request.query_params.get("part", ""), self.atlas
        image, etag = await self._run(request, lambda: self.draw(atlas, part, *where))
        headers = {"ETag": etag, "Cache-Control": "public, max-age=3600"}
        if etag in [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]:
            return Response(status_code=304, headers=headers)
        return Response(image, media_type="image/png", headers=headers)

    async def point(self, request: Request) -> Response:
        part, lon, lat = self._place(request)
        year = int(_number(request, "year"))
        return self._json(await self._run(request, lambda: tiles.point(part, lon=lon, lat=lat, year=year)))

    async def series(self, request: Request) -> Response:
        part, lon, lat = self._place(request)
        return self._json(await self._run(request, lambda: tiles.series(part, lon=lon, lat=lat)))

    def _place(self, request: Request) -> tuple[Part, float, float]:
        part = self.atlas.parts.get(request.query_params.get("part", ""))
        if part is None:
            raise HTTPException(404, "no such part")
        return part, _number(request, "lon"), _number(request, "lat")

    def _json(self, content: dict[str, Any]) -> Response:
        return JSONResponse(content, headers={"Cache-Control": "no-cache"})


async def _aside(work: Callable[[], Any]) -> Any:
    """Run in a daemon thread, which never delays the end of the process: a read may hang as long as its store."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Any] = loop.create_future()

    def give(method: Callable[[Any], None], value: Any) -> None:
        if not answer.done():
            method(value)

    def run() -> None:
        try:
            done, value = answer.set_result, work()
        except Exception as error:
            done, value = answer.set_exception, error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(give, done, value)

    threading.Thread(target=run, daemon=True).start()
    return await answer


def _number(request: Request, name: str) -> float:
    text = request.query_params.get(name, "")
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < 1e6:
        raise HTTPException(400, f"{name} is {text[:40]!r}, expected a number")
    return value


def describe(atlas: Atlas, *, catalogue: Path | None = None) -> dict[str, Any]:
    """Describe a cube for the page in plain values; treat every text in it as untrusted."""
    address = urlsplit(atlas.path)
    hidden = address.username or address.password or address.query
    far = remote(atlas.path)

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
                **{name: text(part.attrs, name) for name in ("title", "source", "references", "license", "attribution")},
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
    side = part.levels[0].cell
    return f"{side:.4g}°" if part.crs.is_geographic else f"{side:g} m"
