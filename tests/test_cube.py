from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import xarray as xr
import zarr

from ai4land import cube
from ai4land.cube import EMPTY, FRACTION_SCALE, SCALE, VARIABLES, Block
from ai4land.errors import DataError, MismatchError
from ai4land.grid import Window, make_grid
from ai4land.legend import load_legend

GRID = make_grid((-180, -90, 180, 90), coarse_cell=45.0, factor=8, shard=16)
LEGEND = load_legend("hildaplus")
YEARS = [2000, 2001, 2005]


@pytest.fixture
def path(tmp_path):
    cube.create(
        tmp_path / "cube.zarr",
        grid=GRID,
        legend=LEGEND,
        years=YEARS,
        identity={"model": "a"},
        title="t",
        source="s",
        totals="exact",
    )
    return tmp_path / "cube.zarr"


def cells(block: Block, seed: int = 0):
    rng = np.random.default_rng(seed)
    shape = (len(block.years), block.window.height, block.window.width)
    index = rng.integers(0, LEGEND.n, shape).astype(np.uint8)
    fraction = np.zeros((shape[0], LEGEND.n, *shape[1:]), np.uint16)
    np.put_along_axis(fraction, index[:, None].astype(np.int64), FRACTION_SCALE, axis=1)
    sure = np.full(shape, SCALE, np.uint8)
    codes = LEGEND.decode(index)
    return {
        "land_cover": codes,
        "most_likely": codes[:, ::-1],
        "fraction": fraction,
        "confidence": sure,
        "change_probability": sure,
    }


def test_template_holds_metadata_alone_and_cf_attributes(path):
    assert not list(path.glob("land_cover/c/**/*"))
    group = zarr.open_group(path, mode="r")
    assert group.attrs["Conventions"] == "CF-1.11"
    ds = cube.open_cube(path)
    assert ds["land_cover"].dims == ("time", "latitude", "longitude")
    assert ds["fraction"].dims == ("time", "class", "latitude", "longitude")
    assert ds["land_cover"].dtype == np.uint8
    assert ds["land_cover"].attrs["flag_meanings"].split()[1:] == LEGEND.names
    assert list(ds["land_cover"].attrs["flag_values"]) == [0, *LEGEND.codes]
    assert len(ds["land_cover"].attrs["flag_colors"].split()) == LEGEND.n + 1
    assert ds["year"].dims == ("time",) and ds["year"].values.tolist() == YEARS
    assert [str(t)[:10] for t in ds["time"].values] == ["2000-07-02", "2001-07-02", "2005-07-02"]
    assert "spatial_ref" in ds.coords and "WGS 84" in ds["spatial_ref"].attrs["crs_wkt"]
    assert np.array_equal(ds["latitude"], GRID.coords()["latitude"])
    assert np.isnan(ds["fraction"].values).all() and (ds["land_cover"].values == LEGEND.fill.code).all()


def test_years_long_past_are_written_and_read(tmp_path):
    cube.create(
        tmp_path / "old.zarr", grid=GRID, legend=LEGEND, years=[850, 2100], identity={}, title="t", source="s", totals="exact"
    )
    ds = cube.open_cube(tmp_path / "old.zarr")
    assert ds["year"].values.tolist() == [850, 2100]
    assert [str(t)[:10] for t in ds["time"].values] == ["0850-07-02", "2100-07-02"]


def test_written_block_is_read_back_and_nothing_else_changes(path):
    block = Block(Window(16, 32, 16, 16), (2001, 2005))
    data = cells(block)
    digest = cube.write_block(path, block, data)
    ds = cube.open_cube(path).sel(time=slice("2001", "2005"))
    part = ds.isel(latitude=slice(16, 32), longitude=slice(32, 48))
    assert np.array_equal(part["land_cover"].values, data["land_cover"])
    assert np.allclose(part["fraction"].sum("class", skipna=False), 1, atol=1e-6)
    assert (ds["land_cover"].values != 0).sum() == (data["land_cover"] != 0).sum()
    assert (cube.open_cube(path)["land_cover"].isel(time=0).values == 0).all()
    assert digest == cube.write_block(path, block, data)
    assert digest != cube.write_block(path, block, cells(block, seed=1))
    files = [p for p in path.glob("land_cover/c/**/*") if p.is_file()]
    assert len(files) == 2


@pytest.mark.parametrize("window", [Window(8, 0, 16, 16), Window(0, 0, 16, 8), Window(0, 0, 32, 16)])
def test_only_whole_shards_are_written(path, window):
    block = Block(window, (2000,))
    with pytest.raises(ValueError, match="not a whole shard"):
        cube.write_block(path, block, cells(block))


def test_wrong_shapes_and_types_are_refused(path):
    block = Block(Window(0, 0, 16, 16), (2000,))
    data = cells(block)
    with pytest.raises(ValueError, match=r"fraction of block .* expected uint16"):
        cube.write_block(path, block, {**data, "fraction": data["fraction"][:, 1:]})
    with pytest.raises(ValueError, match="land_cover of block"):
        cube.write_block(path, block, {**data, "land_cover": data["land_cover"].astype(np.int16)})


def test_ledger_counts_what_is_recorded_and_ignores_a_torn_line(path):
    assert cube.recorded(path) == {}
    cube.record(path, Block(Window(0, 16, 16, 16), (2000, 2001)), "d1")
    cube.record(path, Block(Window(16, 0, 16, 16), (2005,)), "d2")
    assert cube.recorded(path) == {(0, 16, 2000): "d1", (0, 16, 2001): "d1", (16, 0, 2005): "d2"}
    file = next(cube.ledger_path(path).glob("*.jsonl"))
    file.write_text(file.read_text()[:-20])
    assert cube.recorded(path) == {(0, 16, 2000): "d1", (0, 16, 2001): "d1"}


def test_cube_of_another_configuration_is_refused_and_kept(path):
    arguments = {"grid": GRID, "legend": LEGEND, "years": YEARS, "title": "t", "source": "s", "totals": "exact"}
    block = Block(Window(0, 0, 16, 16), (2000,))
    cube.write_block(path, block, cells(block))
    before = (path / "zarr.json").read_bytes()
    cube.create(path, identity={"model": "a"}, **arguments)
    assert (path / "zarr.json").read_bytes() == before
    with pytest.raises(MismatchError, match=r"another configuration \(it differs in model\)"):
        cube.create(path, identity={"model": "b"}, **arguments)
    with pytest.raises(MismatchError, match="differs in years"):
        cube.create(path, identity={"model": "a"}, **{**arguments, "years": [2000]})
    assert (cube.open_cube(path)["land_cover"].values != 0).any()


def test_new_cube_does_not_inherit_an_old_ledger(path):
    cube.record(path, Block(Window(0, 0, 16, 16), (2000,)), "d")
    shutil.rmtree(path)
    cube.create(path, grid=GRID, legend=LEGEND, years=YEARS, identity={"model": "a"}, title="t", source="s", totals="exact")
    assert cube.recorded(path) == {}


def test_finished_cube_opens_with_consolidated_metadata(path):
    cube.finish(path)
    assert json.loads((path / "zarr.json").read_text())["consolidated_metadata"]
    assert set(xr.open_zarr(path, consolidated=True, decode_coords="all").data_vars) == set(VARIABLES)


def test_missing_cube_says_how_to_make_one(tmp_path):
    with pytest.raises(DataError, match="ai4land reconstruct"):
        cube.open_cube(tmp_path / "none.zarr")


def test_fill_value_marks_cells_that_are_not_mapped():
    assert EMPTY > SCALE
