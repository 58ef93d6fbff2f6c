"""From a model and a store to the annual cube, block by block on Dask.

A block is a shard over the years on one side of the reference year. Its task reads the static maps and the reference map
once, with a halo that covers the network's receptive radius (wrapped at the dateline; no data beyond the poles and the
region), walks the years outward (:mod:`ai4land.constrain.walk`), writes each shard of years, records it in the ledger and returns a
receipt. Blocks do not depend on each other: after a crash, run again; unfinished blocks are walked again and only what the
ledger lacks is written.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ai4land.constrain.totals import Method, Totals
from ai4land.constrain.walk import Published, walk
from ai4land.crosswalk import Crosswalk
from ai4land.cube import ledger
from ai4land.cube.cube import Block
from ai4land.cube.numbers import EMPTY, FRACTION_EMPTY, SCALE, quantise
from ai4land.cube.writer import Writer
from ai4land.errors import DataError
from ai4land.grid import Window
from ai4land.legend import Legend
from ai4land.model.forward import Precision, ready
from ai4land.reconstruct.predict import predict
from ai4land.store.read import Source, WindowData, read_window_data

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockSettings:
    """What all blocks of a reconstruction share: paths and plain values, so that a task is small to send.

    Attributes
    ----------
    store, cube, model
        Paths or URLs of the analysis-ready store, the cube and the model's folder.
    checksum
        Checksum of the model's weights.
    reference
        Year of the reference map; None without one.
    threads
        Threads of PyTorch in a task.
    crosswalk
        From the scenario's states to the classes.
    precision
        Of the network.
    method, keep, settle
        How the totals are imposed; see :mod:`ai4land.constrain.totals` and :mod:`ai4land.constrain.walk`.
    weights
        Whether the scenario's shares are of the area or of the number of cells.
    lock, protected
        Class codes whose cells keep the class of the reference map, and the static map that protects cells where it exceeds 0.5.
    token
        Of the claim on the cube (:mod:`ai4land.cube.claim`).
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


def reconstruct_block(block: Block, settings: BlockSettings) -> dict[str, Any]:
    """Predict and write one block, year by year outward from the reference map; the task of a worker.

    Returns
    -------
    dict
        A receipt: ``row`` and ``col`` of the shard, ``years``, and the number of mapped ``cells``.

    Raises
    ------
    DataError
        If the store lacks a year of the scenario.
    """
    torch.set_num_threads(settings.threads)
    forward, card = ready(settings.model, settings.checksum, settings.precision)
    source, w = Source(settings.store), block.window
    data = read_window_data(source, w, reference=settings.reference, stride=forward.stride, halo=forward.halo)
    receipt = {"row": w.row, "col": w.col, "years": list(block.years), "cells": int(data.mask.sum())}
    # Another task may have done some of this block before it or its worker failed.
    done = ledger.years_of(settings.cube, row=w.row, col=w.col)
    remaining = [year for year in block.years if year not in done]
    if not remaining:
        return receipt
    lacking = sorted(set(remaining) - set(source.years))
    if lacking:
        raise DataError(f"store {settings.store} lacks the scenario of {lacking}; align anew with these years")
    parts = sides(remaining, settings.reference)
    walks = parts
    if settings.reference is not None and settings.method != "none":
        walks = [years_between(source.years, settings.reference, side[-1]) for side in parts]
    totals = None if settings.method == "none" else totals_of(source, data, settings)
    locked = _locked(source, data, settings)
    predictions = _placed(
        predict(
            forward,
            source,
            data.part,
            spec=card.spec,
            reference=settings.reference,
            years=chain.from_iterable(walks),
            around=data.around,
        ),
        data.part,
        w,
    )
    writer = Writer(settings.cube, w, token=settings.token)
    for side, walked in zip(parts, walks, strict=True):
        steps = walk(
            islice(predictions, len(walked)),
            mapped=data.mask,
            factor=source.grid.factor,
            totals=totals,
            reference=data.reference,
            reference_year=settings.reference,
            locked=locked,
            keep=settings.keep,
            settle=settings.settle,
            areas=data.areas if settings.weights == "area" else None,
        )
        for year, made in steps:
            if year in side:
                writer.add(year, _stored(made, data.mask, source.legend), notes_on(made, w, source.grid.factor))
    return receipt


def sides(years: Iterable[int], reference: int | None) -> list[list[int]]:
    """Split years at the reference year; each side is in the order of walking away from it.

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
    """Place the probabilities of a part in its window; elsewhere all classes are equally likely."""
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


def totals_of(source: Source, data: WindowData, settings: BlockSettings) -> Totals:
    """Make the totals of a window of whole coarse cells."""
    f, w = source.grid.factor, data.window
    cells = Window(w.row // f, w.col // f, w.height // f, w.width // f)
    return Totals(
        lambda year: source.states_of(year, cells),
        names=source.states,
        crosswalk=settings.crosswalk,
        mapped=data.mask,
        factor=f,
        areas=data.areas if settings.weights == "area" else None,
        reference=data.reference,
        reference_year=data.reference_year,
        level=settings.method == "level",
    )


def _locked(source: Source, data: WindowData, settings: BlockSettings) -> NDArray[np.bool_] | None:
    """Cells that keep their class; None if no setting asks for any."""
    if data.reference is None or (not settings.lock and settings.protected is None):
        return None
    held = np.isin(data.reference, [source.legend.codes.tolist().index(c) for c in settings.lock])
    if settings.protected is not None:
        layer = source.static[(source.features.index(settings.protected), *data.window.slices)]
        held |= np.nan_to_num(np.asarray(layer)) > 0.5
    return held


def _stored(made: Published, mask: NDArray[np.bool_], legend: Legend) -> dict[str, NDArray[Any]]:
    """Encode one year as the cube stores it."""

    def share(values: NDArray[np.float32]) -> NDArray[np.uint8]:
        known = mask & np.isfinite(values)
        return np.where(known, np.rint(np.where(known, values, 0) * SCALE), EMPTY).astype(np.uint8)

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
    """Describe for the ledger how far a year is from its totals, and list the coarse cells whose locks contradict them."""
    k, row, col = np.nonzero(made.unmet)
    place = zip((row + window.row // factor).tolist(), (col + window.col // factor).tolist(), k.tolist(), strict=True)
    unmet = [[*p, int(v)] for p, v in zip(place, made.unmet[k, row, col], strict=True)]
    return {"residual": float(np.max(made.residual, initial=0.0)), "unmet": unmet}
