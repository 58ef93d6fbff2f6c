from __future__ import annotations

import numpy as np
import pytest
import torch

from ai4land.legend import load_legend
from ai4land.model.forward import ready
from ai4land.run.practice import CODES, practice_grid, practice_network, save_practice_model, write_practice_store
from ai4land.store.read import open_store
from ai4land.train.normalise import fit_spec


@pytest.mark.parametrize("land", [1.0, 0.5])
def test_practice_store_is_a_store_like_any(tmp_path, land):
    grid, legend, years = practice_grid(factor=8, shard=64, shards=(1, 2)), load_legend("hildaplus"), (2000, 2001, 2002)
    path = tmp_path / "store.zarr"
    write_practice_store(path, grid=grid, legend=legend, years=years, numbers=2, zones=1, land=land)
    ds = open_store(path)
    mask = ds["mask"].values.astype(bool)
    assert mask.mean() == pytest.approx(land, abs=0.02)
    maps = ds["land_cover"].values
    moved = (maps[1] != maps[0])[mask].mean()
    assert 0 < moved < 0.1
    there = ds["coarse"].values.sum(axis=1)
    assert np.allclose(there[there > 0], 1, atol=1e-6)
    spec = fit_spec(ds, cells=np.ones(grid.coarse.shape, bool), pairs=((2000, 2001),), codes=legend.codes.tolist(), factor=8)
    assert len(spec.static_names) == 2 + CODES
    checksum = save_practice_model(tmp_path, [practice_network(spec, grid, base=4, depth=2)], grid=grid, legend=legend, spec=spec)
    assert ready(str(tmp_path), checksum, "float32")[1].spec == spec


def test_grid_of_many_cells_stays_on_the_globe():
    for factor, shard, shards in ((1, 720, (1, 1)), (30, 720, (1, 2)), (8, 64, (15, 30)), (90, 720, (1, 1))):
        grid = practice_grid(factor=factor, shard=shard, shards=shards)
        west, south, east, north = grid.bounds
        assert grid.shape == (shards[0] * shard, shards[1] * shard)
        assert -90 < south < north <= 48 and west == 0 and east < 180
        assert torch.isfinite(torch.tensor(grid.bounds)).all()
