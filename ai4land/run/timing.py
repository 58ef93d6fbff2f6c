"""Rates of this machine: the functions of a run, timed for about a minute.

They use the store and the model of the run if these exist, else an all-land practice store in the run's shapes and untrained
networks about as confident as trained ones. Output goes to a temporary folder.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from dask.system import CPU_COUNT
from numpy.typing import NDArray
from scipy.optimize import nnls

from ai4land.crosswalk import load_crosswalk
from ai4land.cube import cube
from ai4land.cube.cube import Block
from ai4land.grid import Grid, Window
from ai4land.legend import Legend
from ai4land.model.checkpoint import load_card
from ai4land.model.features import FeatureSpec
from ai4land.model.forward import Precision, bfloat16_pays, ready
from ai4land.reconstruct.block import BlockSettings, reconstruct_block, years_between
from ai4land.reconstruct.plan import plan_blocks
from ai4land.reconstruct.predict import predict
from ai4land.run.config import RunConfig
from ai4land.run.cost import Rates
from ai4land.run.inputs import Inputs
from ai4land.run.practice import practice_grid, practice_network, save_practice_model, write_practice_store
from ai4land.run.reconstruct import job_of, method_of
from ai4land.store.read import Source, open_store, read_window_data
from ai4land.train.batch import PatchLoader
from ai4land.train.loop import Schedule, fit
from ai4land.train.normalise import fit_spec
from ai4land.train.splits import TRAIN

_SIDE = 720
"""Maximum side of a practice store in fine cells."""
_YEARS = tuple(range(2000, 2006))
_STEPS = 6
_BLOCKS = 6
"""Maximum number of timed blocks, from little land to much."""
_LONG, _ENOUGH = 6.0, 40.0
"""Seconds that the years of a block are timed for, about (far from the reference map more is in question), and after which no further block
is begun but the second."""
_CROWD = 1.08
"""What workers beside one another on all cores take longer than one (`two_worker_speedup` of the benchmark)."""


@dataclass(frozen=True)
class _Ground:
    """The data to time on: a store, cells and pairs to train on, and a block of some years."""

    store: Path
    grid: Grid
    legend: Legend
    spec: FeatureSpec
    cells: NDArray[np.bool_]
    pairs: tuple[tuple[int, int], ...]
    blocks: tuple[Block, ...]
    reference: int | None


def calibrate(run: RunConfig, *, tell: Callable[[str], None] = lambda _: None) -> Rates:
    """Time training steps and a block of reconstruction with the settings of a run.

    Reconstruction is timed in the precision that it will have if the model bears bfloat16. A busy machine gives the rates of a
    busy machine.
    """
    r = run.reconstruct
    threads = r.cores
    half = bfloat16_pays(torch.device("cpu")) if r.precision == "auto" else r.precision == "bfloat16"
    precision: Precision = "bfloat16" if half else "float32"
    with tempfile.TemporaryDirectory(prefix="ai4land-calibrate-") as name:
        folder = Path(name)
        there = (run.folder / "store.zarr" / "zarr.json").is_file()
        ground = _own(run) if there else _practice(run, folder)
        make = partial(practice_network, ground.spec, ground.grid, **run.model.model_dump())
        trained = there and (run.folder / "model.json").is_file()
        step, scored = _training(run, ground, make, folder)
        tell(f"calibrating: {step:.3g} s a step, {scored:.3g} s a scored batch")
        if trained:
            model, checksum = run.folder, load_card(run.folder).weights
        else:
            members = [make(seed=i) for i in range(run.train.members)]
            model, checksum = (
                folder,
                save_practice_model(folder, members, grid=ground.grid, legend=ground.legend, spec=ground.spec),
            )
        job = replace(_job(run, ground, folder, there), model=str(model), checksum=checksum, threads=threads, precision=precision)
        busy = threads * r.workers >= CPU_COUNT
        found: list[_Found] = []
        began = time.perf_counter()
        for block in ground.blocks:
            if len(found) < 2 or time.perf_counter() - began < _ENOUGH:
                found.append(_block(ground, block, job, busy=busy))
        forward, read = median(f.network for f in found), median(f.read for f in found)
        crowd = _CROWD if busy and r.workers > 1 else 1.0
        host, shard = _line([f.mapped for f in found], [f.host for f in found])
        cell = sum(f.bytes for f in found) / sum(f.mapped for f in found)
        tell(f"calibrating: a million cells and years take {1e6 * forward:.3g} s in the networks and {1e6 * host:.3g} s besides")
        return Rates(
            step=step,
            scored=scored,
            forward=crowd * forward / run.train.members,
            host=crowd * host,
            shard=crowd * shard,
            read=crowd * read / len(run.static),
            hands=max(1, min(r.hands, CPU_COUNT // (r.workers * threads))),
            turns=False,
            cell=cell,
            about=f"measured here: {'the store of the run' if there else 'a practice store'}, {'its' if trained else 'a practice'} model, "
            f"{precision}, threads: {threads}",
        )


def _own(run: RunConfig) -> _Ground:
    """Take the store of the run and some blocks of its cube, from little land to much, of both sides of the reference map."""
    inputs, store, r = Inputs.of(run), run.folder / "store.zarr", run.reconstruct
    grid, legend, split, source = inputs.grid, inputs.legend, inputs.split, Source(store)
    cells = split.roles == TRAIN
    codes, waves = legend.codes.tolist(), run.train.position
    spec = fit_spec(open_store(store), cells=cells, pairs=split.pairs, codes=codes, factor=grid.factor, position=waves)
    planned = plan_blocks(store, years=r.years, reference=r.reference)
    every = [b for b in planned if set(b.years) != {r.reference}] or planned
    land = [int(np.asarray(source.mask[b.window.slices]).sum()) for b in every]
    order = np.argsort(land)
    parts = (0.8, 0.2, *np.linspace(0.0, 1.0, _BLOCKS - 2).tolist())
    picked = dict.fromkeys(int(order[round(part * (len(order) - 1))]) for part in parts)
    return _Ground(
        store, grid, legend, spec, cells, split.pairs, tuple(_outward(every[i], r.reference) for i in picked), r.reference
    )


def _outward(block: Block, reference: int | None) -> Block:
    """Order the years of a block away from the reference map, and leave out its own if there are others."""
    years = set(block.years) - {reference} or block.years
    return replace(block, years=tuple(sorted(years, key=lambda y: abs(y - (reference or 0)))))


def _practice(run: RunConfig, folder: Path) -> _Ground:
    """Make a practice store of one shard."""
    unit = math.lcm(run.grid.factor, 2**run.model.depth)
    side = min(run.grid.shard, max(unit, _SIDE // unit * unit))
    grid = practice_grid(factor=run.grid.factor, shard=side, shards=(1, 1))
    legend, store = Inputs.of(run).legend, folder / "store.zarr"
    zones = sum(layer.categorical for layer in run.static)
    write_practice_store(store, grid=grid, legend=legend, years=_YEARS, numbers=len(run.static) - zones, zones=zones)
    cells = np.ones(grid.coarse.shape, dtype=bool)
    pairs = tuple((_YEARS[0], year) for year in _YEARS[1:])
    codes, waves = legend.codes.tolist(), run.train.position
    spec = fit_spec(open_store(store), cells=cells, pairs=pairs, codes=codes, factor=grid.factor, position=waves)
    reference = None if run.reconstruct.reference is None else _YEARS[0]
    return _Ground(store, grid, legend, spec, cells, pairs, (Block(Window(0, 0, side, side), _YEARS[1:]),), reference)


def _job(run: RunConfig, ground: _Ground, folder: Path, there: bool) -> BlockSettings:
    """Put together the job of the block, and make its cube."""
    path = folder / "cube.zarr"
    about: dict[str, Any] = {"title": "calibration", "source": "calibration", "totals": "not imposed"}
    years = sorted({year for block in ground.blocks for year in block.years})
    cube.create(path, grid=ground.grid, legend=ground.legend, years=years, identity={}, years_a_shard=1, **about)
    if there:
        return job_of(run, Source(ground.store), cube_path=path, reference=ground.reference)
    c, plain = run.constrain, load_crosswalk("identity", ground.legend)
    settings: dict[str, Any] = {"keep": c.keep, "settle": c.settle, "weights": run.scenario.weights}
    return BlockSettings(
        str(ground.store), str(path), "", "", ground.reference, 1, plain, method=method_of(run, ground.reference), **settings
    )


def _training(run: RunConfig, ground: _Ground, make: Callable[[], Any], folder: Path) -> tuple[float, float]:
    """Seconds of a training step and of a scored batch."""
    t = run.train
    patch = min(t.patch, ground.grid.shard)
    load = partial(PatchLoader, partial(open_store, ground.store), grid=ground.grid, legend=ground.legend, spec=ground.spec)
    seen = {name: getattr(t, name) for name in ("batch", "mix", "mask_all", "mask_some", "disturb", "focus", "turn")}
    loader = load(cells=ground.cells, pairs=ground.pairs, patch=patch, **seen)
    held = list(loader.batches(0, 2))
    schedule = {k: v for k, v in t.model_dump().items() if k in Schedule.__dataclass_fields__}
    schedule |= {"validate_every": 10**6, "checkpoint_every": 10**6}
    fixed: Any = {"batches": loader.batches, "weights": torch.ones(ground.legend.n), "fingerprint": "calibration"}
    rows: list[dict[str, float]] = []
    before = torch.get_num_threads()
    torch.set_num_threads(t.threads or before)
    try:
        began = time.perf_counter()
        fit(make(), validation=held, schedule=Schedule(**{**schedule, "steps": 0}), folder=_new(folder / "scored"), **fixed)
        scored = (time.perf_counter() - began) / len(held)
        steps = Schedule(**{**schedule, "steps": _STEPS})
        fit(make(), validation=[], schedule=steps, folder=_new(folder / "fit"), progress=lambda _, row: rows.append(row), **fixed)
    finally:
        torch.set_num_threads(before)
    return median(row["seconds"] - row["waited"] for row in rows[1:]), scored


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


@dataclass(frozen=True)
class _Found:
    """Of a block: mapped cells; seconds of the networks for a cell that they see and a year, and to read a cell; seconds outside the networks and bytes of a year."""

    mapped: int
    network: float
    read: float
    host: float
    bytes: float


def _block(ground: _Ground, block: Block, job: BlockSettings, *, busy: bool) -> _Found:
    """Time a block: in seconds of its cores where all will be ``busy``, as other threads then have none to help with, else in seconds."""
    source, window, years = Source(ground.store), block.window, block.years

    def clock() -> float:
        return time.process_time() / job.threads if busy else time.perf_counter()

    before = torch.get_num_threads()

    def seconds(count: int) -> float:
        began = clock()
        reconstruct_block(Block(window, years[:count]), job)
        return clock() - began

    def size() -> int:
        return sum(f.stat().st_size for f in Path(job.cube).glob("*/c/**/*") if f.is_file())

    held = size()
    try:
        seconds(1)
        few, some = seconds(1), min(3, len(years))
        pace = (seconds(some) - few) / max(1, some - 1)
        last = max(some, min(len(years), round(_LONG / max(pace, 1e-3))))
        many, written = seconds(last), size() - held
        forward, card = ready(job.model, job.checksum, job.precision)
        data = read_window_data(source, window, reference=job.reference, stride=forward.stride, halo=forward.halo)
        predicted = predict(forward, source, data.part, spec=card.spec, reference=job.reference, years=years[:last])
        network = median(_seconds(predicted, clock))
    finally:
        torch.set_num_threads(before)
    # A block walks all years that the scenario has, also those that are not kept.
    walks = job.reference is not None and job.method != "none"
    ends = [years_between(source.years, job.reference or 0, years[n - 1]) if walks else range(n) for n in (1, last)]
    year = (many - few) / (len(ends[1]) - len(ends[0])) if last > 1 else few / len(ends[0])
    seen = (data.part.height + 2 * forward.halo) * (data.part.width + 2 * forward.halo)
    return _Found(
        mapped=int(data.mask.sum()),
        network=network / seen,
        read=max(0.0, few - year) / seen,
        host=max(0.0, year - network),
        bytes=written / last,
    )


def _line(x: list[int], y: list[float]) -> tuple[float, float]:
    """Slope and start of the line through points, neither below 0."""
    if len(set(x)) == 1:
        return sum(y) / sum(x), 0.0
    found = nnls(np.column_stack([x, np.ones(len(x))]), np.asarray(y))[0]
    return float(found[0]), float(found[1])


def _seconds(steps: Iterator[Any], clock: Callable[[], float]) -> list[float]:
    """Seconds of each step of an iterator but the first, which opens files."""
    times, began = [], clock()
    for _ in steps:
        times.append(clock() - began)
        began = clock()
    return times[1:] or times
