from __future__ import annotations

import numpy as np
import pytest
import torch

from ai4land.grid import Window, block_sum
from ai4land.legend import MISSING
from ai4land.run import inputs
from ai4land.run.rivals import RIVALS, Wanted, mean_bias, rival_maps
from ai4land.store.read import Source
from ai4land.train.splits import Scored
from tests.scored import prepare, run_in

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


def land_of(source) -> list[Window]:
    return [w for w in source.grid.shards() if np.asarray(source.mask[w.slices]).any()]


def test_rivals_with_a_reference_map_and_their_totals(run):
    source = Source(run.folder / "store.zarr")
    split = inputs.Inputs.of(run).split
    wanted = Wanted(run, source, 2001)
    made = rival_maps(run, source, Scored(2001, (2003,)), wanted, split)
    assert list(made) == [r for r in RIVALS if r != "nearest"]
    moved = dict.fromkeys(made, 0)
    for w in land_of(source):
        totals = wanted.of(w)
        mask = np.asarray(source.mask[w.slices], bool)
        start = source.map_of(2001, w)
        for name, codes in made.items():
            index = codes(2003, w)
            assert np.array_equal(index, codes(2003, w)) and (index[~mask] == MISSING).all()
            moved[name] += int((index != start).sum())
            if name != "persistence":
                have = np.stack([block_sum(((index == k) & mask).astype(float), 8) for k in range(source.legend.n)])
                off = np.abs(have - np.maximum(totals.quotas(2003), 0)).max()
                assert off <= (name == "proportional"), name
    assert moved["persistence"] == 0 < moved["proportional"] and moved["gradient_boosting"] > 0


def test_without_a_reference_map_the_rivals_are_the_coarse_map_and_the_trees(run):
    source = Source(run.folder / "store.zarr")
    wanted = Wanted(run, source, None)
    made = rival_maps(run, source, Scored(None, (2003,)), wanted, inputs.Inputs.of(run).split)
    assert set(made) == {"nearest", "gradient_boosting"}
    w = land_of(source)[0]
    assert np.array_equal(made["nearest"](2003, w)[::8, ::8], wanted.of(w).scenario(2003).argmax(0))


def test_check_tells_how_far_a_cube_is_from_the_totals(run):
    source = Source(run.folder / "store.zarr")
    wanted = Wanted(run, source, 2001)

    def check(year):
        def fraction(_, k, w):
            index = source.map_of(2001, w)
            return np.where(index == MISSING, np.nan, index == k).astype(np.float32)

        return wanted.check(lambda _, w: source.map_of(2001, w), fraction, [year], land_of(source))

    there, later = check(2001), check(2003)
    assert there["cells_off"] < 1 and there["fraction_error"] < 1e-6
    off = 0.0
    for w in land_of(source):
        totals = wanted.of(w)
        off = max(off, np.nanmax(np.abs(totals.shares(2003, by_cells=True) - totals.reference_shares[True]) * totals.cells))
    assert later["cells_off"] == pytest.approx(off) and later["fraction_error"] > 0


def test_bias_is_the_map_less_the_scenario(run):
    source = Source(run.folder / "store.zarr")
    bias = Wanted(run, source, 2001).bias(land_of(source))
    assert bias["difference"].dims == ("class", "coarse_latitude", "coarse_longitude")
    assert np.allclose(bias["difference"], bias["map"] - bias["scenario"], equal_nan=True)
    known = np.isfinite(bias["difference"].values).all(axis=0)
    got = mean_bias(bias, source.legend.names)
    assert known.any() and list(got) == source.legend.names and max(got.values()) > 0
    assert list(got.values()) == pytest.approx([np.abs(d[known]).mean() for d in bias["difference"].values])
