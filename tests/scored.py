"""Runs with a store and a cube that can be scored."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from ai4land.cube import cube
from ai4land.cube.numbers import FRACTION_EMPTY, FRACTION_SCALE
from ai4land.model.checkpoint import Card, save_model
from ai4land.model.unet import UNet
from ai4land.reconstruct.plan import land_of, plan_blocks
from ai4land.run import inputs
from ai4land.run.config import RunConfig
from ai4land.store.read import Source, open_store
from ai4land.train.normalise import fit_spec
from tests.cubes import write_block

YEARS = [2000, 2001, 2002, 2003]


def run_in(folder: Path, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "name": "small",
        "title": "A small run",
        "runs": str(folder),
        "grid": {"bbox": [-180, -90, 180, 90], "coarse_cell": 22.5, "factor": 8, "shard": 32},
        "landcover": {"source": "maps/{year}.tif", "legend": "hildaplus"},
        "scenario": {"kind": "shares", "path": "s.nc", "variable": "v"},
        "static": [{"name": "height", "path": "h.tif"}, {"name": "zone", "path": "z.tif", "categorical": True}],
        "split": {
            "train": [2000],
            "max_lead": 0,
            "validation": {"reference": 2000, "years": 2001},
            "test": {"reference": 2001, "years": [2002, 2003]},
        },
        "model": {"base": 4, "depth": 2},
        "train": {"patch": 32, "steps": 10},
        "reconstruct": {"reference": 2001, "years": YEARS, "workers": 1},
        "evaluate": {"boosting": 0},
    }
    return RunConfig.model_validate({**values, **changes})


def prepare(run: RunConfig, store: Path) -> None:
    """Give a run a store, a split and an untrained model, as if they had been made for it."""
    shutil.copytree(store, run.folder / "store.zarr")
    zarr.open_group(run.folder / "store.zarr", mode="r+").attrs["identity"] = inputs.Inputs.of(run).identity
    split = inputs.Inputs.of(run).split
    split.save(run.folder / "splits.json")
    source, data = Source(store), open_store(store)
    spec = fit_spec(data, cells=split.roles == 0, pairs=split.pairs, codes=source.legend.codes.tolist(), factor=8)
    channels = {"static_channels": len(spec.static_names), "coarse_channels": len(spec.coarse_names)}
    model = UNet(**channels, classes=7, factor=8, base=4, depth=2)
    about = {"legend": source.legend, "spec": spec, "network": model.settings, "cell": (1.0, 1.0), "store": ""}
    save_model(run.folder, [model.state_dict()], Card(**about, weights="", split=split.hash, training={}))


def make_cube(run: RunConfig, name: str, *, observed: bool, keep: int | None = None) -> None:
    """Write a cube that holds the observed maps, or the reference map in every year."""
    path, reference, years = inputs.cubes_of(run)[name]
    source = Source(run.folder / "store.zarr")
    about = {"title": "t", "source": "s", "totals": "exact", "land": land_of(source)}
    cube.create(path, grid=source.grid, legend=source.legend, years=years, identity={}, **about)
    for block in plan_blocks(run.folder / "store.zarr", years=years, reference=reference)[:keep]:
        index = np.stack([source.map_of(y if observed else reference, block.window) for y in block.years])
        unit = FRACTION_SCALE * (np.arange(7)[None, :, None, None] == index[:, None])
        sure = np.where(index == 255, 255, 250).astype(np.uint8)
        codes = source.legend.decode(index)
        arrays = {"land_cover": codes, "most_likely": codes, "confidence": sure, "change_probability": sure}
        arrays["fraction"] = np.where(index[:, None] == 255, FRACTION_EMPTY, unit).astype(np.uint16)
        write_block(path, block, arrays)
    cube.show(path)
