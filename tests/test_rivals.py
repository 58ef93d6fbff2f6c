from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

from ai4land import cube, inputs
from ai4land.grid import block_sum
from ai4land.legend import MISSING
from ai4land.predict import Source
from ai4land.rivals import RIVALS, Wanted, coarse_slices, rival_maps
from ai4land.splits import Scored
from tests.scored import make_cube, prepare, run_in

torch.set_num_threads(1)


@pytest.fixture
def run(tiny_store, tmp_path):
    split = {
        "train": [2000, 2001],
        "max_lead": 1,
        "validation": {"reference": 2000, "years": [2002]},
        "test": {"reference": 2001, "years": [2003]},
    }
    run = run_in(tmp_path, split=split, evaluate={"boosting": 3000})
    prepare(run, tiny_store.path)
    return run


def wanted_of(run, source, reference) -> Wanted:
    windows = [w for w in source.grid.shards() if np.asarray(source.mask[w.slices]).any()]
    return Wanted(run, source, reference, windows)


def test_rivals_with_a_reference_map_and_their_totals(run, tmp_path):
    source = Source(run.folder / "store.zarr")
    split = inputs.split_of(run, source.grid)
    wanted = wanted_of(run, source, 2001)
    made = rival_maps(run, source, Scored(2001, (2003,)), wanted, split, tmp_path)
    assert list(made) == [r for r in RIVALS if r != "nearest"]
    moved = dict.fromkeys(made, 0)
    for w, totals in wanted.parts.items():
        mask = np.asarray(source.mask[w.slices], bool)
        start = source.map_of(2001, w)
        for name, codes in made.items():
            index = source.legend.encode(codes(2003, w))
            assert np.array_equal(codes(2003, w), codes(2003, w)) and (index[~mask] == MISSING).all()
            moved[name] += int((index != start).sum())
            if name != "persistence":
                have = np.stack([block_sum(((index == k) & mask).astype(float), 8) for k in range(source.legend.n)])
                off = np.abs(have - np.maximum(totals.quotas(2003), 0)).max()
                assert off <= (name == "proportional"), name
    assert moved["persistence"] == 0 < moved["proportional"] and moved["gradient_boosting"] > 0


def test_without_a_reference_map_the_rivals_are_the_coarse_map_and_the_trees(run, tmp_path):
    source = Source(run.folder / "store.zarr")
    wanted = wanted_of(run, source, None)
    made = rival_maps(run, source, Scored(None, (2003,)), wanted, inputs.split_of(run, source.grid), tmp_path)
    assert set(made) == {"nearest", "gradient_boosting"}
    w, totals = next(iter(wanted.parts.items()))
    index = source.legend.encode(made["nearest"](2003, w))
    assert np.array_equal(index[::8, ::8], totals.scenario(2003).argmax(0)) and wanted.bias() is None


def test_check_tells_how_far_a_cube_is_from_the_totals(run):
    source = Source(run.folder / "store.zarr")
    wanted = wanted_of(run, source, 2001)
    make_cube(run, "cube", observed=False)
    data = cube.open_cube(run.folder / "cube.zarr")
    place = {int(y): i for i, y in enumerate(data["year"].values)}
    there, later = (wanted.check(data, place, [year]) for year in (2001, 2003))
    assert there["cells_off"] < 1 and there["fraction_error"] < 1e-6
    held, goal = wanted.shares(2001, by_cells=True), wanted.shares(2003, by_cells=True)
    cells = np.zeros(held.shape[1:])
    for w, totals in wanted.parts.items():
        cells[coarse_slices(w, 8)] = totals.cells
    assert later["cells_off"] == pytest.approx(np.nanmax(np.abs(goal - held) * cells))
    assert set(later["bias"]) == set(source.legend.names) and max(later["bias"].values()) > 0


def test_bias_is_the_map_less_the_scenario(run):
    source = Source(run.folder / "store.zarr")
    bias = wanted_of(run, source, 2001).bias()
    assert isinstance(bias, xr.Dataset) and bias["difference"].dims == ("class", "coarse_latitude", "coarse_longitude")
    assert np.allclose(bias["difference"], bias["map"] - bias["scenario"], equal_nan=True)
    assert np.isfinite(bias["difference"]).any()
