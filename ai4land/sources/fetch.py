"""Fetch a source to a mirror: its files, and a STAC catalogue for reading them without a network.

:func:`fetch` takes a known source (:mod:`ai4land.sources.known`) or a collection of any STAC catalogue or API. It keeps
complete files, downloads missing or damaged ones, and reports failed files without losing the others.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import requests

from ai4land.errors import ConfigError, DataError
from ai4land.grid import Bounds
from ai4land.sources.download import Stored, copy, download, verify
from ai4land.sources.hrefs import Beyond, local_path, origin
from ai4land.sources.known import credits_of, load_source
from ai4land.sources.mirror import (
    check_ours,
    inside,
    locked,
    plain_href,
    read_manifest,
    safe_name,
    write_catalog,
    write_collection,
    write_item,
    write_json,
)
from ai4land.sources.plan import Plan, Wanted, plan_known, plan_stac
from ai4land.sources.search import Modifier
from ai4land.years import expand_years

_log = logging.getLogger(__name__)

SPARE = 2**26
"""Bytes to keep free on the disk."""
_SAVED_EVERY = 5.0

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Fetched:
    """Outcome of fetching a source.

    ``kept`` files were already complete, ``brought`` ones were downloaded or copied; ``size`` is the bytes of both.
    ``failed`` maps file names to reasons.
    """

    source: str
    folder: Path
    kept: int
    brought: int
    failed: dict[str, str]
    size: int


def fetch(
    source: str,
    *,
    to: str | Path,
    catalog: str | Path | None = None,
    years: Iterable[int] | None = None,
    bbox: Bounds | None = None,
    assets: Sequence[str] = (),
    modifier: Modifier | None = None,
    token: str | None = None,
    token_hosts: Sequence[str] = (),
    beyond: Beyond = "hosts",
    threads: int = 4,
    timeout: float = 60.0,
    pause: float = 1.0,
    progress: Progress | None = None,
) -> Fetched:
    """Fetch a source to a mirror.

    Parameters
    ----------
    source
        Id of a known source or, with ``catalog``, of one of its collections.
    to
        Folder of the mirror; the source gets a folder below it.
    catalog
        Path or URL of a STAC catalogue or API; None for known sources.
    years, bbox
        Select items as in :func:`ai4land.sources.search.find_items`. For known files with URLs, ``bbox`` is ignored, and
        files without years are always fetched.
    assets
        Asset keys; by default those with the role ``data``, or all if none has it.
    modifier
        Signs an item before each of its assets is downloaded; the signed URL is not stored.
    token
        Bearer token, never stored; sent to the catalogue's origin (scheme, host and port) and to ``token_hosts``.
    token_hosts
        Further hosts (https) or origins such as ``http://127.0.0.1:8000``.
    beyond
        As in :func:`ai4land.sources.search.find_items`.
    threads
        Files to download at once.
    timeout, pause
        As in :func:`ai4land.sources.download.download`.
    progress
        Called with the number of finished files, the number of all files, and the name of the last one.

    Returns
    -------
    Fetched
        Returned even if files failed; call again to retry them.

    Raises
    ------
    ConfigError
        If the source is unknown, ``bbox`` is invalid, or the package that signs its items is not installed.
    DataError
        If the catalogue cannot be read, nothing is found, files to be added by hand are missing, the disk is too full,
        another process is filling the folder, or the folder does not belong to a mirror.
    """
    mirror = Path(to)
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    folder = inside(mirror, safe_name(source))
    check_ours(mirror, folder)
    years = None if years is None else sorted(set(years))
    options: dict[str, Any] = {"years": years, "bbox": bbox, "headers": headers, "modifier": modifier, "timeout": timeout}
    if catalog is None:
        plan = plan_known(load_source(source), folder=folder, **options)
    else:
        plan = plan_stac(source, catalog=str(catalog), collection=source, assets=assets, beyond=beyond, **options)
    _check_names(plan)
    allowed = {plan.origin, *(host if "://" in host else f"https://{host}" for host in token_hosts)}

    def bring(file: Wanted, path: Path) -> Stored:
        local = local_path(file.href)
        if local is not None:
            return copy(local, path, name=file.href, size=file.size, checksum=file.checksum)
        own = headers if origin(file.href) in allowed else {}
        options: dict[str, Any] = {"headers": own, "timeout": timeout, "pause": pause, "stop": stop}
        return download(file.address, path, name=plain_href(file.href), size=file.size, checksum=file.checksum, **options)

    stop = threading.Event()
    with locked(folder):
        result = _bring_all(plan, folder, bring, stop, threads, partial(_size_of, allowed=allowed, headers=headers), progress)
        write_collection(folder, {**plan.collection, "id": plan.source})
    write_catalog(mirror)
    return result


def fetch_all(
    sources: Sequence[str],
    *,
    to: Path,
    years: str | None = None,
    bbox: str | None = None,
    token: str | None = None,
    tell: Callable[[str], None] = _log.info,
    **options: Any,
) -> None:
    """Fetch several sources, one after the other, with options as given on the command line.

    Parameters
    ----------
    years, bbox
        As text: ``1992-1999``, and ``west,south,east,north`` in degrees.
    token
        Name of the environment variable that holds a bearer token.
    tell
        Called with one line per fetched source.
    **options
        Passed to :func:`fetch`.

    Raises
    ------
    ConfigError
        If an option is invalid or a source is unknown.
    DataError
        If a source or file failed; all others have been fetched.
    """
    try:
        wanted = None if years is None else [int(y) for y in expand_years(years.split(","))]
    except ValueError as error:
        raise ConfigError(f"--{error}; give for example --years 1992-1999") from error
    box = None if bbox is None else _box(bbox)
    secret = None if token is None else os.environ.get(token)
    if token is not None and not secret:
        raise ConfigError(f"environment variable {token} is not set, expected a bearer token; set it, or leave --token out")
    failed: list[str] = []
    if options.get("catalog") is None:
        credits_of(sources)
    for source in sources:
        try:
            done = fetch(source, to=to, years=wanted, bbox=box, token=secret, **options)
        except DataError as error:
            failed.append(f"{source}: {error}")
            continue
        tell(
            f"{source}: {done.kept + done.brought} files, {done.size / 1e6:.1f} MB in {done.folder}: "
            f"{done.kept} were there, {done.brought} brought, {len(done.failed)} failed"
        )
        failed += [f"{source}/{name}: {why}" for name, why in sorted(done.failed.items())]
    if failed:
        raise DataError(
            f"{len(failed)} of what was asked for failed; the rest is in {to}, and the same command goes on with these:\n  "
            + "\n  ".join(failed)
        )


def _box(text: str) -> Bounds:
    try:
        west, south, east, north = (float(v) for v in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--bbox is {text!r}, expected west,south,east,north in degrees; for example 8.9,47.2,13.9,50.6"
        ) from error
    return west, south, east, north


# -- fetching -----------------------------------------------------------------------------------------------------------


def _check_names(plan: Plan) -> None:
    names = Counter(f.name for t in plan.things for f in t.files.values())
    twice = sorted(n for n, count in names.items() if count > 1)
    if twice:
        raise DataError(f"files {twice[:5]} of {plan.source} would lie at the same place, expected one each; choose assets apart")


def _bring_all(
    plan: Plan,
    folder: Path,
    bring: Callable[[Wanted, Path], Stored],
    stop: threading.Event,
    threads: int,
    measure: Callable[[Wanted], int | None],
    progress: Progress | None,
) -> Fetched:
    manifest = read_manifest(folder)
    every = [f for thing in plan.things for f in thing.files.values()]
    stored: dict[str, Stored] = {}
    failed: dict[str, str] = {}
    counts, saved = Counter[str](), time.monotonic()

    def save() -> None:
        write_json(folder / "manifest.json", {"source": plan.source, "files": dict(sorted(manifest.items()))})

    pool = ThreadPoolExecutor(max_workers=max(threads, 1))
    try:
        absent = [f for f in every if not (folder / f.name).is_file()]
        _check_space(folder, absent, [s for s in pool.map(measure, absent) if s is not None])
        jobs = {pool.submit(_bring, file, folder, manifest.get(file.name), bring): file for file in every}
        for done, job in enumerate(as_completed(jobs), 1):
            file = jobs[job]
            try:
                stored[file.name], how = job.result()
                counts[how] += 1
                entry = {"href": _origin(file, folder), "size": stored[file.name].size, "sha256": stored[file.name].sha256}
                manifest[file.name] = entry
            except (DataError, ConfigError, OSError) as error:
                failed[file.name] = str(error)
                _log.info("%s", error)
            if time.monotonic() - saved > _SAVED_EVERY:
                save()
                saved = time.monotonic()
            if progress is not None:
                progress(done, len(every), file.name)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        save()
    for thing in plan.things:
        if all(f.name in stored for f in thing.files.values()):
            try:
                files = {key: (f.name, stored[f.name]) for key, f in thing.files.items()}
                write_item(folder, thing.item(folder), files, collection=plan.source)
            except DataError as error:
                failed |= {f.name: str(error) for f in thing.files.values()}
    return Fetched(plan.source, folder, counts["kept"], counts["brought"], failed, sum(s.size for s in stored.values()))


def _bring(
    file: Wanted, folder: Path, known: Mapping[str, Any] | None, bring: Callable[[Wanted, Path], Stored]
) -> tuple[Stored, str]:
    """Keep a complete file, or fetch it."""
    path = inside(folder, file.name)
    by_hand = local_path(file.href) == path
    if path.is_file():
        try:
            stored = verify(path, name=file.name, size=file.size, checksum=file.checksum)
            same = known is None or (known.get("sha256") == stored.sha256 and known.get("href") == _origin(file, folder))
            if same or by_hand:
                return stored, "kept"
        except DataError as error:
            if by_hand:
                raise
            _log.warning("%s; it is brought again", error)
    path.parent.mkdir(parents=True, exist_ok=True)
    return bring(file, path), "brought"


def _origin(file: Wanted, folder: Path) -> str:
    path = local_path(file.href)
    return "by hand" if path == folder / file.name else plain_href(file.href) if path is None else path.name


def _size_of(file: Wanted, *, allowed: set[str], headers: Mapping[str, str]) -> int | None:
    """Return a file's bytes from the catalogue, or else from its host; None if neither states them."""
    if file.size is not None:
        return file.size
    local = local_path(file.href)
    if local is not None:
        return local.stat().st_size if local.is_file() else None
    try:
        own = dict(headers) if origin(file.href) in allowed else {}
        answer = requests.head(file.address(), headers={**own, "Accept-Encoding": "identity"}, timeout=20, allow_redirects=True)
        length = answer.headers.get("Content-Length", "")
        return int(length) if answer.ok and length.isdigit() else None
    except (requests.RequestException, DataError):
        return None


def _check_space(folder: Path, absent: Sequence[Wanted], sizes: Sequence[int]) -> None:
    begun = sum(p.stat().st_size for f in absent if (p := folder / f"{f.name}.part").is_file())
    needed, free = sum(sizes) - begun, shutil.disk_usage(folder).free
    if needed > free - SPARE:
        raise DataError(
            f"disk of {folder} has {free / 1e9:.3g} GB free, expected {(needed + SPARE) / 1e9:.3g} GB for {len(absent)} files; "
            "make room, or ask for fewer years or a smaller box"
        )
