"""Read and write folders and object stores through the same few operations.

Folders use zarr's ``LocalStore``; ``s3://``, ``gs://``, ``az://`` and ``http(s)://`` use obstore, with timeouts and retries;
other URLs, such as ``memory://``, use fsspec. Writes are atomic: a file is written under another name, synced and renamed;
object stores do this themselves.
"""

from __future__ import annotations

import datetime as dt
import errno
import fcntl
import glob
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

import psutil

from ai4land.errors import ConfigError, StoreError

if TYPE_CHECKING:  # zarr is imported lazily: modules without zarr also use locks and files
    from zarr.abc.store import Store

Place = str | Path
"""A folder (path or ``file://`` URL), or the URL of a folder in an object store."""

_OBSTORE = ("s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss", "http", "https")


class Unlockable(StoreError):
    """The file system has no locks, such as Lustre mounted without ``flock``."""


_REQUEST = dt.timedelta(seconds=15)  # timeout of one request before it is retried
_GIVE_UP = dt.timedelta(seconds=180)  # timeout of a request with all its retries


def shipped(name: str) -> Path:
    """Find a shipped folder, such as ``pipelines``: in the installed package, or at the top of the repository."""
    package = Path(str(files("ai4land")))
    return package / name if (package / name).is_dir() else package.parent / name


def folder_of(place: Place) -> Path | None:
    """Return the path of a place on the local file system; None for any other URL.

    >>> folder_of("file:///data/cube.zarr"), folder_of("s3://bucket/cube.zarr")
    (PosixPath('/data/cube.zarr'), None)
    """
    if isinstance(place, Path) or "://" not in place:
        return Path(place)
    return Path(unquote(urlparse(place).path)) if place.startswith("file://") else None


def inside(place: Place, name: str) -> Place:
    """Join a name to a place.

    >>> inside("s3://bucket/runs/", "a/cube.zarr"), inside(Path("runs"), "a")
    ('s3://bucket/runs/a/cube.zarr', PosixPath('runs/a'))
    """
    folder = folder_of(place)
    return f"{str(place).rstrip('/')}/{name}" if folder is None else folder / name


def open_place(place: Place, *, read_only: bool = False, give_up: dt.timedelta = _GIVE_UP) -> Store:
    """Open a place as a Zarr store; ``give_up`` limits the time of one request with all its retries.

    Credentials, region and endpoint come from the environment (``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, …).

    Raises
    ------
    ConfigError
        If the kind of URL is unknown or its library is not installed.
    """
    from zarr.storage import LocalStore

    folder = folder_of(place)
    if folder is not None:
        return LocalStore(folder, read_only=read_only)
    return _remote(str(place), read_only, give_up)


@lru_cache(maxsize=64)
def _remote(url: str, read_only: bool, give_up: dt.timedelta) -> Store:
    from zarr.storage import FsspecStore, ObjectStore

    scheme = url.split("://")[0]
    try:
        if scheme in _OBSTORE:
            from obstore.store import from_url

            plain = url.startswith("http://") or os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
            options: dict[str, Any] = {
                "client_options": {"timeout": _REQUEST, "connect_timeout": dt.timedelta(seconds=5), "allow_http": plain},
                "retry_config": {
                    "max_retries": 60,
                    "retry_timeout": give_up,
                    "backoff": {
                        "init_backoff": dt.timedelta(milliseconds=100),
                        "max_backoff": dt.timedelta(seconds=3),
                        "base": 2,
                    },
                },
            }
            if scheme in ("s3", "s3a"):
                options["config"] = {"virtual_hosted_style_request": False}
            return ObjectStore(from_url(url, **options), read_only=read_only)
        return FsspecStore.from_url(url, read_only=read_only)
    except ImportError as error:
        raise ConfigError(
            f'{url} needs {error.name}, which is not installed; install it with: pip install "ai4land[s3]"'
        ) from error
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"{url} cannot be opened ({error}), expected a folder or a URL such as s3://bucket/folder") from error


def read(place: Place, name: str) -> bytes | None:
    """Read an object; None if it does not exist."""
    folder = folder_of(place)
    if folder is not None:
        try:
            return (folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync

    got = sync(open_place(place, read_only=True).get(name, default_buffer_prototype()))
    return None if got is None else got.to_bytes()


def write(place: Place, name: str, data: bytes) -> None:
    """Write an object atomically and durably, replacing any existing one.

    Raises
    ------
    StoreError
        If the write fails; the previous content remains.
    """
    folder = folder_of(place)
    with writing(place):
        if folder is not None:
            write_atomically(folder / name, data)
            return
        from zarr.core.buffer import cpu
        from zarr.core.sync import sync

        sync(open_place(place).set(name, cpu.Buffer.from_bytes(data)))


def write_atomically(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write a file so that readers see the old or the new content, never a mixture, even after a system crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _to_disk(path.parent)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def lock(path: Path, *, wait: bool = False) -> IO[str]:
    """Lock a file until it is closed or this process ends; create it and its folder if necessary.

    Its content is kept. Symbolic links are refused.

    Raises
    ------
    BlockingIOError
        If another process, or another open file of this one, holds the lock and ``wait`` is False.
    Unlockable
        If the file system has no locks.
    StoreError
        If the file cannot be opened for writing.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.fdopen(os.open(path, flags, 0o666), "r+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        file.close()
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise Unlockable(
                f"{path} cannot be locked: its file system has no locks ({error.strerror}); use a folder of another one"
            ) from error
        raise
    return file


def beside(path: Path, kind: str) -> Path:
    """Name a temporary folder of this process next to a path: for a result under construction, or an old one set aside.

    >>> beside(Path("runs/store.zarr"), "part").name.startswith(".store.zarr.")
    True
    """
    return path.with_name(f"{_mark(path)}{os.getpid()}.{kind}")


def sweep(path: Path) -> None:
    """Remove the temporary folders next to a path made by this process or by dead processes of this machine."""
    mark = _mark(path)
    for left in path.parent.glob(f"{glob.escape(mark)}*"):
        pid = left.name.removeprefix(mark).partition(".")[0]
        if pid.isdecimal() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            shutil.rmtree(left, ignore_errors=True)


def _mark(path: Path) -> str:
    return f".{path.name}.{socket.gethostname()}."


def _to_disk(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete(place: Place, name: str) -> None:
    """Delete an object if it exists."""
    folder = folder_of(place)
    with writing(place):
        if folder is not None:
            (folder / name).unlink(missing_ok=True)
            return
        from zarr.core.sync import sync

        sync(open_place(place).delete(name))


def names(place: Place, prefix: str = "") -> list[str]:
    """List the objects whose names begin with a prefix, sorted, without unfinished files."""
    folder = folder_of(place)
    inner, slash, start = prefix.rpartition("/")
    if folder is not None:
        tops = (folder / inner).glob(f"{glob.escape(start)}*")
        found = (
            p for top in tops for p in ([top] if top.is_file() else top.rglob("*")) if p.is_file() and p.suffix != ".partial"
        )
        return sorted(p.relative_to(folder).as_posix() for p in found)

    from zarr.core.sync import sync

    async def listed(store: Store) -> list[str]:  # object stores list whole path segments, not character prefixes
        return [key async for key in store.list_prefix(inner + slash) if key.startswith(prefix)]

    store = open_place(place, read_only=True)
    return sorted(sync(listed(store)))


@contextmanager
def writing(place: Place) -> Iterator[None]:
    """Turn an error of the file system or object store into a :class:`StoreError` that names the place and the remedy."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        if not (
            isinstance(error, OSError) or type(error).__module__.split(".")[0] in ("obstore", "botocore", "aiohttp", "fsspec")
        ):
            raise
        said = " ".join(str(error).split())
        raise StoreError(
            f"{place} cannot be written: {said[:300] or type(error).__name__}; mend it (free space, permissions, the store's address and keys) and run "
            "again: what is done stays done"
        ) from error
