"""Measure whether the memory of training, scoring and figures grows with the globe: for ``benchmarks/run.py``, and for 300 m.

    .venv/bin/python benchmarks/memory.py --shard 3600 --shards 1x1 2x2 4x4

makes stores and cubes in a temporary folder, trains, scores and draws each in a process of its own, and prints the peak memory of
each process beyond that of its libraries, with the estimate of ``ai4land plan``. One shard is made. The others are hard links to it:
each holds the same maps, mask and layers, and is read and decoded like any other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray

from ai4land.cube import cube, ledger
from ai4land.cube.numbers import FRACTION_EMPTY, FRACTION_SCALE
from ai4land.cube.writer import Writer
from ai4land.grid import COARSE_DIMS, Grid, Window, block_sum
from ai4land.legend import MISSING
from ai4land.places import folder_of
from ai4land.run.config import RunConfig
from ai4land.run.cost import PROCESS_BYTES, figures_memory, network_of, scoring_memory, training_memory
from ai4land.run.evaluate import evaluate, figures
from ai4land.run.inputs import Inputs, cubes_of
from ai4land.run.train import train
from ai4land.store.read import Source
from ai4land.store.shard import Layer
from ai4land.store.write import write_store

YEARS = (2000, 2001, 2002)
NUMBERS = 8
"""Static maps that are numbers; one more is categorical."""
CELL = 0.25
SEA = 0.0
"""Level of a smooth field up to which a cell is not mapped: 0 leaves half of the cells, -2 all of them."""
STAGES: dict[str, Callable[[RunConfig], object]] = {
    "training": train,
    "scoring": evaluate,
    "figures": lambda run: figures(run, json.loads((run.folder / "evaluation.json").read_text(encoding="utf-8"))),
}


def run_of(folder: Path, *, factor: int, shard: int, shards: tuple[int, int], steps: int, mix: int) -> RunConfig:
    """Configure a run on a grid of some rows and columns of shards."""
    height, width = (n * shard // factor * CELL for n in shards)
    numbers = [{"name": f"number{i}", "path": "x.tif"} for i in range(NUMBERS)]
    return RunConfig.model_validate(
        {
            "name": f"{shards[0]}x{shards[1]}",
            "runs": str(folder),
            "grid": {"bbox": [0, 40 - height, width, 40], "coarse_cell": CELL, "factor": factor, "shard": shard},
            "landcover": {"source": "maps/{year}.tif", "legend": "hildaplus"},
            "scenario": {"kind": "shares", "path": "shares.nc", "variable": "share"},
            "static": [*numbers, {"name": "zone", "path": "x.tif", "categorical": True}],
            "split": {
                "train": list(YEARS[:2]),
                "space": {"block": 2, "validation": 0.2, "test": 0, "buffer": 0},
                "test": {"reference": YEARS[1], "years": [YEARS[2]]},
            },
            "model": {"base": 4, "depth": 2},
            "train": {
                "steps": steps, "batch": 2, "patch": min(96, shard // 2), "mix": mix, "validation_batches": 1, "validate_every": steps,
            },
            "reconstruct": {"reference": YEARS[1], "years": [YEARS[2]], "workers": 1},
            "evaluate": {"boosting": 0},
        }
    )  # fmt: skip


def make_store(run: RunConfig, first: RunConfig) -> None:
    """Write the store of a run: that of ``first``, which has one shard, repeated over the grid."""
    grid, path = Inputs.of(run).grid, run.folder / "store.zarr"
    repeat(first.folder / "store.zarr", path, grid, ("mask", "static", "land_cover"))
    group: Any = zarr.open_group(path, mode="r+")
    coarse = np.tile(
        np.asarray(group["coarse"][...]), (1, 1, *(a // b for a, b in zip(grid.shape, (grid.shard,) * 2, strict=True)))
    )
    for name, values, dims in (
        *((n, v, (n,)) for n, v in grid.coords().items()),
        ("coarse", coarse, ("year", "state", *COARSE_DIMS)),
    ):
        chunks = (1, *values.shape[1:]) if name == "coarse" else values.shape
        made = group.create_array(
            name, shape=values.shape, dtype=values.dtype, chunks=chunks, dimension_names=dims, fill_value=np.nan, overwrite=True
        )
        made[...] = values
    group.attrs.update({"grid": grid.to_dict(), "identity": Inputs.of(run).identity})


def make_shard(run: RunConfig) -> None:
    """Write a store of one shard: smooth maps with some noise, mapped where a field exceeds :data:`SEA`."""
    grid, legend = Inputs.of(run).grid, Inputs.of(run).legend
    row, col = np.ogrid[: grid.shape[0], : grid.shape[1]]
    u, v = row * 2 * np.pi / grid.shard, col * 2 * np.pi / grid.shard
    noise = np.random.default_rng(0).random(grid.shape, dtype=np.float32)
    wave = (np.sin(7 * u) * np.cos(5 * v)).astype(np.float32)
    land = np.sin(u) * np.cos(v) + 0.3 * np.sin(9 * u) * np.sin(8 * v) > SEA
    maps = {}
    for year in YEARS:
        index = ((wave + 0.1 * noise + 0.01 * (year - YEARS[0]) + 1.1) / 2.4 * legend.n).astype(np.uint8)
        maps[year] = np.where(land, index, MISSING).astype(np.uint8)
    cells = np.maximum(block_sum(land.astype(np.float64), grid.factor), 1)
    shares = [[block_sum((m == k).astype(np.float64), grid.factor) / cells for k in range(legend.n)] for m in maps.values()]
    coords = grid.coords()
    axes = {"year": list(YEARS), "state": [str(c) for c in legend.codes], **{d: coords[d] for d in COARSE_DIMS}}
    layers = [Layer(f"number{i}", False, _cut(wave * (i + 1) + np.round(noise, 2))) for i in range(NUMBERS)]
    write_store(
        run.folder / "store.zarr",
        grid=grid,
        legend=legend,
        mask=_cut(land),
        maps={year: _cut(legend.decode(m)) for year, m in maps.items()},
        coarse=xr.DataArray(np.array(shares, dtype=np.float32), dims=tuple(axes), coords=axes),
        layers=[*layers, Layer("zone", True, _cut(np.round(2 * wave) + 3))],
        identity=Inputs.of(run).identity,
        progress=lambda _: None,
    )


def _cut(values: NDArray[Any]) -> Callable[[Window], NDArray[Any]]:
    return lambda w: values[w.slices]


def repeat(one: Path, many: Path, grid: Grid, names: Iterable[str]) -> None:
    """Copy a Zarr group of one shard, with the fine arrays of these names as wide as the grid and each shard a hard link to the first."""
    if one != many:
        subprocess.run(["cp", "-rl", "--no-target-directory", str(one), str(many)], check=True)
        for path in many.rglob("*.json"):  # metadata and coordinates must not be shared
            text = path.read_bytes()
            path.unlink()
            path.write_bytes(text)
    group: Any = zarr.open_group(many, mode="r+")
    for name in names:
        if one != many:
            group[name].resize((*group[name].shape[:-2], *grid.shape))
        for file in [p for p in (many / name / "c").rglob("0") if p.is_file() and p.parent.name == "0"]:
            for w in grid.shards():
                copy = file.parents[1] / str(w.row // grid.shard) / str(w.col // grid.shard)
                copy.parent.mkdir(exist_ok=True)
                if copy != file:
                    os.link(file, copy)


def make_cube(run: RunConfig) -> None:
    """Write the published cube: in each shard the reference map of the first one."""
    place, reference, years = cubes_of(run)["cube"]
    path, source = folder_of(place), Source(run.folder / "store.zarr")
    if path is None or reference is None:
        raise ValueError(f"cube is {place} from {reference}, expected a folder and a reference map")
    grid, first = source.grid, source.grid.shards()[0]
    cube.create(place, grid=grid, legend=source.legend, years=years, identity={}, title="t", source="s", totals="none")
    index = source.map_of(reference, first)[None]
    held = np.arange(source.legend.n, dtype=np.uint8)[None, :, None, None] == index[:, None]
    fraction = np.where(index[:, None] == MISSING, np.uint16(FRACTION_EMPTY), held * np.uint16(FRACTION_SCALE))
    sure, codes = np.where(index == MISSING, 255, 250).astype(np.uint8), source.legend.decode(index)
    arrays = {"land_cover": codes, "most_likely": codes, "confidence": sure, "change_probability": sure, "fraction": fraction}
    writer = Writer(place, first)
    for i, year in enumerate(years):
        writer.add(year, {name: data[i] for name, data in arrays.items()})
    repeat(path, path, grid, arrays)
    files = ledger.entries(place)[0]["files"]
    for w in grid.shards()[1:]:
        ledger.Book(place, row=w.row, col=w.col).enter(years=years, files=files)
    cube.show(place)


def peak() -> int:
    """Read the peak memory of this process in bytes (Linux only); that of ``getrusage`` includes the parent's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def measure(
    folder: Path, *, factor: int, shard: int, shapes: Iterable[tuple[int, int]], steps: int, mix: int
) -> Iterator[dict[str, float]]:
    """Measure each stage on each grid: yield rows with shards, cells, and by stage the bytes and (``…_plan``) the estimated bytes."""
    settings: dict[str, int] = {"factor": factor, "shard": shard, "steps": steps, "mix": mix}
    first = run_of(folder / "first", shards=(1, 1), **settings)
    make_shard(first)
    for shape in shapes:
        run = run_of(folder / "runs", shards=shape, **settings)
        run.folder.mkdir(parents=True)
        make_store(run, first)
        make_cube(run)
        (run.folder / "run.json").write_text(run.model_dump_json(), encoding="utf-8")
        row: dict[str, float] = {"shards": shape[0] * shape[1], "cells": shape[0] * shape[1] * shard**2}
        net = network_of(run)
        for stage in STAGES:
            command = [sys.executable, str(Path(__file__)), "--stage", stage, str(run.folder / "run.json")]
            row[stage] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        row["training_plan"] = training_memory(run, net, len(Inputs.of(run).split.training_years)).both - PROCESS_BYTES
        row["scoring_plan"], row["figures_plan"] = (f(run) - PROCESS_BYTES for f in (scoring_memory, figures_memory))
        yield row


def main() -> None:
    """Measure and print, or do one stage and print its peak memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", nargs=2, metavar=("STAGE", "RUN"), help="do a stage of a run; used by this script itself")
    parser.add_argument("--shard", type=int, default=720)
    parser.add_argument("--factor", type=int, default=90)
    parser.add_argument("--steps", type=int, default=16, help="training steps: 16 are one visit to --mix shards")
    parser.add_argument("--mix", type=int, default=1)
    parser.add_argument("--shards", nargs="+", default=["1x1", "2x2", "4x4"])
    given = parser.parse_args()
    if given.stage:
        stage, path = given.stage
        run = RunConfig.model_validate_json(Path(path).read_text(encoding="utf-8"))
        before = peak()
        STAGES[stage](run)
        print(peak() - before)
        return
    shapes = [(int(a), int(b)) for a, b in (s.split("x") for s in given.shards)]
    print("| shards | million cells |" + "".join(f" {s}, MiB | plan |" for s in STAGES))
    print("|---|---|" + "---|---|" * len(STAGES))
    settings: dict[str, Any] = {"factor": given.factor, "shard": given.shard, "steps": given.steps, "mix": given.mix}
    rows = []
    with tempfile.TemporaryDirectory(prefix="ai4land-memory-") as folder:
        for row in measure(Path(folder), shapes=shapes, **settings):
            parts = "".join(f" {row[s] / 2**20:.0f} | {row[f'{s}_plan'] / 2**20:.0f} |" for s in STAGES)
            print(f"| {row['shards']:.0f} | {row['cells'] / 1e6:.1f} |{parts}", flush=True)
            rows.append(row)
    print("last over first: " + ", ".join(f"{s} {rows[-1][s] / rows[0][s]:.2f}" for s in STAGES))


if __name__ == "__main__":
    main()
