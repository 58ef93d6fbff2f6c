"""Keep an Icechunk repository of a cube: one commit per year, without copying a shard.

The repository holds the cube's metadata and a reference to the file or object of every shard (a virtual chunk). The time
axis of a snapshot ends with its year. The shards stay where they are: a cube that is moved needs a new repository.

A reference carries the modification time of its file, or the ETag of its object. Reading a shard that was remade since
raises an error instead of returning other cells; the next commit refers to the current shards. An object remade with the
same bytes keeps its ETag and stays readable in all commits.
"""

from __future__ import annotations

import datetime as dt
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlparse

import xarray as xr
from zarr.core.buffer import cpu
from zarr.core.sync import sync

from ai4land.cube import ledger
from ai4land.cube.cube import encode, public_documents, template_of, whole_years
from ai4land.digests import digest
from ai4land.errors import ConfigError, DataError, MismatchError
from ai4land.places import Place, folder_of, names, open_place

if TYPE_CHECKING:
    import icechunk

_BRANCH = "main"


def repository_path(place: Place) -> Place:
    """Locate the repository of a cube, next to it.

    >>> repository_path("s3://bucket/cube.zarr"), repository_path("s3://bucket/cube.zarr/ssp126")
    ('s3://bucket/cube.icechunk', 's3://bucket/cube.icechunk/ssp126')
    """
    beside = ledger.ledger_path(place)
    text = ".icechunk".join(str(beside).rsplit(".ledger", 1))
    return type(beside)(text)


def commit(place: Place, *, to: Place | None = None, progress: Callable[[int, int, str], None] | None = None) -> list[int]:
    """Commit the complete years of a cube that its repository lacks, one commit per year; one process at a time.

    Parameters
    ----------
    place
        Folder or ``s3://`` URL of a cube, or of a part of one, with its ledger next to it.
    to
        Folder or ``s3://`` URL of the repository, created if missing. Default: next to the cube.
    progress
        Called after each commit with the number of committed years, their final number and the year.

    Returns
    -------
    list of int
        Newly committed years. Remade shards of earlier years get one commit more.

    Raises
    ------
    DataError
        If the cube has no ledger, or a shard does not match it.
    MismatchError
        If the repository belongs to another cube.
    ConfigError
        If Icechunk is not installed, or the kind of URL is not supported.
    """
    template = template_of(place)
    years = whole_years(place)
    about = digest(template["documents"][""]["attributes"]["ai4land_identity"])
    repository = _repository(repository_path(place) if to is None else to, cube=place)
    last = next(iter(repository.ancestry(branch=_BRANCH)))
    made = dict(last.metadata)
    if "cube" in made and (made["cube"], made["at"]) != (about, _prefix(place)):
        raise MismatchError(
            f"repository {to or repository_path(place)} is of {made['at']}, and not of {_prefix(place)} as it is now; "
            "give another place (--to), or delete the repository: it holds no shard"
        )
    entries = ledger.entries(place)
    files = dict(template["objects"])
    for entry in entries:
        files.update(entry["files"])
    refs: dict[int, dict[str, str]] = {}
    for name, sum_ in files.items():
        if sum_ is not None:
            refs.setdefault(_begins(name, template["documents"]), {})[name] = sum_
    held = int(made.get("years", 0))
    remade = held > 0 and made.get("records") != _records(entries, years[:held])
    new = years[held:]
    objects = _objects(place) if new or remade else {}

    def save(count: int, parts: list[int], before: dict[str, Any]) -> None:
        session = repository.writable_session(_BRANCH)
        for name, document in public_documents(template, count).items():
            document.pop("consolidated_metadata", None)  # Icechunk keeps a snapshot's metadata in one object
            if before.get(name) != document:
                sync(session.store.set(f"{name}/zarr.json".lstrip("/"), cpu.Buffer.from_bytes(encode(document))))
        for part in parts:
            _refer(session, place, refs.get(part, {}), objects)
        about_it = {"cube": about, "at": _prefix(place), "years": count, "records": _records(entries, years[:count])}
        session.commit(str(years[count - 1]), metadata=about_it)

    if remade:
        save(held, [part for part in refs if part < held], {})
    for count, year in enumerate(new, start=held + 1):
        save(count, [count - 1], public_documents(template, count - 1) if count > 1 else {})
        if progress is not None:
            progress(count, len(years), str(year))
    return new


def _records(entries: list[dict[str, Any]], years: list[int]) -> str:
    """Fingerprint of the ledger entries of some years; it changes when one of their shards is remade."""
    return digest([[e["row"], e["col"], e["at"]] for e in entries if not set(years).isdisjoint(e["years"])])


def open_version(to: Place, *, year: int | None = None) -> xr.Dataset:
    """Open a repository at its last commit, or at the commit of a year.

    Raises
    ------
    DataError
        If there is no such commit.
    """
    repository = _repository(to, cube=None)
    found = next(
        (s for s in repository.ancestry(branch=_BRANCH) if "cube" in s.metadata and year in (None, int(s.message))), None
    )
    if found is None:
        raise DataError(
            f"repository {to} has no commit{'' if year is None else f' of {year}'}; make it with: ai4land commit CUBE"
        )
    store = repository.readonly_session(snapshot_id=found.id).store
    times = xr.coders.CFDatetimeCoder(time_unit="s")
    return xr.open_zarr(store, chunks=None, decode_coords="all", decode_times=times, consolidated=False, zarr_format=3)


def _chunk(name: str) -> tuple[str, list[int]]:
    """Split the name of an object into its array and chunk index.

    >>> _chunk("overviews/1/land_cover/c/0/2/3"), _chunk("spatial_ref/c")
    (('overviews/1/land_cover', [0, 2, 3]), ('spatial_ref', []))
    """
    array, _, index = f"{name}/".partition("/c/")
    return array, [int(i) for i in index.split("/") if i]


def _begins(name: str, documents: dict[str, Any]) -> int:
    """Position of the first year that an object holds; 0 if it has no time axis."""
    array, index = _chunk(name)
    dims = documents[array].get("dimension_names") or []
    depths = documents[array]["chunk_grid"]["configuration"]["chunk_shape"]
    return int(index[dims.index("time")] * depths[dims.index("time")]) if "time" in dims else 0


def _objects(place: Place) -> dict[str, tuple[int, dict[str, Any]]]:
    """Return the size of every object of a cube and the stamp by which Icechunk notices a change, by name."""
    folder = folder_of(place)
    if folder is None:
        store: Any = open_place(place, read_only=True)
        return {m["path"]: (m["size"], {"etag_checksum": m["e_tag"]}) for batch in store.store.list() for m in batch}
    found = {}
    for name in names(place):
        about = (folder / name).stat()
        changed = dt.datetime.fromtimestamp(math.ceil(about.st_mtime), dt.UTC)  # Icechunk keeps whole seconds
        found[name] = (about.st_size, {"last_updated_at_checksum": changed})
    return found


def _refer(
    session: icechunk.Session, place: Place, files: dict[str, str], objects: dict[str, tuple[int, dict[str, Any]]]
) -> None:
    """Reference chunks in their files or objects; DataError if one is missing or its size differs from the ledger."""
    import icechunk

    specs: dict[str, list[icechunk.VirtualChunkSpec]] = {}
    for name, sum_ in files.items():
        array, index = _chunk(name)
        size, (found, change) = int(sum_.split(":")[0]), objects.get(name, (None, {}))
        if found != size:
            raise DataError(
                f"{name} of {place} {'is missing' if found is None else f'has {found} bytes'}, expected {size} as in the ledger; "
                f"mend the cube with: ai4land verify {place}"
            )
        specs.setdefault(f"/{array}", []).append(icechunk.VirtualChunkSpec(index, _prefix(place) + name, 0, size, **change))
    for array, chunks in specs.items():
        session.store.set_virtual_refs(array, chunks, validate_containers=True)


def _prefix(place: Place) -> str:
    """URL of the cube's objects; ConfigError if Icechunk would find no chunk there and silently return fill values."""
    folder = folder_of(place)
    prefix = f"{str(place).rstrip('/')}/" if folder is None else f"file://{folder.resolve()}/"
    if quote(prefix, safe=":/") != prefix:
        raise ConfigError(
            f"{prefix} has characters that Icechunk cannot find a chunk by, expected letters, digits and ._~- alone; move the cube"
        )
    return prefix


def _repository(to: Place, *, cube: Place | None) -> icechunk.Repository:
    """Open a repository; create it for ``cube`` if it does not exist."""
    try:
        import icechunk
    except ImportError as error:
        raise ConfigError(
            'commits need icechunk, which is not installed; install it with: pip install "ai4land[icechunk]"'
        ) from error
    icechunk.set_logs_filter("error")  # it warns that concurrent commits to a folder are unsafe
    for place in (to, cube):
        if place is not None and folder_of(place) is None and not str(place).startswith("s3://"):
            raise ConfigError(f"{place} is at a URL that Icechunk is not used with here, expected a folder or s3://; choose one")
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    way: dict[str, Any] = {
        "region": os.environ.get("AWS_REGION"),
        "endpoint_url": endpoint,
        "allow_http": bool(endpoint and endpoint.startswith("http://")),
        "force_path_style": True,
    }
    folder = folder_of(to)
    if cube is None and folder is not None and not folder.is_dir():
        raise _none(to)
    prefix = None if cube is None else _prefix(cube)
    if folder is None:
        url = urlparse(str(to))
        storage = icechunk.s3_storage(bucket=url.netloc, prefix=url.path.strip("/"), from_env=True, **way)
    else:
        storage = icechunk.local_filesystem_storage(str(folder))
    if icechunk.Repository.exists(storage):
        kept = icechunk.Repository.fetch_config(storage)
        containers = list(kept.virtual_chunk_containers or {}) if kept is not None else []
        return icechunk.Repository.open(storage, authorize_virtual_chunk_access=_access(containers))
    if cube is None or prefix is None:
        raise _none(to)
    shards = folder_of(cube)
    store = icechunk.s3_store(**way) if shards is None else icechunk.local_filesystem_store(str(shards.resolve()))
    config = icechunk.RepositoryConfig.default()
    config.set_virtual_chunk_container(icechunk.VirtualChunkContainer(prefix, store))
    made = icechunk.Repository.create(storage, config=config, authorize_virtual_chunk_access=_access([prefix]))
    made.save_config()
    return made


def _none(to: Place) -> DataError:
    return DataError(f"no repository at {to}; make one with: ai4land commit CUBE")


def _access(prefixes: list[str]) -> Any:
    """Return the credentials for the shards of a cube: from the environment for an object store, None for a folder."""
    import icechunk

    given = {p: icechunk.s3_from_env_credentials() if p.startswith("s3://") else None for p in prefixes}
    return icechunk.containers_credentials(given)
