"""From a model and a store to the annual cube, block by block on Dask.

A block is a shard over a window of years. Its task reads the static maps and the reference map once, with a halo that
covers the network's receptive radius (wrapped at the dateline; no data beyond the poles and the region), walks the
years, writes whole shards, enters them into the ledger, and returns a receipt. Blocks do not depend on each other: a run
that was killed is run again and does what the ledger lacks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import torch
import zarr
from distributed import Client, as_completed
from numpy.typing import NDArray

from ai4land import cube
from ai4land.checkpoint import cached_model
from ai4land.cube import EMPTY, SCALE, Block
from ai4land.errors import DataError
from ai4land.features import FeatureSpec, features
from ai4land.grid import Grid, Window, coarse_window, read_coarse, read_window
from ai4land.legend import MISSING, Legend
from ai4land.unet import UNet

_log = logging.getLogger(__name__)


class Source:
    """The arrays of an analysis-ready store that prediction reads, opened without Dask.

    Parameters
    ----------
    path
        Of the store.
    """

    def __init__(self, path: Path | str) -> None:
        group = zarr.open_group(path, mode="r")
        attrs: Any = group.attrs
        self.grid = Grid.from_dict(attrs["grid"])
        self.legend = Legend(**attrs["legend"])
        arrays: list[Any] = [group[n] for n in ("static", "mask", "coarse", "land_cover")]
        self.static, self.mask, self.coarse, self.land_cover = arrays
        self.years = [int(y) for y in np.asarray(group["year"][...])]  # type: ignore[index]
        self.observed = [int(y) for y in np.asarray(group["observed_year"][...])]  # type: ignore[index]

    def map_of(self, year: int, window: Window) -> NDArray[np.uint8]:
        """Class indices of an observed map, ``MISSING`` beyond the grid."""
        plane = _Plane(self.land_cover, self.observed.index(year))
        codes = read_window(plane, window, fill=self.legend.fill.code, wrap=self.grid.wraps)
        return self.legend.encode(codes, source=f"map of {year}")

    def states_of(self, year: int, cells: Window) -> NDArray[np.float32]:
        """Coarse states ``(state, rows, columns)``, the edge repeated beyond the grid."""
        return read_coarse(_Plane(self.coarse, self.years.index(year)), cells, wrap=self.grid.wraps)


@dataclass(frozen=True)
class _Plane:
    """One step of the first dimension of an array, read when it is cut."""

    array: Any
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape[1:])

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def __getitem__(self, key: Any) -> Any:
        return self.array[(self.index, *key)]


@torch.inference_mode()
def predict(
    model: UNet, source: Source, window: Window, *, spec: FeatureSpec, reference: int | None, years: Iterable[int]
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Predict the class probabilities of a window, year by year.

    The result does not depend on how the globe is cut into windows: the window is read with the halo of the network and
    its origin lies on the network's stride.

    Parameters
    ----------
    model
        In evaluation mode.
    source
        The store.
    window
        Fine cells; row, column, height and width must be multiples of the stride.
    spec
        Of the model.
    reference
        Year of the reference map; None to predict without one.
    years
        To predict, in any order.

    Yields
    ------
    year, probabilities
        Float32 ``(class, rows, columns)``.
    """
    if any(v % model.stride for v in (window.row, window.col, window.height, window.width)):
        raise ValueError(f"window {window} is off the network's stride of {model.stride} cells; use whole shards")
    halo = model.halo
    outer = window.pad(halo)
    grid = source.grid
    raw = read_window(source.static, outer, fill=np.nan, wrap=grid.wraps)
    static = spec.static_channels(raw)
    known = None if reference is None else source.map_of(reference, outer)
    cells, offset = coarse_window(outer, grid.factor)
    tensors = torch.from_numpy(static).float()[None], torch.tensor([offset], dtype=torch.int64)
    inner = (slice(halo, halo + window.height), slice(halo, halo + window.width))
    start = None if reference is None else source.states_of(reference, cells)
    for year in years:
        wanted = source.states_of(year, cells)
        lead = 0 if reference is None else year - reference
        made = features(static, reference=known, wanted=wanted, start=wanted if start is None else start, lead=lead, spec=spec)
        logits = model(tensors[0], torch.from_numpy(made.reference)[None], torch.from_numpy(made.coarse)[None], tensors[1])
        yield year, torch.softmax(logits[0][(slice(None), *inner)].float(), dim=0).numpy()


def quantise(probabilities: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Turn probabilities into whole numbers of 1/250 that sum to exactly 250 in every cell.

    Running sums are rounded and differenced, so that an error never adds up: each class is off by less than one unit,
    and a class of probability 0 stays 0.

    Parameters
    ----------
    probabilities
        ``(class, rows, columns)``, summing to 1.

    >>> quantise(np.array([[[0.3333]], [[0.3333]], [[0.3334]]], dtype=np.float32)).ravel().tolist()
    [83, 84, 83]
    """
    running = np.rint(np.cumsum(probabilities, axis=0, dtype=np.float32) * SCALE)
    running = np.minimum(running, SCALE)
    running[-1] = SCALE
    return np.diff(running, axis=0, prepend=0).astype(np.uint8)


@dataclass(frozen=True)
class Job:
    """What the tasks of a reconstruction share: paths and plain values, so that a task is small."""

    store: str
    cube: str
    model: str
    checksum: str
    reference: int
    threads: int


def reconstruct_block(block: Block, job: Job) -> dict[str, Any]:
    """Predict and write one block; the task of a worker.

    Returns
    -------
    dict
        A receipt: row and column of the shard, years, mapped cells and digest.
    """
    torch.set_num_threads(job.threads)
    model, card = cached_model(job.model, job.checksum)
    source = Source(job.store)
    legend, w = source.legend, block.window
    mask = np.asarray(source.mask[w.slices], dtype=bool)
    known = source.map_of(job.reference, w)
    shape = (len(block.years), w.height, w.width)
    land_cover = np.full(shape, legend.fill.code, dtype=np.uint8)
    confidence = np.full(shape, EMPTY, dtype=np.uint8)
    fraction = np.full((shape[0], legend.n, *shape[1:]), EMPTY, dtype=np.uint8)
    for year, probabilities in predict(model, source, w, spec=card.spec, reference=job.reference, years=block.years):
        i = block.years.index(year)
        if year == job.reference:
            observed = known != MISSING
            unit = np.arange(legend.n, dtype=np.uint8)[:, None, None] == known
            probabilities = np.where(observed, unit, probabilities).astype(np.float32)
        best = probabilities.argmax(axis=0).astype(np.uint8)
        land_cover[i] = np.where(mask, legend.decode(best), legend.fill.code)
        confidence[i] = np.where(mask, np.rint(probabilities.max(axis=0) * SCALE), EMPTY)
        fraction[i] = np.where(mask, quantise(probabilities), EMPTY)
    path = Path(job.cube)
    digest = cube.write_block(path, block, land_cover=land_cover, fraction=fraction, confidence=confidence)
    cube.record(path, block, digest)
    return {"row": w.row, "col": w.col, "years": list(block.years), "cells": int(mask.sum()), "digest": digest}


def plan_blocks(path: Path | str, *, years: Iterable[int], window: int, done: Iterable[tuple[int, int, int]] = ()) -> list[Block]:
    """List the blocks to compute: shards with cells to map, over windows of years, without what is done.

    Parameters
    ----------
    path
        Of the analysis-ready store.
    years
        To map.
    window
        Years of a block at most.
    done
        Finished (row, column, year).
    """
    source = Source(path)
    land = [w for w in source.grid.shards() if np.asarray(source.mask[w.slices]).any()]
    finished, every = set(done), list(years)
    blocks = []
    for start in range(0, len(every), window):
        part = every[start : start + window]
        for w in land:
            left = tuple(y for y in part if (w.row, w.col, y) not in finished)
            if left:
                blocks.append(Block(w, left))
    return blocks


def _task(part: NDArray[np.object_], job: Job) -> NDArray[np.object_]:
    """Do the one block of a chunk of the plan; its receipt takes its place."""
    receipt = np.empty(1, dtype=object)
    receipt[0] = reconstruct_block(part[0], job)
    return receipt


def run_blocks(
    blocks: list[Block], job: Job, *, client: Client, progress: Callable[[dict[str, Any]], None] | None = None
) -> list[dict[str, Any]]:
    """Compute blocks on a Dask cluster by ``map_blocks`` over the plan; receipts are gathered as they come.

    A task gets its block and the job, some hundred bytes, and reads what it needs itself.

    Raises
    ------
    DataError
        If blocks failed; the others are finished first, and a further run does only what is missing.
    """
    if not blocks:
        return []
    # One chunk a block, so that a task carries its own block and not the whole plan.
    plan = np.empty(len(blocks), dtype=object)
    plan[:] = blocks
    receipts = da.map_blocks(_task, da.from_array(plan, chunks=1), dtype=object, meta=np.empty(0, dtype=object), job=job)
    futures = client.compute(list(receipts.to_delayed()), retries=2)
    place = {f.key: b for f, b in zip(futures, plan, strict=True)}
    done: list[dict[str, Any]] = []
    failed: list[str] = []
    for future in as_completed(futures):
        if future.status == "finished":
            receipt = future.result()[0]
            done.append(receipt)
            if progress is not None:
                progress(receipt)
        else:
            block = place[future.key]
            failed.append(f"{block.window} of {block.years[0]}-{block.years[-1]}: {future.exception()!r}")
        future.release()
    if failed:
        raise DataError(
            f"{len(failed)} of {len(plan)} blocks failed, the rest is done; mend the cause and run again:\n  "
            + "\n  ".join(failed[:10])
        )
    return done
