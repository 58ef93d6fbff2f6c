from __future__ import annotations

import numpy as np

from ai4land.grid import FINE_DIMS
from ai4land.run import inputs
from ai4land.run import train as training
from ai4land.store.read import open_store
from tests.runs import SMALL, run_of


def test_class_counts_are_of_training_cells_alone(tiny_store):
    store = open_store(tiny_store.path)
    run = run_of(
        split={**SMALL["split"], "train": [2000, 2001], "space": {"block": 2, "validation": 0.3, "test": 0.0, "buffer": 0}}
    )
    split = inputs.Inputs.of(run).split
    counts = training._class_counts(store, split, tiny_store.legend, tiny_store.grid)
    cells = np.repeat(np.repeat(split.roles == 0, 8, 0), 8, 1) & store["mask"].transpose(*FINE_DIMS).values.astype(bool)
    maps = store["land_cover"].sel(observed_year=[2000, 2001]).values[:, cells]
    assert counts.tolist() == [int((maps == code).sum()) for code in tiny_store.legend.codes]
    assert 0 < counts.sum() < 2 * store["mask"].values.sum()
