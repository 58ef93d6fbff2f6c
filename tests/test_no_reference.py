"""A run without a reference map, end to end on a tiny planet: held out in space, in years that training sees elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import yaml

from ai4land.cube import cube
from ai4land.run.file import load_run
from ai4land.store.read import open_store
from ai4land.synthetic.planet import make_planet
from ai4land.train.splits import TEST, TRAIN, load_split

STAC = {"catalog": "catalog/catalog.json"}
RUN: dict[str, Any] = {
    "name": "alone",
    "grid": {"bbox": [-180, -90, 180, 90], "coarse_cell": 15.0, "factor": 8, "shard": 96},
    "landcover": {"source": "landcover/HILDAplus_{year}.tif", "legend": "hildaplus"},
    "scenario": {"kind": "luh2", "paths": ["luh2/states.nc"], "static": "luh2/staticData_quarterdeg.nc"},
    "static": [
        {"name": "latitude", "coordinate": "latitude"},
        {"name": "elevation", **STAC, "collection": "terrain", "asset": "elevation"},
        {"name": "temperature", **STAC, "collection": "climate", "asset": "temperature"},
    ],
    "split": {
        "train": [2000, 2001],
        "max_lead": 0,
        "validation": {"reference": None, "years": 2001},
        "test": {"reference": None, "years": [2001, 2002]},
        "space": {"block": 2, "validation": 0.2, "test": 0.3, "buffer": 0},
    },
    "model": {"base": 6, "depth": 2, "coarse_features": 6},
    "train": {
        "steps": 30,
        "batch": 4,
        "patch": 32,
        "learning_rate": 0.02,
        "ema": 0.9,
        "mask_all": 1.0,
        "mask_some": 0.0,
        "warmup": 4,
        "validate_every": 15,
        "validation_batches": 2,
        "precision": "float32",
        "threads": 1,
    },
    "reconstruct": {"reference": None, "years": [2000, 2001, 2002], "workers": 1, "threads": 1},
}


def run_in(folder: Path, planet: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({**RUN, "data": str(planet), "runs": str(folder / "runs")}))
    return file


def ai4land(command: str, file: Path) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    args = [sys.executable, "-m", "ai4land.cli", command, str(file)]
    done = subprocess.run(args, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def planet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_planet(tmp_path_factory.mktemp("planet") / "p", coarse_cell=15.0, factor=8, years=range(2000, 2003)).folder


@pytest.fixture(scope="module")
def finished(planet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = run_in(tmp_path_factory.mktemp("alone"), planet)
    assert "without a reference map" in ai4land("run", file)
    return file


def test_map_is_made_and_scored_without_a_reference_map(finished):
    run = load_run(finished)
    scores = json.loads((run.folder / "evaluation.json").read_text())
    assert scores["test"]["years"] == [2001, 2002] and scores["validation"]["years"] == [2001]
    assert 0 < scores["test"]["model"]["mean_iou"] < scores["test"]["model"]["overall_accuracy"] < 1
    assert "persistence" not in scores["test"]
    split, store = load_split(run.folder / "splits.json"), open_store(run.folder / "store.zarr")
    assert split.test is not None and split.test.reference is None
    ds = cube.open_cube(run.folder / "cube.zarr").swap_dims(time="year")
    guess, truth = (ds["land_cover"].sel(year=2002).values, store["land_cover"].sel(observed_year=2002).values)
    assert ((guess != 0) == (store["mask"].values != 0)).all()
    first = store["land_cover"].sel(observed_year=2000).values
    assert ((first != 0) == (store["mask"].values != 0)).all()
    # The model knows something: it beats the most frequent class of the training cells.
    fine = np.kron(split.roles, np.ones((8, 8), int))
    seen = first[(fine == TRAIN) & (first != 0)]
    held = (fine == TEST) & (truth != 0)
    assert (guess == truth)[held].mean() > (truth[held] == np.bincount(seen).argmax()).mean()


def test_no_held_out_cell_and_no_test_year_reaches_training(finished, planet, tmp_path):
    whole = load_run(finished).folder
    fine = np.kron(load_split(whole / "splits.json").roles, np.ones((8, 8), int))
    spoiled = tmp_path / "planet"
    shutil.copytree(planet, spoiled)
    rng = np.random.default_rng(0)
    for year in (2000, 2001, 2002):
        with rasterio.open(spoiled / "landcover" / f"HILDAplus_{year}.tif", "r+") as raster:
            codes = raster.read(1)
            where = (codes != 0) & ((fine == TEST) | (year == 2002))
            assert where.sum() > 100
            codes[where] = rng.choice(np.array([11, 22, 33, 44, 55, 66, 77], np.uint8), int(where.sum()))
            raster.write(codes, 1)
    file = run_in(tmp_path, spoiled)
    ai4land("train", file)
    folder = load_run(file).folder
    maps = [open_store(f / "store.zarr")["land_cover"].values for f in (folder, whole)]
    assert (maps[0] != maps[1]).mean() > 0.05
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
