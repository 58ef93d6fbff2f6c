"""Side-by-side timings of AI4Land on a synthetic store; ``make bench`` writes ``benchmarks/results.json``.

Every comparison runs its arms alternately, A B A B, in one process on a fixed number of cores. It reports the median over the
rounds of the ratio within a round, because other load on the machine affects both arms of a round alike. docs/performance.md
explains each row. ``--quick`` runs everything on a store of a few cells, to check that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import dask
import dask.array as da
import numpy as np
import torch
import xarray as xr
import zarr
from distributed import Client
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Column, Table
from xbatcher import BatchGenerator

from ai4land.constrain.allocate import allocate
from ai4land.constrain.project import project
from ai4land.constrain.quotas import add_change, level_quotas
from ai4land.crosswalk import load_crosswalk
from ai4land.cube import cube
from ai4land.cube.cube import Block
from ai4land.cube.numbers import EMPTY, FRACTION_EMPTY, FRACTION_SCALE, SCALE, quantise
from ai4land.cube.template import YEARS_A_SHARD
from ai4land.grid import FINE_DIMS, Grid, Window, block_sum, coarse_window
from ai4land.legend import MISSING, Legend, load_legend
from ai4land.model.checkpoint import load_model
from ai4land.model.ensemble import Ensemble
from ai4land.model.features import FeatureSpec, features
from ai4land.model.forward import Forward, Precision
from ai4land.model.norm import Group
from ai4land.model.unet import UNet, interpolate
from ai4land.reconstruct.block import BlockSettings, reconstruct_block
from ai4land.reconstruct.blocks import run_blocks
from ai4land.reconstruct.predict import predict
from ai4land.run.config import ModelConfig, ReconstructConfig
from ai4land.run.practice import practice_grid, practice_network, save_practice_model, write_practice_store
from ai4land.store.read import Source, open_store
from ai4land.train.batch import PatchLoader
from ai4land.train.gang import Member, gang
from ai4land.train.loop import Schedule, fit
from ai4land.train.normalise import fit_spec
from ai4land.workers.cluster import SETTINGS, local

Arm = Callable[[], Callable[[], object]]

CORES = 2
CPU = torch.device("cpu")
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RESULTS = Path(__file__).with_name("results.json")
CONTINUOUS = 11
"""Continuous static maps; one more is categorical."""
YEARS = (2000, 2001, 2002, 2003, 2004, 2005)
PAIRS = ((2000, 2001), (2002, 2003), (2004, 2005))


@dataclass(frozen=True)
class Size:
    """Sizes of a benchmark.

    ``dense`` and ``sparse`` are the patches that the loader cuts from each shard it reads, ``plain`` the patches that xbatcher
    makes in a round, ``mapped`` the years of a block.
    """

    factor: int
    shard: int
    base: int
    patch: int
    batch: int
    dense: int
    sparse: int
    plain: int
    mapped: tuple[int, ...]
    steps: int
    rounds: int


FULL = Size(30, 720, 32, 120, 16, dense=32, sparse=8, plain=24, mapped=YEARS[1:6], steps=12, rounds=3)
CROWD = Size(30, 480, 16, 120, 16, dense=32, sparse=8, plain=24, mapped=YEARS[1:3], steps=12, rounds=3)
MANY = Size(8, 64, 4, 16, 4, dense=8, sparse=4, plain=4, mapped=YEARS[1:2], steps=3, rounds=1)
QUICK = Size(8, 64, 4, 16, 4, dense=8, sparse=4, plain=4, mapped=YEARS[1:3], steps=3, rounds=1)


@dataclass(frozen=True)
class Row:
    """One result."""

    name: str
    value: float
    unit: str
    versus: str


@dataclass(frozen=True)
class Setting:
    """A store and a model, in one folder."""

    size: Size
    folder: Path
    grid: Grid
    legend: Legend
    spec: FeatureSpec
    checksum: str

    @property
    def store(self) -> Path:
        """Path of the analysis-ready store."""
        return self.folder / "store.zarr"

    def settings(self, path: Path, precision: Precision = "float32") -> BlockSettings:
        """Make the settings with which :func:`reconstruct_block` writes into a cube."""
        identity = load_crosswalk("identity", self.legend)
        return BlockSettings(
            str(self.store), str(path), str(self.folder), self.checksum, YEARS[0], CORES, identity, precision, method="none"
        )


def fix_cores() -> None:
    """Hold this process, PyTorch, Dask and Zarr to ``CORES`` cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    torch.set_num_threads(CORES)
    dask.config.set(scheduler="threads", num_workers=CORES)
    zarr.config.set({"threading.max_workers": CORES})


def alternate(arms: dict[str, Arm], *, rounds: int) -> dict[str, list[float]]:
    """Time warm arms alternately; return the seconds of every round.

    Before each round an arm is called, untimed, and returns the function that is timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            work = arm()
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Return the median over the rounds of the ratio within a round."""
    return median(a / b for a, b in zip(over, under, strict=True))


# -- the store and the model --------------------------------------------------------------------------------------------


def make_setting(folder: Path, size: Size, *, shards: tuple[int, int] = (1, 2)) -> Setting:
    """Write a practice store of ``shards`` rows and columns, and an untrained model."""
    grid = practice_grid(factor=size.factor, shard=size.shard, shards=shards)
    legend, store = load_legend("hildaplus"), folder / "store.zarr"
    write_practice_store(store, grid=grid, legend=legend, years=YEARS, numbers=CONTINUOUS, zones=1, land=0.7)
    cells = np.ones(grid.coarse.shape, dtype=bool)
    spec = fit_spec(open_store(store), cells=cells, pairs=PAIRS, codes=legend.codes.tolist(), factor=grid.factor)
    checksum = save_practice_model(folder, [make_model(spec, grid, base=size.base)], grid=grid, legend=legend, spec=spec)
    return Setting(size, folder, grid, legend, spec, checksum)


def make_model(spec: FeatureSpec, grid: Grid, *, base: int) -> UNet:
    """Make a network of the default size, except for its base."""
    return practice_network(spec, grid, **{**ModelConfig().model_dump(), "base": base})


def network(s: Setting) -> UNet:
    """Load the only network of the setting's model."""
    model: UNet = load_model(s.folder)[0].members[0]  # type: ignore[assignment]
    return model


def begun(s: Setting, model: UNet, window: Window, *, dtype: torch.dtype = torch.float32) -> Forward:
    """Make a network ready to predict, with the maps of a window loaded."""
    forward = Forward(Ensemble([model]).eval(), dtype=dtype, device=CPU)
    next(predict(forward, Source(s.store), window, spec=s.spec, reference=YEARS[0], years=YEARS[1:2]))
    return forward


def coarse_channels(s: Setting, window: Window, year: int) -> NDArray[np.float32]:
    """Compute the coarse channels of a window."""
    source = Source(s.store)
    cells, _ = coarse_window(window.pad(network(s).halo), s.grid.factor)
    wanted, start = source.states_of(year, cells), source.states_of(YEARS[0], cells)
    nothing = np.zeros((len(s.spec.static_names), 1, 1), dtype=np.float16)
    known = np.zeros((1, 1), np.uint8)
    place = s.grid.coarse_centres(cells)
    return features(nothing, reference=known, wanted=wanted, start=start, lead=year - YEARS[0], spec=s.spec, place=place).coarse


# -- loader -------------------------------------------------------------------------------------------------------------


def loader_rows(s: Setting) -> list[Row]:
    """Time the patch loader, starting with nothing in memory, against xbatcher on a Dask-backed dataset."""
    size, shards = s.size, len(s.grid.shards())
    dims = {"feature": CONTINUOUS + 1, "observed_year": 2, **dict.fromkeys(FINE_DIMS, size.patch)}
    plain = BatchGenerator(xr.open_zarr(s.store, chunks={}, consolidated=False)[["static", "land_cover"]], input_dims=dims)
    rng = np.random.default_rng(0)

    def with_dask() -> None:
        for index in rng.choice(len(plain), size=size.plain, replace=False):
            patch = plain[int(index)]
            if patch["static"].shape[-2:] != (size.patch, size.patch) or not isinstance(patch["land_cover"].data, np.ndarray):
                raise RuntimeError("xbatcher gave a patch of another shape or outside memory, expected a NumPy array")

    def fresh(per_shard: int) -> Callable[[], None]:
        # Each round makes a new loader, which has nothing in memory. A visit takes both shards, and its length
        # sets how many patches are cut from them.
        visit = per_shard * shards // size.batch
        return partial(_drain, _loader(s, mix=8, visit=visit), visit * size.batch)

    kept = fresh(size.dense)
    arms: dict[str, Arm] = {
        "dense": partial(fresh, size.dense),
        "sparse": partial(fresh, size.sparse),
        "kept": lambda: kept,
        "dask": lambda: with_dask,
    }
    counts = {"dense": size.dense * shards, "sparse": size.sparse * shards, "kept": size.dense * shards, "dask": size.plain}
    for arm in arms.values():
        arm()()
    each = {n: [v / counts[n] for v in values] for n, values in alternate(arms, rounds=2 * size.rounds + 1).items()}
    other = f"xbatcher over Dask, patches of {size.patch} cells"
    regimes = (
        ("loader_vs_dask", "dense", f"{size.dense} patches a shard read"),
        ("loader_vs_dask_sparse", "sparse", f"{size.sparse} patches a shard read"),
        ("loader_vs_dask_kept", "kept", "all shards in memory"),
    )
    return [
        *(Row(name, ratio(each["dask"], each[arm]), "times", f"{other}; {about}") for name, arm, about in regimes),
        Row("loader_rate", 1 / median(each["dense"]), "patches/s", "absolute, as in loader_vs_dask"),
        Row("patches_from_memory", 1 / median(each["kept"]), "patches/s", "absolute, as in loader_vs_dask_kept"),
        Row("xbatcher_dask_rate", 1 / median(each["dask"]), "patches/s", "absolute, as in loader_vs_dask"),
    ]


def _loader(s: Setting, *, mix: int, visit: int, keep: int = 16) -> PatchLoader:
    return PatchLoader(
        partial(open_store, s.store),
        grid=s.grid,
        legend=s.legend,
        spec=s.spec,
        cells=np.ones(s.grid.coarse.shape, dtype=bool),
        pairs=PAIRS,
        patch=s.size.patch,
        batch=s.size.batch,
        mix=mix,
        visit=visit,
        keep=keep,
    )


def _drain(loader: PatchLoader, patches: int) -> None:
    made = sum(batch.target.shape[0] for batch in loader.batches(0, patches // loader.batch))
    if made != patches or len(loader._cache) != len(loader.grid.shards()):
        raise RuntimeError(f"loader made {made} patches of {len(loader._cache)} shards, expected {patches} of every shard")


# -- reconstruct --------------------------------------------------------------------------------------------------------


def upsample(coarse: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """Interpolate coarse cells ``(channel, rows, columns)`` bilinearly to all fine cells with xarray, repeating the edge."""
    dims = ("channel", "y", "x")
    padded = np.pad(coarse, ((0, 0), (1, 1), (1, 1)), mode="edge")
    centres = {d: np.arange(n, dtype=np.float64) - 0.5 for d, n in zip(dims[1:], padded.shape[1:], strict=True)}
    fine = {d: (np.arange(n * factor) + 0.5) / factor for d, n in zip(dims[1:], coarse.shape[1:], strict=True)}
    values: NDArray[np.float32] = xr.DataArray(padded, dims=dims, coords=centres).interp(fine, method="linear").values
    return values.astype(np.float32)


@torch.inference_mode()
def naive_forward(fixed: NDArray[np.float32], fine: NDArray[np.float32], *, model: UNet) -> NDArray[np.float32]:
    """Run the network on fine arrays only: static channels and reference class stacked, coarse features already upsampled."""
    halo = model.halo
    known = torch.from_numpy(fixed[-1]).long().sub(1).remainder(model.classes + 1)[None]
    seen = model.seen(known).permute(0, 3, 1, 2)
    x = torch.cat([torch.from_numpy(fixed[:-1])[None], torch.from_numpy(fine)[None], seen], dim=1)
    levels = []
    for level, block in enumerate(model.down):
        x = block(torch.nn.functional.max_pool2d(x, 2) if level else x)
        levels.append(x)
    levels.pop()
    for up, merge in zip(model.up, model.merge, strict=True):
        x = merge(torch.cat([levels.pop(), up(x)], dim=1))
    logits = model.head(x) + model.persistence(known).permute(0, 3, 1, 2)
    return torch.softmax(logits[0, :, halo:-halo, halo:-halo], dim=0).numpy()


def naive_year(s: Setting, model: UNet, year: int) -> Any:
    """Build the class probabilities of a year as a Dask array: upsample, stack, ``map_overlap``."""
    ds, source, side = xr.open_zarr(s.store, chunks={}, consolidated=False), Source(s.store), s.grid.shard
    codes = ds["land_cover"].sel(observed_year=YEARS[0]).data.rechunk(side)

    def fix(raw: NDArray[Any], codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        index = s.legend.encode(codes[0])
        seen = np.where(index == MISSING, 0, index + 1).astype(np.float32)
        return np.concatenate([s.spec.static_channels(raw).astype(np.float32), seen[None]])

    raw = ds["static"].data.rechunk({0: -1, 1: side, 2: side})
    fixed = da.map_blocks(fix, raw, codes[None], dtype=np.float32, chunks=((len(s.spec.static_names) + 1,), *raw.chunks[1:]))
    every = Window(0, 0, *(int(n) for n in s.grid.coarse.shape))
    nothing = np.zeros((len(s.spec.static_names), 1, 1), dtype=np.float16)
    start, wanted = source.states_of(YEARS[0], every), source.states_of(year, every)
    known, place = np.zeros((1, 1), np.uint8), s.grid.coarse_centres(every)
    made = features(nothing, reference=known, wanted=wanted, start=start, lead=year - YEARS[0], spec=s.spec, place=place)
    with torch.inference_mode():
        coarse = model.coarse(torch.from_numpy(made.coarse)[None])[0].numpy()
    fine = da.from_array(upsample(coarse, s.grid.factor), chunks=(-1, side, side))
    depth = {0: 0, 1: model.halo, 2: model.halo}
    return da.map_overlap(
        partial(naive_forward, model=model),
        fixed,
        fine,
        depth=[depth, depth],
        boundary=[{0: "none", 1: 0, 2: 0}, {0: "none", 1: "nearest", 2: "nearest"}],
        trim=False,
        align_arrays=False,
        dtype=np.float32,
        meta=np.empty((0, 0, 0), dtype=np.float32),
        chunks=((model.classes,), *raw.chunks[1:]),
    )


def naive_cube(s: Setting, path: Path, model: UNet) -> None:
    """Write a cube year by year, each year one Dask graph over the whole region."""
    mask = xr.open_zarr(s.store, chunks={}, consolidated=False)["mask"].data.rechunk(s.grid.shard)[None]
    group = zarr.open_group(path, mode="r+", use_consolidated=False)

    def pack(p: NDArray[np.float32], mask: NDArray[np.uint8]) -> NDArray[np.uint16]:
        best = np.where(mask[0], s.legend.decode(p.argmax(axis=0).astype(np.uint8)), s.legend.fill.code)
        sure = np.where(mask[0], np.rint(p.max(axis=0) * SCALE), EMPTY)
        return np.concatenate([np.stack([best, sure]), np.where(mask, quantise(p), FRACTION_EMPTY)]).astype(np.uint16)

    for i, year in enumerate(s.size.mapped):
        p = naive_year(s, model, year)
        packed = da.map_blocks(pack, p, mask, dtype=np.uint16, chunks=((s.legend.n + 2,), *p.chunks[1:]))
        whole, year_slice = slice(None), slice(i, i + 1)
        codes, sure = packed[0:1].astype(np.uint8), packed[1:2].astype(np.uint8)
        parts: list[Any] = [codes, codes, sure, packed[2:][None]]
        targets: list[Any] = [group[name] for name in ("land_cover", "most_likely", "confidence", "fraction")]
        regions = [(year_slice, *(whole,) * (part.ndim - 1)) for part in parts]
        # One block at a time with the network on all cores, like the task of a worker.
        da.store(parts, targets, regions=regions, lock=False, return_stored=False, num_workers=1)


def new_cube(s: Setting, path: Path, *, years_a_shard: int = YEARS_A_SHARD) -> Path:
    """Make an empty cube that shows all its years; replace an existing one."""
    shutil.rmtree(path, ignore_errors=True)
    about = {"title": "benchmark", "source": "benchmark", "totals": "not imposed", "years_a_shard": years_a_shard}
    cube.create(path, grid=s.grid, legend=s.legend, years=s.size.mapped, identity={}, **about)
    for name, document in cube.public_documents(cube.template_of(path), len(s.size.mapped)).items():
        (path / name / "zarr.json").write_bytes(cube.encode(document))
    return path


def reconstruct_rows(s: Setting) -> list[Row]:
    """Time blocks against the bare forward pass on the same windows, and against the naive way to the same cube."""
    paths = {name: s.folder / f"{name}.zarr" for name in ("float32", "bfloat16", "naive")}
    model, windows = network(s), s.grid.shards()
    blocks = [Block(w, s.size.mapped) for w in windows]
    wanted = [[torch.from_numpy(coarse_channels(s, w, year))[None] for year in s.size.mapped] for w in windows]
    made: dict[str, list[Forward]] = {name: [begun(s, model, w, dtype=dtype) for w in windows] for name, dtype in DTYPES.items()}

    @torch.inference_mode()
    def bare(precision: str) -> None:
        # Only the network: coarse features, convolutions and logits of the whole windows, in place.
        for ready, years in zip(made[precision], wanted, strict=True):
            folded, x = ready.members[0], ready._buffers[0]
            last = x.shape[1] - folded.seen.embedding_dim
            for coarse in years:
                fine = interpolate(folded.coarse(coarse), ready._offset, ready._size, ready.factor)
                x[:, last - fine.shape[1] : last] = fine
                folded.head(folded.trunk(x))

    def ours(settings: BlockSettings) -> None:
        # Like a worker: several blocks at once.
        with ThreadPoolExecutor(ReconstructConfig(reference=None, years=[2000], threads=CORES).hands) as hands:
            list(hands.map(partial(reconstruct_block, settings=settings), blocks))

    def begin(precision: Precision) -> Callable[[], None]:
        return partial(ours, s.settings(new_cube(s, paths[precision]), precision))

    # Each way writes its own shards: several years at once, or one year.
    arms: dict[str, Arm] = {"naive": lambda: partial(naive_cube, s, new_cube(s, paths["naive"], years_a_shard=1), model)}
    for name in DTYPES:
        arms[f"bare {name}"] = partial(partial, bare, name)
        arms[f"ours {name}"] = partial(begin, name)
        begin(name)()
    check_same(s, model, year=s.size.mapped[-1])
    seconds = alternate(arms, rounds=s.size.rounds)
    check_cubes(paths["float32"], paths["naive"])
    check_cubes(paths["bfloat16"], paths["naive"], units=SCALE / 10, least=0.99)
    cells = len(s.size.mapped) * s.grid.shape[0] * s.grid.shape[1]
    years = f"{len(s.size.mapped)} years of {len(blocks)} shards of {s.grid.shard} cells, base {s.size.base}"
    naive = f"upsample, stack, map_overlap in float32; {years}"
    single, half = seconds["ours float32"], seconds["ours bfloat16"]
    return [
        Row("reconstruct_efficiency", ratio(seconds["bare float32"], single), "1", f"network alone on the same windows; {years}"),
        Row("reconstruct_efficiency_bf16", ratio(seconds["bare bfloat16"], half), "1", "the same in bfloat16"),
        Row("reconstruct_vs_naive", ratio(seconds["naive"], half), "times", f"{naive}; ours in bfloat16"),
        Row("reconstruct_vs_naive_float32", ratio(seconds["naive"], single), "times", f"{naive}; ours in float32"),
        Row("reconstruct_rate", cells / median(half) / 1e6, "million cells/s", "absolute, as in reconstruct_vs_naive"),
    ]


def half_row(s: Setting) -> Row:
    """Time the optimised network in bfloat16 against the eager one in float32."""
    window, model = s.grid.shards()[0], network(s).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    coarse = coarse_channels(s, window, YEARS[1])
    ready = begun(s, model, window, dtype=torch.bfloat16)
    static = ready._buffers[0][:, : len(s.spec.static_names)].float()
    known = torch.zeros(static.shape[-2:], dtype=torch.uint8)[None]
    given = static, known, torch.from_numpy(coarse)[None], ready._offset
    halo = model.halo

    @torch.inference_mode()
    def eager() -> None:
        torch.softmax(model(*given)[0, :, halo:-halo, halo:-halo], dim=0).numpy()

    def half() -> None:
        ready.probabilities(coarse)

    arms: dict[str, Arm] = {"eager": lambda: eager, "half": lambda: half}
    for arm in arms.values():
        arm()()
    seconds = alternate(arms, rounds=2 * s.size.rounds + 1)
    about = f"eager float32; one window of {static.shape[-1]} cells, base {s.size.base}"
    return Row("bf16_speedup", ratio(seconds["eager"], seconds["half"]), "times", about)


def constraint_rows(s: Setting) -> list[Row]:
    """Time both constrained products of a shard, with 2 % net change per coarse cell, against the forward pass on one core."""
    source, window, f, n = Source(s.store), s.grid.shards()[0], s.grid.factor, s.legend.n
    rng = np.random.default_rng(0)
    reference = source.map_of(YEARS[0], window)
    mapped = reference != MISSING
    logits = rng.standard_normal((n, *reference.shape), dtype=np.float32)
    logits += 5 * (np.arange(n)[:, None, None] == reference)
    p = torch.softmax(torch.from_numpy(logits), dim=0).numpy()
    cells = block_sum(mapped.astype(np.float64), f)
    held = np.stack([block_sum((reference == k).astype(np.float64), f) for k in range(n)]) / np.maximum(cells, 1)
    step = rng.standard_normal(held.shape)
    step *= 0.04 / np.abs(step - step.mean(axis=0)).sum(axis=0)
    before, now = (np.where(cells > 0, add_change(held, part * (step - step.mean(axis=0))), np.nan) for part in (0.9, 1.0))
    quotas = level_quotas(now, cells.astype(np.int64))
    warm = project(p, totals=before, factor=f, mapped=mapped).multipliers
    narrow = begun(s, make_model(s.spec, s.grid, base=s.size.base // 2), window)
    wide = begun(s, network(s), window)
    coarse = coarse_channels(s, window, YEARS[1])
    made: dict[str, Any] = {}

    def forward() -> None:
        narrow.probabilities(coarse)

    def forward_wide() -> None:
        wide.probabilities(coarse)

    def fractions() -> None:
        made["fractions"] = project(p, totals=now, factor=f, mapped=mapped, multipliers=warm).fractions

    def whole_cells() -> None:
        scores = np.log(np.maximum(made["fractions"], 1e-12))
        allocate(scores, current=reference, quotas=quotas, factor=f)

    fractions()
    torch.set_num_threads(1)
    try:
        arms: dict[str, Arm] = {
            "forward": lambda: forward,
            "wide": lambda: forward_wide,
            "fractions": lambda: fractions,
            "cells": lambda: whole_cells,
        }
        seconds = alternate(arms, rounds=s.size.rounds)
    finally:
        torch.set_num_threads(CORES)
    both = [a + b for a, b in zip(seconds["fractions"], seconds["cells"], strict=True)]
    about = f"{n} classes, factor {f}, one core"
    return [
        Row(
            "constraint_share",
            ratio(both, seconds["forward"]),
            "1",
            f"forward pass of a network of base {s.size.base // 2}, float32; {about}",
        ),
        Row("constraint_share_wide", ratio(both, seconds["wide"]), "1", f"the same, base {s.size.base}; {about}"),
        Row("allocate_rate", int(mapped.sum()) / median(seconds["cells"]) / 1e6, "million cells/s", f"absolute; {about}"),
    ]


def check_same(s: Setting, model: UNet, *, year: int, tolerance: float = 1e-4) -> None:
    """Raise if any probability of the two ways differs by more than ``tolerance``."""
    source, naive, forward = Source(s.store), naive_year(s, model, year).compute(), Forward(Ensemble([model]), device=CPU)
    for window in s.grid.shards():
        for _, p in predict(forward, source, window, spec=s.spec, reference=YEARS[0], years=(year,)):
            off = float(np.abs(naive[(slice(None), *window.slices)] - p).max())
            if not off <= tolerance:
                raise RuntimeError(
                    f"naive and block-wise probabilities of {year} differ by {off:g}, expected at most {tolerance:g}"
                )


def check_cubes(ours: Path, naive: Path, *, units: float = 1.0, least: float = 0.9999) -> None:
    """Raise if probabilities differ by more than ``units`` of 1/250, or if less than a share ``least`` of the classes agree."""
    names = ("land_cover", "fraction", "confidence")
    a, b = (
        {n: xr.open_zarr(p, consolidated=False, mask_and_scale=False)[n].values.astype(np.int32) for n in names}
        for p in (ours, naive)
    )
    scales = {"fraction": SCALE / FRACTION_SCALE, "confidence": 1}
    off = max(float(np.abs(a[name] - b[name]).max()) * unit for name, unit in scales.items())
    same = float(np.mean(a["land_cover"] == b["land_cover"]))
    if off > units or same < least:
        raise RuntimeError(
            f"the cubes differ by {off:.3g} units of 1/{SCALE} and agree on {same:.4%} of the classes, expected {units:.3g}, {least:.2%}"
        )


def halo_rows() -> list[Row]:
    """Count the cells read for a shard of 1440 cells, over those written."""
    rows = []
    for name, depth in (("halo_factor", ModelConfig().depth), ("halo_factor_depth4", 4)):
        model = UNet(static_channels=1, coarse_channels=1, classes=2, factor=30, base=1, depth=depth)
        window = Window(0, 0, 1440, 1440)
        read = window.pad(model.halo)
        value = read.height * read.width / (window.height * window.width)
        rows.append(Row(name, value, "1", f"cells written; shard of 1440 cells, depth {depth}, halo {model.halo}"))
    return rows


# -- align --------------------------------------------------------------------------------------------------------------


def align_rows(s: Setting) -> list[Row]:
    """Time the making of a store from files, shard by shard and in the plain way, with one and two workers (:mod:`aligning`)."""
    from aligning import LAYERS, YEARS, measure

    shard = s.size.shard
    grid, seconds, peaks = measure(
        s.folder / "files", shard=shard, rounds=s.size.rounds, workers=workers, peak=peak_memory, alternate=alternate
    )
    cells = grid.shape[0] * grid.shape[1] * (len(LAYERS) + len(YEARS))
    about = f"{len(LAYERS)} layers and {len(YEARS)} maps of 8 shards of {shard} cells, GeoTIFF"
    return [
        Row(
            "align_vs_whole",
            ratio(seconds["layers"], seconds["shards"]),
            "times",
            f"every layer read whole; {about}; one process",
        ),
        Row("align_two_workers", ratio(seconds["one"], seconds["two"]), "times", f"one worker; {about}"),
        Row("align_rate", cells / median(seconds["one"]) / 1e6, "million cells/s", f"absolute, one worker; {about}"),
        Row("align_memory_growth", ratio(peaks["large"], peaks["small"]), "1", f"peak of a worker on 2 shards; {about}"),
    ]


# -- workers ------------------------------------------------------------------------------------------------------------


def worker_rows(folder: Path, size: Size) -> list[Row]:
    """Measure the mapping of 2 and of 20 shards on Dask workers of one thread each."""
    settings = {}
    for name, shards in (("small", (1, 2)), ("large", (4, 5))):
        (folder / name).mkdir()
        settings[name] = make_setting(folder / name, size, shards=shards)
    count = 0

    def mapping(s: Setting, client: Client) -> Callable[[], object]:
        nonlocal count
        count += 1
        path = s.folder / f"cube{count}.zarr"
        new_cube(s, path)
        blocks = [Block(w, s.size.mapped) for w in s.grid.shards()]
        settings = replace(s.settings(path), threads=1)
        return partial(run_blocks, blocks, settings, client=client)

    peaks: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(size.rounds):
        for name, s in settings.items():
            with workers(1) as client:
                mapping(s, client)()
                peaks[name] += client.run(peak_memory).values()
    large = settings["large"]

    def beside(**starts: AbstractContextManager[Client]) -> dict[str, list[float]]:
        with ExitStack() as stack:
            arms: dict[str, Arm] = {k: partial(mapping, large, stack.enter_context(w)) for k, w in starts.items()}
            for arm in arms.values():
                arm()()
            return alternate(arms, rounds=size.rounds)

    seconds = beside(one=workers(1), two=workers(2))
    plain = beside(ours=workers(1), dask=workers(1, settings={}))
    n = len(large.grid.shards())
    rate = large.grid.shape[0] * large.grid.shape[1] * len(size.mapped) / median(seconds["one"])
    about = f"{n} shards of {size.shard} cells, {len(size.mapped)} years, base {size.base}"
    return [
        Row("memory_growth", ratio(peaks["large"], peaks["small"]), "1", f"peak of a worker on 2 shards; {about}"),
        Row("worker_memory", median(peaks["large"]) / 1e9, "GB", "absolute, as in memory_growth"),
        Row("two_worker_speedup", ratio(seconds["one"], seconds["two"]), "times", f"one worker, same work; {about}"),
        Row("worker_settings", ratio(plain["dask"], plain["ours"]), "times", f"one worker with Dask's own settings; {about}"),
        scheduler_row(folder, MANY if size is CROWD else size, rate),
    ]


def scheduler_row(folder: Path, size: Size, rate: float) -> Row:
    """Run the graph of a globe at 1 km, with a shard of a few cells and a tiny network in place of each block."""
    (folder / "graph").mkdir()
    s = make_setting(folder / "graph", size, shards=(15, 30) if size is MANY else (1, 2))
    new_cube(s, s.folder / "cube.zarr")
    blocks = [Block(w, s.size.mapped) for w in s.grid.shards()]
    with workers(CORES) as client:
        busy = time.process_time()
        run_blocks(blocks, replace(s.settings(s.folder / "cube.zarr"), threads=1), client=client)
        busy = (time.process_time() - busy) / len(blocks)
    each = 1440**2 * 100 / rate
    about = f"one core of the scheduler; {len(blocks)} blocks, {busy * 1e3:.2f} ms of CPU each, for 512 workers as fast as one core here"
    return Row("scheduler_share", 512 * busy / each, "1", f"{about}, {each:.0f} s a block of 1440 cells and 100 years")


@contextmanager
def workers(count: int, *, settings: dict[str, object] = SETTINGS) -> Iterator[Client]:
    """Start Dask workers of one thread each, including Zarr's compression."""
    single = {"OMP_NUM_THREADS": "1", "ZARR_THREADING__MAX_WORKERS": "1"}
    with dask.config.set({"distributed.nanny.environ": single}), local(count, dashboard=False, settings=settings) as client:
        yield client


def peak_memory() -> float:
    """Read the peak memory of this process in bytes (Linux only)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024.0 * int(status.split("VmHWM:")[1].split()[0])


def first_patch_row(s: Setting) -> Row:
    """Time a new Python process from its start to the first batch of patches."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import numpy as np\n"
        "from functools import partial; from pathlib import Path\n"
        "from ai4land.store.read import open_store; from ai4land.train.batch import PatchLoader\n"
        "from ai4land.model.checkpoint import load_card; from ai4land.store.read import Source\n"
        "path = Path(sys.argv[2]); card = load_card(path.parent); grid = Source(path).grid\n"
        "cells = np.ones(grid.coarse.shape, dtype=bool)\n"
        "loader = PatchLoader(partial(open_store, path), grid=grid, legend=card.legend, spec=card.spec, cells=cells,\n"
        f"    pairs={PAIRS}, patch={s.size.patch}, batch=1)\n"
        "next(loader.batches())"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parents[1]), str(s.store)]
    seconds = []
    for _ in range(s.size.rounds):
        began = time.perf_counter()
        subprocess.run(command, check=True)
        seconds.append(time.perf_counter() - began)
    return Row("seconds_to_first_patch", median(seconds), "s", "absolute; from the start of Python, libraries included")


# -- train --------------------------------------------------------------------------------------------------------------


def wait_row(s: Setting) -> Row:
    """Measure the share of a short training that is spent waiting for batches, the first one included."""
    shares = []
    for number in range(s.size.rounds):
        rows: list[dict[str, float]] = []
        # One shard in memory and a new draw for each batch: a new shard every other batch, as on a globe.
        loader = _loader(s, mix=1, visit=1, keep=1)
        fit(
            make_model(s.spec, s.grid, base=s.size.base),
            batches=loader.batches,
            validation=[],
            weights=torch.ones(s.legend.n),
            schedule=Schedule(steps=s.size.steps, validate_every=s.size.steps, checkpoint_every=s.size.steps),
            folder=s.folder / f"fit{number}",
            fingerprint="benchmark",
            device=torch.device("cpu"),
            progress=lambda _, row, rows=rows: rows.append(row),  # type: ignore[misc]
        )
        shares.append(sum(r["waited"] for r in rows) / sum(r["seconds"] for r in rows))
    about = f"seconds of the steps; {s.size.steps} steps of {s.size.batch} patches of {s.size.patch}, base {s.size.base}, CPU"
    return Row("data_wait_share", median(shares), "1", about)


def gang_rows(s: Setting) -> list[Row]:
    """Time training steps on one worker and on two, of one thread each, and compare the losses.

    The differences are compared with those of one worker whose first kernel is changed by rounding.
    """
    arms = {"one": (1, 0.0), "two": (2, 0.0), "nudged": (1, 2e-7)}
    steps: dict[str, list[float]] = {name: [] for name in arms}
    losses: dict[str, list[float]] = {}
    alike: list[float] = []
    for number in range(s.size.rounds):
        for name, (count, nudge) in arms.items():
            if nudge and number:
                continue
            folder = s.folder / f"{name}_{number}"
            with workers(count) as client:
                gang(
                    client,
                    partial(take_part, s=s, folder=folder, nudge=nudge),
                    workers=count,
                    timeout=300,
                    patience=300,
                    state=lambda: None,
                    tell=lambda _: None,
                )
            rows = _metrics(folder)
            steps[name].append(median(r["seconds"] for r in rows))
            losses[name] = [r["loss"] for r in rows]
        folders = [s.folder / f"alone_{number}_{k}" for k in range(2)]
        with workers(2) as client:
            alone = partial(take_part_alone, s=replace(s, size=replace(s.size, batch=s.size.batch // 2)))
            client.gather(client.map(alone, folders, pure=False))
        alike.append(max(median(r["seconds"] for r in _metrics(folder)) for folder in folders))
    apart = {name: max(abs(a - b) for a, b in zip(losses["one"], losses[name], strict=True)) for name in ("two", "nudged")}
    about = f"{s.size.steps} steps of {s.size.batch} patches of {s.size.patch}, base {s.size.base}, workers of one thread"
    return [
        Row("two_worker_training", ratio(steps["one"], steps["two"]), "times", f"a step of one worker; {about}"),
        Row(
            "two_worker_limit",
            ratio(steps["one"], alike),
            "times",
            f"a step of one worker, of two that share nothing and have half a batch each; {about}",
        ),
        Row("two_worker_loss", apart["two"], "1", f"largest difference from the loss of one worker; {about}"),
        Row(
            "nudged_loss", apart["nudged"], "1", f"the same of one worker whose first kernel is 1 + 2e-7 times as large; {about}"
        ),
    ]


def _metrics(folder: Path) -> list[dict[str, float]]:
    """Read the metrics of each training step, except the first."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()][1:]


def take_part(member: Member, *, s: Setting, folder: Path, nudge: float) -> None:
    """Train as one of several workers; the task of each worker."""
    with member.joined() as group:
        _learn(s, folder, group, nudge=nudge)


def take_part_alone(folder: Path, *, s: Setting) -> None:
    """Train beside another, independent worker; the task of each worker."""
    _learn(s, folder, Group(), nudge=0.0)


def _learn(s: Setting, folder: Path, group: Group, *, nudge: float) -> None:
    torch.set_num_threads(1)
    loader, model = _loader(s, mix=2, visit=16), make_model(s.spec, s.grid, base=s.size.base)
    loader.rank, loader.world = group.rank, group.world
    with torch.no_grad():
        model.down[0][0].weight.mul_(1 + nudge)  # type: ignore[index]
    fit(
        model,
        batches=loader.batches,
        validation=[],
        weights=torch.ones(s.legend.n),
        schedule=Schedule(steps=s.size.steps, validate_every=s.size.steps, checkpoint_every=s.size.steps, precision="float32"),
        folder=folder,
        fingerprint="benchmark",
        group=group,
        device=torch.device("cpu"),
    )


GROUPS: dict[str, Callable[[Setting], list[Row]]] = {
    "loader": lambda s: [*loader_rows(s), first_patch_row(s)],
    "reconstruct": lambda s: [*reconstruct_rows(s), half_row(s)],
    "constraint": constraint_rows,
    "halo": lambda _: halo_rows(),
    "train": lambda s: [wait_row(s)],
    "gang": gang_rows,
    "align": align_rows,
    "workers": lambda s: worker_rows(s.folder, CROWD if s.size is FULL else s.size),
}


def run(size: Size, groups: Sequence[str], *, tell: Callable[[str], None]) -> list[Row]:
    """Run the benchmarks of the named groups."""
    began, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory(prefix="ai4land-bench-") as folder:
        setting = make_setting(Path(folder), size)
        for name in groups:
            rows += GROUPS[name](setting)
            tell(f"{time.perf_counter() - began:.0f} s: {name} done")
    return [Row(r.name, float(f"{r.value:.4g}"), r.unit, r.versus) for r in rows]


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few cells and rounds; writes no file unless --output is given")
    parser.add_argument("--output", type=Path, help=f"JSON file to write (default: {RESULTS.name} beside this script)")
    parser.add_argument("--only", choices=GROUPS, nargs="+", help="groups of rows to run; other rows of the file are kept")
    given = parser.parse_args()
    console = Console()
    fix_cores()
    rows = run(QUICK if given.quick else FULL, given.only or list(GROUPS), tell=console.print)
    output = given.output or (None if given.quick else RESULTS)
    if output is not None:
        kept = {r["name"]: r for r in json.loads(output.read_text(encoding="utf-8"))} if given.only and output.is_file() else {}
        kept |= {r.name: asdict(r) for r in rows}
        output.write_text(json.dumps(list(kept.values()), indent=1) + "\n", encoding="utf-8")
    table = Table(Column("name", no_wrap=True), "value", "unit", "versus", title=f"AI4Land on {CORES} cores of {os.cpu_count()}")
    for row in rows:
        table.add_row(row.name, f"{row.value:g}", row.unit, row.versus)
    console.print(table)


if __name__ == "__main__":
    main()
