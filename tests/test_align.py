from __future__ import annotations

import dataclasses
import socket
import subprocess

import numpy as np
import pytest
import xarray as xr
import zarr
from conftest import write_tiny_store
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ai4land.align import Layer, check_identity, open_store, write_store
from ai4land.errors import DataError, MismatchError
from ai4land.grid import COARSE_DIMS, FINE_DIMS, Grid, make_grid
from ai4land.legend import load_legend
from ai4land.template import chunk_side

YEARS = [2001, 2003]
LEGEND = load_legend("hildaplus")
STATES = ["primf", "urban"]


def field(grid: Grid, values) -> xr.DataArray:
    coords = {d: grid.coords()[d] for d in FINE_DIMS}
    return xr.DataArray(np.asarray(values, dtype=np.float32), dims=FINE_DIMS, coords=coords)


def parts(*, shard: int = 16, height=None) -> dict:
    """What a small global store (32 x 64 cells, 8 x 16 coarse cells) is written from."""
    grid = make_grid((-180, -90, 180, 90), coarse_cell=22.5, factor=4, shard=shard)
    rng = np.random.default_rng(0)
    mask = np.zeros(grid.shape, bool)
    mask[4:20, 10:50] = True
    maps = [(y, np.where(mask, rng.choice(LEGEND.codes, grid.shape), 0).astype(np.uint8)) for y in YEARS]
    height = rng.normal(size=grid.shape) if height is None else height
    coords = {d: grid.coords()[d] for d in COARSE_DIMS}
    coarse = xr.DataArray(
        rng.random((3, 2, *grid.coarse.shape)).astype(np.float32),
        dims=("year", "state", *COARSE_DIMS),
        coords={"year": [2000, 2001, 2003], "state": STATES, **coords},
    )
    layers = [Layer("height", False, lambda: field(grid, height)), Layer("zone", True, lambda: field(grid, mask + 1))]
    given = {"grid": grid, "legend": LEGEND, "mask": mask, "maps": maps, "observed_years": YEARS, "coarse": coarse}
    return {**given, "layers": layers, "identity": {"grid": "a", "static": "b"}}


@pytest.mark.parametrize("shard", [8, 16, 32])
def test_fine_arrays_are_sharded_like_the_grid(tmp_path, shard):
    made = parts(shard=shard)
    write_store(tmp_path / "s.zarr", **made)
    group = zarr.open_group(tmp_path / "s.zarr", mode="r")
    assert group.metadata.zarr_format == 3
    side = chunk_side(made["grid"])
    expected = {"mask": ((), ()), "static": ((2,), (2,)), "land_cover": ((1,), (1,))}
    for name, (chunks, shards) in expected.items():
        assert group[name].chunks == (*chunks, side, side) and group[name].shards == (*shards, shard, shard)
    assert group["mask"].dtype == np.uint8 and group["land_cover"].fill_value == 0


def test_store_holds_what_it_was_given(tmp_path):
    made = parts()
    lines: list[str] = []
    write_store(tmp_path / "s.zarr", **made, progress=lines.append)
    store, grid = open_store(tmp_path / "s.zarr"), made["grid"]
    for name, values in grid.coords().items():
        assert np.array_equal(store[name].values, values)
    assert Grid.from_dict(store.attrs["grid"]) == grid
    assert store["mask"].values.astype(bool).tolist() == made["mask"].tolist()
    for year, codes in made["maps"]:
        assert np.array_equal(store["land_cover"].sel(observed_year=year).values, codes)
    assert store["feature"].values.tolist() == ["height", "zone"] and store["categorical"].values.tolist() == [False, True]
    assert np.array_equal(store["static"][0].values, made["layers"][0].read().values)
    assert len(lines) == 1 + 2 + len(YEARS)


def test_coarse_states_stay_coarse(tmp_path):
    made = parts()
    write_store(tmp_path / "s.zarr", **made)
    coarse, grid = open_store(tmp_path / "s.zarr")["coarse"], made["grid"]
    assert coarse.dims == ("year", "state", *COARSE_DIMS) and coarse.shape[2:] == grid.coarse.shape
    xr.testing.assert_identical(coarse.drop_attrs().rename(None), made["coarse"])


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_gaps_are_filled_inside_the_mask_alone(tmp_path, data):
    cells = st.tuples(st.integers(0, 31), st.integers(0, 63))
    gaps = data.draw(st.lists(cells, min_size=1, max_size=40))
    bad = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    height = np.arange(32 * 64, dtype=np.float32).reshape(32, 64)
    whole = height.copy()
    for row, col in gaps:
        height[row, col] = bad
    made = parts(height=height)
    write_store(tmp_path / "s.zarr", **made)
    stored, mask = open_store(tmp_path / "s.zarr")["static"][0].values, made["mask"]
    kept = np.isfinite(height)
    assert np.isfinite(stored[mask]).all()
    assert np.array_equal(stored[kept], whole[kept])
    assert np.array_equal(stored[~mask & ~kept], height[~mask & ~kept], equal_nan=True)
    assert np.isin(stored[mask & ~kept], whole[kept]).all()


def test_layer_without_a_value_on_the_mask_leaves_no_store(tmp_path):
    made = parts()
    height = np.where(made["mask"], np.nan, 1.0)
    with pytest.raises(DataError, match="static layer height is all nodata on the mapped cells"):
        write_store(tmp_path / "s.zarr", **parts(height=height))
    assert not list(tmp_path.iterdir())


def test_maps_in_the_wrong_order_leave_no_store(tmp_path):
    made = parts()
    with pytest.raises(DataError, match="maps come with year 2003, expected 2001"):
        write_store(tmp_path / "s.zarr", **{**made, "maps": made["maps"][::-1]})
    assert not list(tmp_path.iterdir())


def test_lacking_map_leaves_no_store(tmp_path):
    made = parts()
    with pytest.raises(ValueError, match="zip"):
        write_store(tmp_path / "s.zarr", **{**made, "maps": made["maps"][:1]})
    assert not list(tmp_path.iterdir())


def test_map_without_land_leaves_no_store(tmp_path):
    made = parts()
    maps = [made["maps"][0], (2003, np.where(made["mask"], 0, 11).astype(np.uint8))]
    with pytest.raises(DataError, match="map of 2003 has no class on any mapped cell"):
        write_store(tmp_path / "s.zarr", **{**made, "maps": maps})
    assert not list(tmp_path.iterdir())


def test_failed_writing_keeps_the_old_store(tmp_path):
    made = parts()
    write_store(tmp_path / "s.zarr", **made)
    with pytest.raises(DataError):
        write_store(tmp_path / "s.zarr", **{**made, "maps": made["maps"][::-1], "identity": {}})
    assert [p.name for p in tmp_path.iterdir()] == ["s.zarr"] and check_identity(tmp_path / "s.zarr", made["identity"])


def test_writing_again_replaces_the_store(tmp_path):
    made = parts()
    write_store(tmp_path / "s.zarr", **made)
    layers = [dataclasses.replace(made["layers"][1], name="only")]
    write_store(tmp_path / "s.zarr", **{**made, "layers": layers, "identity": {"static": "c"}})
    assert open_store(tmp_path / "s.zarr")["feature"].values.tolist() == ["only"]
    assert [p.name for p in tmp_path.iterdir()] == ["s.zarr"]


def test_identity_tells_what_differs(tmp_path):
    made = parts()
    assert check_identity(tmp_path / "s.zarr", made["identity"]) is False
    write_store(tmp_path / "s.zarr", **made)
    assert check_identity(tmp_path / "s.zarr", {"static": "b", "grid": "a"}) is True
    with pytest.raises(MismatchError, match=r"differs in extra, static\)"):
        check_identity(tmp_path / "s.zarr", {"grid": "a", "static": "x", "extra": 1})


def test_absent_store_is_named(tmp_path):
    with pytest.raises(DataError, match="no analysis-ready store at"):
        open_store(tmp_path / "none.zarr")


def test_what_a_killed_process_left_is_removed(tmp_path):
    dead, alive = subprocess.Popen(["true"]), subprocess.Popen(["sleep", "60"])
    dead.wait()
    try:
        host = socket.gethostname()
        left = {n: tmp_path / f".store.zarr.{n}.part" for n in (f"{host}.{dead.pid}", f"{host}.{alive.pid}", f"else.{dead.pid}")}
        for folder in left.values():
            (folder / "static").mkdir(parents=True)
        write_tiny_store(tmp_path / "store.zarr")
        assert [folder.exists() for folder in left.values()] == [False, True, True]
        assert len(list(tmp_path.glob(".*.part"))) == 2
    finally:
        alive.kill()
        alive.wait()
