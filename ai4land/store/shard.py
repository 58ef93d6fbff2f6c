"""The tasks that write one shard of the analysis-ready store, in this process or on a worker.

First the mask and the land-cover maps, then the static layers, read with a margin to fill gaps near a value, finally the gaps
farther from a value. One task at a time writes a whole shard, so a task may be repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import rasterio
import zarr
from numpy.typing import NDArray

from ai4land.digests import digest_of
from ai4land.grid import Grid, Window, read_window
from ai4land.places import writing
from ai4land.rasters.gaps import fill_far, fill_near, stand_ins

_CACHE = 256
"""GDAL cache of a worker in MB; GDAL's default is a share of the machine's memory."""


@dataclass(frozen=True)
class Layer:
    """A static map: ``read(window)`` gives its cells on the fine grid, NaN where it has no value.

    ``read`` must be picklable if there are workers.
    """

    name: str
    categorical: bool
    read: Callable[[Window], NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class ShardTask:
    """A shard to be done, with what its task needs of the coarse grid; goes by the name of its window."""

    window: Window
    coarse: NDArray[Any] | None = None

    def __str__(self) -> str:
        return str(self.window)


def of_array(values: NDArray[Any]) -> Callable[[Window], NDArray[Any]]:
    """Make a function that reads windows of an array in memory."""
    return lambda window: values[window.slices]


def write_cover(
    job: ShardTask,
    *,
    store: str,
    mask: Callable[[Window], NDArray[np.bool_]],
    maps: Sequence[Callable[[Window], NDArray[np.uint8]]],
    fill: int,
    factor: int,
) -> tuple[list[int], list[str]]:
    """Write mask and maps; returns the mapped cells, and those of them that have a class, map by map, and the digests.

    Where the job says which coarse cells may be mapped, no cell of another one is.
    """
    group: Any = zarr.open_group(store, mode="r+")
    w = job.window
    with rasterio.Env(GDAL_CACHEMAX=_CACHE):
        inside = mask(w)
        if job.coarse is not None:
            inside = inside & np.kron(job.coarse, np.ones((factor, factor), dtype=bool))
        _put(group, "mask", w.slices, inside.astype(np.uint8))
        counts, digests = [int(inside.sum())], [digest_of(inside)]
        for index, read in enumerate(maps):
            codes = read(w)
            _put(group, "land_cover", (index, *w.slices), codes)
            counts.append(int(np.count_nonzero(codes[inside] != fill)))
            digests.append(digest_of(codes))
    return counts, digests


def write_static(
    job: ShardTask, *, store: str, grid: Grid, layers: Sequence[Layer]
) -> tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.float32], str]:
    """Write the layers, filling gaps near a value.

    Returns
    -------
    tuple
        The mapped cells; by layer the gaps, the remaining gaps and the stand-ins; the checksum of the written data.
    """
    group: Any = zarr.open_group(store, mode="r+")
    w = job.window
    inside = np.asarray(group["mask"][w.slices], dtype=bool)
    outer = _around(w, grid) if inside.any() else w
    top, left = w.row - outer.row, w.col - outer.col
    own = slice(top, top + w.height), slice(left, left + w.width)
    needs = np.zeros((outer.height, outer.width), dtype=bool)
    needs[own] = inside
    fields = np.empty((len(layers), w.height, w.width), dtype=np.float32)
    gaps, far = np.zeros((2, len(layers)), dtype=np.int64)
    values = np.empty((len(layers), w.height // grid.factor, w.width // grid.factor), dtype=np.float32)
    with rasterio.Env(GDAL_CACHEMAX=_CACHE):
        for k, layer in enumerate(layers):
            field = read_window(_Plane(layer, grid.shape), outer, fill=np.nan, wrap=grid.wraps)
            gaps[k] = np.count_nonzero(needs & ~np.isfinite(field))
            values[k] = stand_ins(field[own], mask=inside, factor=grid.factor)
            fields[k] = fill_near(field, mask=needs, reach=grid.factor)[own]
            far[k] = np.count_nonzero(inside & ~np.isfinite(fields[k]))
    _put(group, "static", (slice(None), *w.slices), fields)
    return int(inside.sum()), gaps, far, values, digest_of(fields)


def fill_rest(job: ShardTask, *, store: str, factor: int) -> str:
    """Fill the remaining gaps of a shard with the job's stand-ins (layer, coarse rows, columns); return the layers' checksum."""
    w, stand_in = job.window, np.asarray(job.coarse)
    group: Any = zarr.open_group(store, mode="r+")
    inside = np.asarray(group["mask"][w.slices], dtype=bool)
    fields = np.asarray(group["static"][:, *w.slices])
    for field, values in zip(fields, stand_in, strict=True):
        field[:] = fill_far(field, mask=inside, stand_in=values, factor=factor)
    _put(group, "static", (slice(None), *w.slices), fields)
    return digest_of(fields)


def _put(group: Any, name: str, key: tuple[Any, ...], values: NDArray[Any]) -> None:
    """Write a whole shard; turn a failed write into an error of this package."""
    with writing(group.store.root):
        group[name][key] = values


@dataclass(frozen=True)
class _Plane:
    """A layer as an array to slice."""

    layer: Layer
    shape: tuple[int, int]

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        rows, cols = key[-2:]
        return self.layer.read(Window(rows.start, cols.start, rows.stop - rows.start, cols.stop - cols.start)).astype(
            np.float32, copy=False
        )


def _around(w: Window, grid: Grid) -> Window:
    """Grow a window by a coarse cell on each side: across the dateline if the grid is a whole globe, else as far as the grid goes."""
    wide, (rows, cols) = w.pad(grid.factor), grid.shape
    top, left = max(wide.row, 0), wide.col if grid.wraps else max(wide.col, 0)
    right = wide.col + wide.width if grid.wraps else min(wide.col + wide.width, cols)
    return Window(top, left, min(wide.row + wide.height, rows) - top, right - left)
