from __future__ import annotations

from typing import Any

import numpy as np

from ai4land import inputs, stages
from ai4land.align import open_store
from ai4land.config import RunConfig
from ai4land.grid import FINE_DIMS

RUN: dict[str, Any] = {
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
    return RunConfig.model_validate({**RUN, **changes})


def test_class_counts_are_of_training_cells_alone(tiny_store):
    store = open_store(tiny_store.path)
    run = run_of(
        split={**RUN["split"], "train": [2000, 2001], "space": {"block": 2, "validation": 0.3, "test": 0.0, "buffer": 0}}
    )
    split = inputs.split_of(run, tiny_store.grid)
    counts = stages._class_counts(store, split, tiny_store.legend, tiny_store.grid)
    cells = np.repeat(np.repeat(split.roles == 0, 8, 0), 8, 1) & store["mask"].transpose(*FINE_DIMS).values.astype(bool)
    maps = store["land_cover"].sel(observed_year=[2000, 2001]).values[:, cells]
    assert counts.tolist() == [int((maps == code).sum()) for code in tiny_store.legend.codes]
    assert 0 < counts.sum() < 2 * store["mask"].values.sum()
