"""Run files, and the command line in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ai4land.cube.cube import Block
from ai4land.reconstruct.plan import plan_blocks
from ai4land.run.config import RunConfig
from ai4land.run.file import load_run

STEPS, CHECKPOINT = 45, 20
STAC = {"catalog": "catalog/catalog.json"}
RUN: dict[str, Any] = {
    "name": "tiny",
    "title": "Land cover of a tiny planet",
    "grid": {"bbox": [-180, -90, 180, 90], "coarse_cell": 15.0, "factor": 8, "shard": 48},
    "landcover": {"source": "landcover/HILDAplus_{year}.tif", "legend": "hildaplus"},
    "scenario": {
        "kind": "luh2",
        "paths": ["luh2/states.nc"],
        "static": "luh2/staticData_quarterdeg.nc",
        "crosswalk": "luh2_to_hildaplus",
    },
    "static": [
        {"name": "elevation", **STAC, "collection": "terrain", "asset": "elevation"},
        {"name": "temperature", **STAC, "collection": "climate", "asset": "temperature"},
        {"name": "climate_zone", **STAC, "collection": "climate", "asset": "climate_zone", "categorical": True},
        {"name": "soil_depth", "path": "static/soil_depth.tif"},
    ],
    "split": {
        "train": "2000-2003",
        "max_lead": 3,
        "validation": {"reference": 2003, "years": 2004},
        "test": {"reference": 2004, "years": "2005-2007"},
    },
    "model": {"base": 6, "depth": 2, "coarse_features": 6},
    "train": {
        "members": 2,
        "steps": STEPS,
        "batch": 4,
        "patch": 32,
        "learning_rate": 0.02,
        "ema": 0.9,
        "change_weight": 1000.0,
        "class_balance": 1.0,
        "seed": 2,
        "warmup": 4,
        "validate_every": 15,
        "validation_batches": 2,
        "checkpoint_every": CHECKPOINT,
        "precision": "float32",
        "threads": 1,
    },
    "reconstruct": {"reference": 2004, "years": "2003-2007", "years_a_shard": 2, "workers": 1, "threads": 1},
}


def write_run(folder: Path, planet: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({**RUN, "data": str(planet), "runs": str(folder / "runs"), **changes}, sort_keys=False))
    return file


def command(*args: str | Path) -> dict[str, Any]:
    """The command line in a process of its own, on one thread and without a GPU, so that its bytes can be compared."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {"args": [sys.executable, "-m", "ai4land.cli", *map(str, args)], "env": env}


def ai4land(*args: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(**command(*args), capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    return done


def contents(folder: Path, pattern: str = "**/*") -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.glob(pattern) if p.is_file()}


SMALL: dict[str, Any] = {
    "name": "small",
    "grid": {"bbox": [-180, -90, 180, 90], "coarse_cell": 22.5, "factor": 8, "shard": 32},
    "landcover": {"source": "maps/{year}.tif", "legend": "hildaplus"},
    "scenario": {"kind": "luh2", "paths": ["states.nc"]},
    "static": [{"name": "height", "path": "height.tif"}],
    "split": {
        "train": "2000-2002",
        "validation": {"reference": 2002, "years": 2003},
        "test": {"reference": 2003, "years": [2005, 2006]},
    },
    "train": {"patch": 32},
    "reconstruct": {"reference": 2003, "years": "2004-2007"},
}


def run_of(**changes: Any) -> RunConfig:
    return RunConfig.model_validate({**SMALL, **changes})


TINY_YEARS = range(2000, 2008)
TINY = {
    "grid": {**RUN["grid"], "shard": 24},
    "split": {"train": "2000-2003", "max_lead": 3, "space": {"block": 2, "validation": 0.2}},
    "train": {**RUN["train"], "members": 1, "patch": 24, "steps": 10, "validate_every": 5, "checkpoint_every": 5},
    "reconstruct": {"reference": 2004, "years": "2000-2007", "years_a_shard": 2, "workers": 2, "threads": 1, "at_once": 1},
    "evaluate": {"boosting": 0},
}


def folder_of(file: Path) -> Path:
    return load_run(file).folder


def blocks_of(file: Path) -> list[Block]:
    return plan_blocks(folder_of(file) / "store.zarr", years=TINY_YEARS, reference=2004, years_a_shard=2)


HOLDER = "import sys, time, pathlib\nfrom ai4land.run.hold import hold\nwith hold(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)"


@contextmanager
def another_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a folder until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
