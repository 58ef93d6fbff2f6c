"""One analysis-ready store: maps, static layers and coarse states on one grid, with exact coordinates.

Sharded Zarr v3. Fine arrays are written shard by shard, on Dask if there are workers: no layer is ever whole in memory. Coarse
states stay coarse. A store is moved into place once finished, so one that exists is complete. Its attributes hold its
``identity``, by which a mismatch is refused, and the checksums of its contents (:mod:`ai4land.store.contents`).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from distributed import Client
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from ai4land.digests import combine_digests, digest_of
from ai4land.errors import DataError, MismatchError
from ai4land.grid import COARSE_DIMS, FINE_DIMS, Grid, Window, chunk_side, coarse_slices
from ai4land.legend import Legend
from ai4land.places import beside, sweep
from ai4land.rasters.gaps import fill_near
from ai4land.store.read import check_identity
from ai4land.store.shard import Layer, ShardTask, fill_rest, write_cover, write_static
from ai4land.workers.tasks import each

_log = logging.getLogger(__name__)
SCENARIO_YEARS = 16
"""Years of a lazy scenario in memory at once."""
_OVERHEAD = 1.5e9
"""Bytes of a worker besides the layers of its block: libraries, GDAL's cache, a strip of a source."""


def write_store(
    path: Path,
    *,
    grid: Grid,
    legend: Legend,
    mask: Callable[[Window], NDArray[np.bool_]],
    maps: Mapping[int, Callable[[Window], NDArray[np.uint8]]],
    coarse: xr.DataArray,
    layers: Sequence[Layer],
    identity: dict[str, Any],
    known: NDArray[np.bool_] | None = None,
    files: Mapping[str, Sequence[Any]] | None = None,
    client: Client | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write the analysis-ready store.

    Parameters
    ----------
    path
        Path of the store; workers must see it under the same name.
    mask
        Returns the mapped cells of a window.
    maps
        By observed year, ascending: a function that reads a window as class codes.
    coarse
        Scenario, ``(year, state, coarse_latitude, coarse_longitude)`` on ``grid.coarse``; may be lazy, and is read some years at a time.
    layers
        Static maps. Gaps inside the mask are filled from the nearest cell that has a value within a coarse cell's breadth,
        beyond it from the nearest coarse cell that has one (:mod:`ai4land.rasters.gaps`).
    identity
        What the store is made from: plain values.
    known
        Coarse cells that may be mapped; None: all.
    files
        Input files, as noted by :func:`ai4land.store.contents.note_files`.
    client
        Client of the workers; None: this process writes the shards in turn.
    progress
        Called with a line about each step.

    Raises
    ------
    DataError
        If no cell is mapped, a layer has no value in the mask, a map has no class there, or something else is at ``path``.
    MismatchError
        If a store with another identity, or other contents, is at ``path``. An equal one is kept.
    WorkerError
        If workers die so that a shard is never done.
    """
    tell = progress or _log.info
    if list(maps) != sorted(maps):
        raise DataError(f"maps come in the order {list(maps)}, expected ascending years; sort them")
    part = beside(path, "part")
    sweep(path)
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        _create(part, grid, legend, list(maps), coarse, layers)
        states = _write_states(part, coarse)
        tell(f"scenario: {coarse.sizes['year']} years of {coarse.sizes['state']} states")
        contents = {"coarse": states, **_write_cover(part, grid, legend, mask, maps, known, client, tell)}
        contents["static"] = _write_static(part, grid, layers, client, tell)
        zarr.open_group(part, mode="r+").attrs.update({"identity": identity, "contents": contents, "files": dict(files or {})})
        _move(part, path, identity, contents, tell)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _move(part: Path, path: Path, identity: dict[str, Any], contents: dict[str, Any], tell: Callable[[str], None]) -> None:
    """Move a finished store into place, or keep an equal one that another process has put there meanwhile."""
    try:
        part.replace(path)  # fails if a folder is there that is not empty
    except OSError as error:
        if not check_identity(path, identity):
            raise DataError(
                f"{path} cannot be made ({error}), expected no folder, or an analysis-ready store; delete what is there"
            ) from error
        attrs: Any = zarr.open_group(path, mode="r").attrs
        held = attrs.get("contents", {})
        differs = sorted(name for name, part_of in contents.items() if not _covers(held.get(name), part_of))
        if differs:
            raise MismatchError(
                f"store {path} was made meanwhile by another process, and its {', '.join(differs)} differ; "
                "let one run at a time use a run's folder, and delete the store if its inputs have changed"
            ) from error
        tell(f"store: {path} was made meanwhile by another process from the same inputs, and is kept")


def _covers(held: Any, wanted: Any) -> bool:
    """Return whether checksums agree; by year, whether all wanted ones are held."""
    return held == wanted or (isinstance(held, dict) and isinstance(wanted, dict) and wanted.items() <= held.items())


def block_memory(grid: Grid, layers: int) -> float:
    """Estimate a worker's bytes for one shard at a time: layers as read, stored and packed."""
    return _OVERHEAD + 3.0 * 4 * layers * (grid.shard + 2 * grid.factor) ** 2


def _create(part: Path, grid: Grid, legend: Legend, observed: list[int], coarse: xr.DataArray, layers: Sequence[Layer]) -> None:
    """Write coordinates, attributes and the scenario, and lay out the fine arrays."""
    group = zarr.create_group(part, zarr_format=3)
    side, shard = chunk_side(grid), grid.shard
    for name, values in grid.coords().items():
        _coordinate(group, name, name, values)
    _coordinate(group, "feature", "feature", np.array([layer.name for layer in layers]))
    _coordinate(group, "categorical", "feature", np.array([layer.categorical for layer in layers]))
    _coordinate(group, "year", "year", coarse["year"].values.astype(np.int64))
    _coordinate(group, "observed_year", "observed_year", np.array(observed, dtype=np.int64))
    _coordinate(group, "state", "state", coarse["state"].values.astype(str))
    group.create_array(
        "coarse",
        shape=coarse.shape,
        dtype="float32",
        chunks=(1, *coarse.shape[1:]),
        fill_value=np.nan,
        dimension_names=("year", "state", *COARSE_DIMS),
        compressors=ZstdCodec(level=3),
    )
    fine: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...], str, float]] = {
        "mask": ((), (), (), "uint8", 0),
        "static": ((len(layers),), (len(layers),), ("feature",), "float32", np.nan),
        "land_cover": ((len(observed),), (1,), ("observed_year",), "uint8", legend.fill.code),
    }
    for name, (lead, depth, dims, dtype, fill) in fine.items():
        group.create_array(
            name,
            shape=(*lead, *grid.shape),
            dtype=dtype,
            chunks=(*depth, side, side),
            shards=(*depth, shard, shard),
            fill_value=fill,
            dimension_names=(*dims, *FINE_DIMS),
            compressors=ZstdCodec(level=3),
        )
    group.attrs.update({"grid": grid.to_dict(), "legend": legend.model_dump(mode="json")})


def _write_states(part: Path, coarse: xr.DataArray) -> dict[str, str]:
    """Write the scenario, some years at a time; return the checksum of each year."""
    group: Any = zarr.open_group(part, mode="r+")
    digests: dict[str, str] = {}
    for start in range(0, coarse.sizes["year"], SCENARIO_YEARS):
        some = coarse.isel(year=slice(start, start + SCENARIO_YEARS)).compute(scheduler="synchronous")
        for step, year in enumerate(some["year"].values, start=start):
            values = some.sel(year=year).values.astype(np.float32, copy=False)
            group["coarse"][step] = values
            digests[str(int(year))] = digest_of(values)
    return digests


def _write_cover(
    part: Path,
    grid: Grid,
    legend: Legend,
    mask: Callable[[Window], NDArray[np.bool_]],
    maps: Mapping[int, Callable[[Window], NDArray[np.uint8]]],
    known: NDArray[np.bool_] | None,
    client: Client | None,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    task = partial(write_cover, store=str(part), mask=mask, maps=list(maps.values()), fill=legend.fill.code, factor=grid.factor)
    jobs = [ShardTask(w, None if known is None else known[coarse_slices(w, grid.factor)]) for w in grid.shards()]
    counts = np.zeros(1 + len(maps), dtype=np.int64)
    digests: dict[Window, list[str]] = {}
    for job, (made, found) in _shards("land cover", task, jobs, client, tell):
        counts += made
        digests[job.window] = found
    mapped, *classes = counts.tolist()
    if not mapped:
        raise DataError(
            f"no cell is mapped in {grid.bounds}, expected some: the reference map has no class there, or the scenario no value; "
            "look at the two, at grid.bbox and at scenario.mask"
        )
    for year, count in zip(maps, classes, strict=True):
        if not count:
            raise DataError(f"map of {year} has no class on any mapped cell, expected land; look at the file")
        tell(f"land cover: {year}, a class on {count / mapped:.2%} of the mapped cells")
    whole = [combine_digests({w: of_shard[i] for w, of_shard in digests.items()}) for i in range(1 + len(maps))]
    return {"mask": whole[0], "land_cover": {str(year): of_map for year, of_map in zip(maps, whole[1:], strict=True)}}


def _write_static(part: Path, grid: Grid, layers: Sequence[Layer], client: Client | None, tell: Callable[[str], None]) -> str:
    task = partial(write_static, store=str(part), grid=grid, layers=layers)
    every = [ShardTask(w) for w in grid.shards()]
    stand_in = np.full((len(layers), *grid.coarse.shape), np.nan, dtype=np.float32)
    mapped, gaps, far = 0, np.zeros(len(layers), dtype=int), np.zeros(len(layers), dtype=int)
    digests: dict[Window, str] = {}
    later: list[Window] = []
    for job, (cells, missing, left, values, found) in _shards("static layers", task, every, client, tell):
        w = job.window
        mapped, gaps, far = mapped + cells, gaps + missing, far + left
        digests[w] = found
        stand_in[:, *coarse_slices(w, grid.factor)] = values
        if left.any():
            later.append(w)
    for layer, values, missing, left in zip(layers, stand_in, gaps, far, strict=True):
        if not np.isfinite(values).any():
            raise DataError(
                f"static layer {layer.name} is all nodata on the mapped cells, expected values; look at its file, grid and longitudes"
            )
        values[:] = fill_near(values, mask=np.ones(values.shape, dtype=bool), wrap=grid.wraps)
        filled = f", {missing / mapped:.2%} of the cells filled from the nearest" if missing else ""
        farther = f", {left / mapped:.2%} from farther than a coarse cell" if left else ""
        tell(f"static layer: {layer.name}{filled}{farther}")
    jobs = [ShardTask(w, stand_in[:, *coarse_slices(w, grid.factor)]) for w in sorted(later)]
    for job, found in _shards("static layers, gaps", partial(fill_rest, store=str(part), factor=grid.factor), jobs, client, tell):
        digests[job.window] = found
    return combine_digests(digests)


def _shards(
    what: str, task: Callable[[ShardTask], Any], items: Sequence[ShardTask], client: Client | None, tell: Callable[[str], None]
) -> Iterator[tuple[ShardTask, Any]]:
    """Run a task for every shard, reporting each tenth of many."""
    step = max(len(items) // 10, 10)
    for count, outcome in enumerate(each(task, items, what=f"{what} of", client=client), start=1):
        if count % step == 0 and count < len(items):
            tell(f"{what}: {count} of {len(items)} shards")
        yield outcome


# -- the store as a whole ------------------------------------------------------------------------------------------------------


def _coordinate(group: zarr.Group, name: str, dim: str, values: NDArray[Any]) -> None:
    if values.dtype.kind == "U":
        group.attrs[f"{name}_names"] = [str(v) for v in values]
        values = np.arange(len(values))
    array = group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=values.shape, dimension_names=(dim,))
    array[...] = values
