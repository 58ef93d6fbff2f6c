"""From a model and a store to the annual cube, block by block on Dask.

A block is a shard over the years on one side of the reference year. Its task reads the static maps and the reference map
once, with a halo that covers the network's receptive radius (wrapped at the dateline; no data beyond the poles and the
region), walks the years outward (:mod:`ai4land.walk`), writes each shard of years and enters it into the ledger, and returns a receipt. Blocks do not depend on each other: a run that was killed is run again, walks the unfinished blocks anew and
writes what the ledger lacks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import dask.array as da
import numpy as np
import torch
from distributed import Client, Future
from numpy.typing import NDArray

from ai4land import ledger
from ai4land.crosswalk import Crosswalk
from ai4land.crowd import TRIES, outcomes
from ai4land.cube import Block, time_shards
from ai4land.errors import DataError, MismatchError, StoreError
from ai4land.forward import Precision, ready
from ai4land.grid import Window
from ai4land.legend import Legend
from ai4land.predict import Source, WindowData, predict, read_window_data
from ai4land.template import EMPTY, FRACTION_EMPTY, FRACTION_SCALE, SCALE, YEARS_A_SHARD
from ai4land.totals import Method, Totals
from ai4land.walk import Published, walk
from ai4land.writer import Writer

_log = logging.getLogger(__name__)

_GOLDEN = 0.6180339887498949
"""The golden ratio less 1."""


def quantise(probabilities: NDArray[np.float32], *, scale: int = FRACTION_SCALE) -> NDArray[np.uint16]:
    """Turn probabilities into whole numbers of 1/``scale`` that sum to exactly ``scale`` in every cell.

    The running sum over the classes plus an offset of the cell is rounded down and differenced, so that each class is off by
    less than one unit and a class of probability 0 stays 0. The offsets fill 0..1 evenly from cell to cell (multiples of the
    golden ratio), so that the errors of many cells cancel, also where a class has a small part of a unit everywhere.

    Parameters
    ----------
    probabilities
        ``(class, rows, columns)``, summing to 1.
    scale
        Units of 1.

    >>> quantise(np.full((3, 1, 2), 1 / 3, np.float32), scale=250)[:, 0].tolist()
    [[83, 83], [83, 84], [84, 83]]
    """
    rows, cols = probabilities.shape[1:]
    offset = (np.arange(rows * cols) * _GOLDEN % 1).reshape(rows, cols).astype(np.float32)
    units = np.float32(scale) / probabilities.sum(axis=0, dtype=np.float32)
    out = np.empty(probabilities.shape, dtype=np.uint16)
    running, before = np.zeros_like(units), np.zeros((rows, cols), dtype=np.uint16)
    for part, made in zip(probabilities[:-1], out[:-1], strict=True):
        running += part
        after = np.minimum(running * units + offset, scale).astype(np.uint16)
        np.subtract(after, before, out=made)
        before = after
    np.subtract(np.uint16(scale), before, out=out[-1])
    return out


@dataclass(frozen=True)
class Job:
    """What the tasks of a reconstruction share: paths and plain values, so that a task is small.

    ``method``, ``keep`` and ``settle`` say how the totals are imposed (:mod:`ai4land.totals`, :mod:`ai4land.walk`),
    ``weights`` whether they are of the area or of cells; ``token`` is that of the claim on the cube (:mod:`ai4land.claim`); cells of the class codes ``lock``, and those where the static map
    ``protected`` is above 0.5, keep the class of the reference map.
    """

    store: str
    cube: str
    model: str
    checksum: str
    reference: int | None
    threads: int
    crosswalk: Crosswalk
    precision: Precision = "float32"
    method: Method = "change"
    weights: Literal["area", "cells"] = "area"
    keep: float | None = None
    settle: int = 5
    lock: tuple[int, ...] = ()
    protected: str | None = None
    token: str | None = None


def reconstruct_block(block: Block, job: Job) -> dict[str, Any]:
    """Predict and write one block, year by year outward from the reference map; the task of a worker.

    Returns
    -------
    dict
        A receipt: row and column of the shard, years, and mapped cells.
    """
    torch.set_num_threads(job.threads)
    forward, card = ready(job.model, job.checksum, job.precision)
    source, w = Source(job.store), block.window
    data = read_window_data(source, w, reference=job.reference, stride=forward.stride, halo=forward.halo)
    receipt = {"row": w.row, "col": w.col, "years": list(block.years), "cells": int(data.mask.sum())}
    # Another task may have done some of this block before it or its worker failed.
    done = ledger.years_of(job.cube, row=w.row, col=w.col)
    remaining = [year for year in block.years if year not in done]
    if not remaining:
        return receipt
    lacking = sorted(set(remaining) - set(source.years))
    if lacking:
        raise DataError(f"store {job.store} lacks the scenario of {lacking}; align anew with these years")
    parts = sides(remaining, job.reference)
    walks = parts
    if job.reference is not None and job.method != "none":
        walks = [years_between(source.years, job.reference, side[-1]) for side in parts]
    totals = None if job.method == "none" else totals_of(source, data, job)
    locked = _locked(source, data, job)
    predictions = _placed(
        predict(
            forward,
            source,
            data.part,
            spec=card.spec,
            reference=job.reference,
            years=chain.from_iterable(walks),
            around=data.around,
        ),
        data.part,
        w,
    )
    writer = Writer(job.cube, w, token=job.token)
    for side, walked in zip(parts, walks, strict=True):
        steps = walk(
            islice(predictions, len(walked)),
            mapped=data.mask,
            factor=source.grid.factor,
            totals=totals,
            reference=data.reference,
            reference_year=job.reference,
            locked=locked,
            keep=job.keep,
            settle=job.settle,
            areas=data.areas if job.weights == "area" else None,
        )
        for year, made in steps:
            if year in side:
                writer.add(year, _stored(made, data.mask, source.legend), notes_on(made, w, source.grid.factor))
    return receipt


def sides(years: Iterable[int], reference: int | None) -> list[list[int]]:
    """Part years at the reference year, each side in the order of walking away from it.

    >>> sides(range(2000, 2006), 2003), sides([2004, 2005], 2003)
    ([[2003, 2004, 2005], [2002, 2001, 2000]], [[2004, 2005]])
    """
    every = sorted(years)
    if reference is None:
        return [every]
    return [side for side in ([y for y in every if y >= reference], [y for y in every if y < reference][::-1]) if side]


def _placed(
    predictions: Iterable[tuple[int, NDArray[np.float32]]], part: Window, window: Window
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Put the probabilities of a part into the whole window; elsewhere all classes are alike."""
    for year, p in predictions:
        if part == window:
            yield year, p
        else:
            whole = np.full((len(p), window.height, window.width), 1 / len(p), dtype=np.float32)
            whole[(slice(None), *part.inside(window))] = p
            yield year, whole


def years_between(years: Iterable[int], reference: int, last: int) -> list[int]:
    """List the years from the reference year to the last one, in the order of walking away from it.

    >>> years_between([2000, 2001, 2003, 2004], 2003, 2000)
    [2003, 2001, 2000]
    """
    low, high = min(reference, last), max(reference, last)
    return sorted((y for y in years if low <= y <= high), key=lambda y: abs(y - reference))


def totals_of(source: Source, data: WindowData, job: Job) -> Totals:
    """Make the totals of a window of whole coarse cells."""
    f, w = source.grid.factor, data.window
    cells = Window(w.row // f, w.col // f, w.height // f, w.width // f)
    return Totals(
        lambda year: source.states_of(year, cells),
        names=source.states,
        crosswalk=job.crosswalk,
        mapped=data.mask,
        factor=f,
        areas=data.areas if job.weights == "area" else None,
        reference=data.reference,
        reference_year=data.reference_year,
        level=job.method == "level",
    )


def _locked(source: Source, data: WindowData, job: Job) -> NDArray[np.bool_] | None:
    """Cells that keep their class; None if there are none."""
    if data.reference is None or (not job.lock and job.protected is None):
        return None
    held = np.isin(data.reference, [source.legend.codes.tolist().index(c) for c in job.lock])
    if job.protected is not None:
        layer = source.static[(source.features.index(job.protected), *data.window.slices)]
        held |= np.nan_to_num(np.asarray(layer)) > 0.5
    return held


def _stored(made: Published, mask: NDArray[np.bool_], legend: Legend) -> dict[str, NDArray[Any]]:
    """Numbers as the cube stores them, one year."""

    def share(values: NDArray[np.float32]) -> NDArray[np.uint8]:
        there = mask & np.isfinite(values)
        return np.where(there, np.rint(np.where(there, values, 0) * SCALE), EMPTY).astype(np.uint8)

    def codes(index: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.where(mask, legend.decode(index), legend.fill.code).astype(np.uint8)

    return {
        "land_cover": codes(made.land_cover),
        "most_likely": codes(made.most_likely),
        "fraction": np.where(mask, quantise(made.fractions), np.uint16(FRACTION_EMPTY)),
        "confidence": share(made.confidence),
        "change_probability": share(
            np.full(mask.shape, np.nan, np.float32) if made.change_probability is None else made.change_probability
        ),
    }


def notes_on(made: Published, window: Window, factor: int) -> dict[str, Any]:
    """Note for the ledger how far a year is from its totals, and every coarse cell where locks contradict them."""
    k, row, col = np.nonzero(made.unmet)
    place = zip((row + window.row // factor).tolist(), (col + window.col // factor).tolist(), k.tolist(), strict=True)
    unmet = [[*p, int(v)] for p, v in zip(place, made.unmet[k, row, col], strict=True)]
    return {"residual": float(np.max(made.residual, initial=0.0)), "unmet": unmet}


def plan_blocks(
    path: Path | str,
    *,
    years: Iterable[int],
    reference: int | None,
    done: Iterable[tuple[int, int, int]] = (),
    years_a_shard: int = YEARS_A_SHARD,
) -> list[Block]:
    """List the blocks to compute: shards with cells to map, on either side of the reference year, without what is done.

    A block has whole shards of years. Those that have years of both sides are done by the block that has fewer years to walk for them.

    Parameters
    ----------
    path
        Of the analysis-ready store.
    years
        To map: all of the cube.
    reference
        Year of the reference map; None without one.
    done
        Finished (row, column, year).
    years_a_shard
        Years in a shard of the cube.
    """
    source, finished = Source(path), set(done)
    blocks = []
    for groups in sides_of(years, reference=reference, years_a_shard=years_a_shard):
        for w in land_of(source):
            left = tuple(y for g in groups if any((w.row, w.col, y) not in finished for y in g) for y in g)
            if left:
                blocks.append(Block(w, left))
    return sorted(blocks, key=lambda b: -len(b.years))


def sides_of(years: Iterable[int], *, reference: int | None, years_a_shard: int) -> list[list[tuple[int, ...]]]:
    """Part the shards of years by the side of the reference year that most of their years are on: what is one block of a shard each.

    >>> sides_of(range(2000, 2006), reference=2003, years_a_shard=2)
    [[(2004, 2005)], [(2000, 2001), (2002, 2003)]]
    """
    groups = time_shards(years, years_a_shard=years_a_shard)
    ahead = [g for g in groups if reference is None or sum(1 if y >= reference else -1 for y in g) > 0]
    return [side for side in (ahead, [g for g in groups if g not in ahead]) if side]


def land_of(source: Source) -> list[Window]:
    """List the shards that have cells to map."""
    return [w for w in source.grid.shards() if np.asarray(source.mask[w.slices]).any()]


def _task(part: NDArray[np.object_], job: Job) -> NDArray[np.object_]:
    """Do the one block of a chunk of the plan; its receipt takes its place."""
    receipt = np.empty(1, dtype=object)
    try:
        receipt[0] = reconstruct_block(part[0], job)
    except (StoreError, MismatchError) as error:  # which no other try would mend: not raised, so that Dask makes none
        receipt[0] = error
    return receipt


def run_blocks(
    blocks: list[Block], job: Job, *, client: Client, progress: Callable[[dict[str, Any]], None] | None = None
) -> list[dict[str, Any]]:
    """Compute blocks on a Dask cluster by ``map_blocks`` over the plan; receipts are gathered as they come.

    A task gets its block and the job, some hundred bytes, and reads what it needs itself. A block that fails is tried three
    times, whether it raises or its worker dies.

    Raises
    ------
    DataError
        If blocks failed; the others are finished first, and a further run does only what is missing.
    StoreError, MismatchError
        If the cube cannot be written, or is another run's by now; the others are not begun.
    WorkerError
        If workers die so that no block is ever done.
    """
    if not blocks:
        return []
    # One chunk a block, so that a task carries its own block and not the whole plan.
    plan = np.empty(len(blocks), dtype=object)
    plan[:] = blocks
    receipts = da.map_blocks(_task, da.from_array(plan, chunks=1), dtype=object, meta=np.empty(0, dtype=object), job=job)
    futures = client.compute(list(receipts.to_delayed()), retries=TRIES - 1)

    def again(block: Block) -> Future[Any]:
        part = np.empty(1, dtype=object)
        part[0] = block
        return client.submit(_task, part, job, retries=TRIES - 1, priority=1, pure=False)

    done: list[dict[str, Any]] = []
    failed: list[str] = []
    for block, outcome in outcomes(dict(zip(futures, blocks, strict=True)), again, client=client):
        if isinstance(outcome, BaseException):
            failed.append(f"{block}: {outcome!r}")
            continue
        if isinstance(outcome[0], Exception):
            client.cancel(futures)
            raise outcome[0]
        done.append(outcome[0])
        if progress is not None:
            progress(outcome[0])
    if failed:
        raise DataError(
            f"{len(failed)} of {len(plan)} blocks failed, the rest is done; mend the cause and run again:\n  "
            + "\n  ".join(failed[:10])
        )
    return done
