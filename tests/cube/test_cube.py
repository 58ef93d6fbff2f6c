from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import xarray as xr
import zarr

from ai4land.cube import cube, ledger
from ai4land.cube.cube import Block
from ai4land.cube.numbers import EMPTY, SCALE
from ai4land.cube.overviews import reduce_classes
from ai4land.cube.template import VARIABLES, make_template
from ai4land.cube.writer import Writer
from ai4land.errors import DataError, MismatchError
from ai4land.grid import Window, make_grid
from ai4land.legend import MISSING
from tests.cubes import ABOUT, GRID, LEGEND, PAIRS, YEARS, cells, fill, write_block


@pytest.fixture
def path(tmp_path):
    cube.create(tmp_path / "cube.zarr", identity={"model": "a"}, **ABOUT)
    return tmp_path / "cube.zarr"


def whole(path):
    """Open all of a cube's years, whole or not."""
    copy = path.with_name("all.zarr")
    shutil.copytree(path, copy, dirs_exist_ok=True)
    for name, document in cube.public_documents(cube.template_of(path), len(YEARS)).items():
        (copy / name / "zarr.json").write_bytes(cube.encode(document))
    return cube.open_cube(copy)


def test_template_holds_metadata_alone_and_cf_attributes(path):
    assert not list(path.glob("land_cover/c/**/*"))
    group = zarr.open_group(path, mode="r")
    assert group.attrs["Conventions"] == "CF-1.11"
    assert "created by ai4land" in group.attrs["history"] and group.attrs["history"].endswith("SHA-256 a")
    ds = whole(path)
    assert ds["land_cover"].dims == ("time", "latitude", "longitude")
    assert ds["fraction"].dims == ("time", "class", "latitude", "longitude")
    assert ds["land_cover"].dtype == np.uint8
    assert ds["land_cover"].attrs["flag_meanings"].split()[1:] == LEGEND.names
    assert list(ds["land_cover"].attrs["flag_values"]) == [0, *LEGEND.codes]
    assert len(ds["land_cover"].attrs["flag_colors"].split()) == LEGEND.n + 1
    assert ds["year"].dims == ("time",) and ds["year"].values.tolist() == YEARS
    assert [str(t)[:10] for t in ds["time"].values[:3]] == ["2000-07-02", "2001-07-02", "2005-07-02"]
    assert "spatial_ref" in ds.coords and "WGS 84" in ds["spatial_ref"].attrs["crs_wkt"]
    assert np.array_equal(ds["latitude"], GRID.coords()["latitude"])
    assert np.isnan(ds["fraction"].values).all() and (ds["land_cover"].values == LEGEND.fill.code).all()


def test_years_long_past_are_written_and_read(tmp_path):
    cube.create(tmp_path / "old.zarr", **{**ABOUT, "years": [850, 2100], "land": []}, identity={})
    cube.show(tmp_path / "old.zarr")
    ds = cube.open_cube(tmp_path / "old.zarr")
    assert ds["year"].values.tolist() == [850, 2100]
    assert [str(t)[:10] for t in ds["time"].values] == ["0850-07-02", "2100-07-02"]


def test_written_block_is_read_back_and_nothing_else_changes(path):
    block = Block(Window(16, 32, 16, 16), (2000, 2001, 2005, 2006))
    data = cells(block)
    write_block(path, block, data)
    ds = whole(path)
    part = ds.isel(latitude=slice(16, 32), longitude=slice(32, 48), time=slice(4))
    assert np.array_equal(part["land_cover"].values, data["land_cover"])
    assert np.array_equal(part["most_likely"].values, data["most_likely"])
    assert np.allclose(part["fraction"].sum("class", skipna=False), 1, atol=1e-6)
    assert (ds["land_cover"].values != 0).sum() == (data["land_cover"] != 0).sum()
    assert (ds["land_cover"].isel(time=4).values == 0).all()
    digests = ledger.recorded(path)
    assert set(digests) == {(16, 32, year) for year in block.years}
    write_block(path, block, data)
    assert ledger.recorded(path) == digests
    write_block(path, block, cells(block, seed=1))
    assert ledger.recorded(path) != digests
    files = {name: len([p for p in path.glob(f"{name}/c/**/*") if p.is_file()]) for name in VARIABLES}
    assert files == dict.fromkeys(VARIABLES, 1) | {"fraction": 2}


def test_a_shard_is_recorded_when_all_its_years_are_there_in_any_order(path):
    block = Block(Window(0, 0, 16, 16), tuple(YEARS))
    data = cells(block)
    writer = Writer(path, block.window)
    for i in (3, 1, 4, 0):
        writer.add(YEARS[i], {name: a[i] for name, a in data.items()}, {"residual": i})
        assert {y for *_, y in ledger.recorded(path)} == ({2007} if i in (4, 0) else set())
    writer.add(2005, {name: a[2] for name, a in data.items()})
    assert {y for *_, y in ledger.recorded(path)} == set(YEARS)
    notes = {n["year"]: n.get("residual") for e in ledger.entries(path) for n in e["notes"]}
    assert notes == {2000: 0, 2001: 1, 2005: None, 2006: 3, 2007: 4}
    ds = whole(path).isel(latitude=slice(0, 16), longitude=slice(0, 16))
    assert np.array_equal(ds["land_cover"].values, data["land_cover"])


@pytest.mark.parametrize("window", [Window(8, 0, 16, 16), Window(0, 0, 16, 8), Window(0, 0, 32, 16)])
def test_only_whole_shards_are_written(path, window):
    block = Block(window, (2000,))
    with pytest.raises(ValueError, match="not a whole shard"):
        write_block(path, block, cells(block))


def test_wrong_shapes_and_types_are_refused(path):
    block = Block(Window(0, 0, 16, 16), (2000,))
    data = cells(block)
    with pytest.raises(ValueError, match=r"fraction of block .* expected uint16"):
        write_block(path, block, {**data, "fraction": data["fraction"][:, 1:]})
    with pytest.raises(ValueError, match="land_cover of block"):
        write_block(path, block, {**data, "land_cover": data["land_cover"].astype(np.int16)})


def test_cube_of_another_configuration_is_refused_and_kept(path):
    fill(path, PAIRS)
    before = {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()}
    cube.create(path, identity={"model": "a"}, **ABOUT)
    with pytest.raises(MismatchError, match=r"another configuration \(it differs in model\)"):
        cube.create(path, identity={"model": "b"}, **ABOUT)
    with pytest.raises(MismatchError, match="differs in years"):
        cube.create(path, identity={"model": "a"}, **{**ABOUT, "years": [2000]})
    assert {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()} == before


def test_new_cube_does_not_inherit_an_old_ledger(path):
    fill(path, PAIRS)
    shutil.rmtree(path)
    cube.create(path, identity={"model": "a"}, **ABOUT)
    assert ledger.recorded(path) == {} and cube.show(path) == []


@pytest.mark.parametrize("damage", ["template", "metadata", "both torn"])
def test_damaged_metadata_cost_no_shard(path, damage):
    fill(path, PAIRS)
    done = ledger.recorded(path)
    before = (path / "zarr.json").read_bytes()
    if damage != "metadata":
        file = ledger.ledger_path(path) / "template.json"
        file.write_bytes(file.read_bytes()[:-9])
    if damage != "template":
        (path / "zarr.json").write_bytes(before[:-9] if damage == "both torn" else b"")
    if damage == "both torn":
        with pytest.raises(MismatchError, match="neither its metadata nor its ledger"):
            cube.create(path, identity={"model": "a"}, **ABOUT)
    else:
        cube.create(path, identity={"model": "a"}, **ABOUT)
        assert (path / "zarr.json").read_bytes() == before
    assert ledger.recorded(path) == done and done


# -- what is to be seen -------------------------------------------------------------------------------------------------


def test_years_are_seen_when_they_are_whole(tmp_path):
    path = tmp_path / "cube.zarr"
    cube.create(path, identity={}, land=PAIRS, **ABOUT)

    def seen():
        assert cube.show(path) == cube.open_cube(path)["year"].values.tolist()
        one = xr.open_zarr(
            path, consolidated=False, decode_times=False, chunks=None
        )  # a reader that takes each array's own metadata
        assert one["year"].values.tolist() == cube.open_cube(path)["year"].values.tolist()
        return one["year"].values.tolist()

    assert seen() == []
    fill(path, PAIRS[:1])
    assert seen() == []
    fill(path, PAIRS[1:], YEARS[4:])
    assert seen() == []  # 2007 is whole, but not those before it
    fill(path, PAIRS[1:], YEARS[:4])
    assert seen() == YEARS
    ledger.strike(path, [(0, 0, 2007)])
    assert seen() == YEARS[:4]
    assert cube.open_cube(path)["land_cover"].shape == (4, *GRID.shape)


def test_a_cube_opens_with_consolidated_metadata_that_zarr_itself_would_write(path):
    cube.show(path)
    ours = json.loads((path / "zarr.json").read_text())["consolidated_metadata"]["metadata"]
    zarr.consolidate_metadata(path)
    theirs = json.loads((path / "zarr.json").read_text())["consolidated_metadata"]["metadata"]
    assert ours == theirs
    assert set(xr.open_zarr(path, consolidated=True, decode_coords="all").data_vars) == set(VARIABLES)


def test_parts_of_a_cube_are_seen_from_its_root(tmp_path):
    root = tmp_path / "world.zarr"
    for name, years in (("historical", [1999, 2000]), ("ssp126", [2001, 2002, 2003])):
        cube.create(root / name, identity={"model": name}, land=PAIRS, **{**ABOUT, "years": years})
        fill(root / name, PAIRS, years, seed=len(name))
        cube.show(root / name)
    assert [p.name for p in tmp_path.iterdir()] == ["world.zarr", "world.ledger"] or len(list(tmp_path.iterdir())) == 2
    tree = xr.open_datatree(root, engine="zarr", chunks=None)
    assert set(tree.children) == {"historical", "ssp126"}
    for name, years in (("historical", [1999, 2000]), ("ssp126", [2001, 2002, 2003])):
        assert tree[name]["year"].values.tolist() == years
        assert xr.open_zarr(root, group=name, consolidated=True)["land_cover"].equals(xr.open_zarr(root / name)["land_cover"])
    with pytest.raises(DataError, match=r"in parts, historical, ssp126; open one of them: .*historical"):
        cube.open_cube(root)
    with pytest.raises(MismatchError, match="differs in model"):
        cube.create(root / "ssp126", identity={"model": "other"}, land=PAIRS, **{**ABOUT, "years": [2001, 2002, 2003]})


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'"text"', b'{"attributes": {"title": "x"}}', None])
def test_a_damaged_part_does_not_stop_the_others(tmp_path, content):
    root = tmp_path / "world.zarr"
    for name in ("historical", "ssp126"):
        cube.create(root / name, identity={}, land=PAIRS, **ABOUT)
        fill(root / name, PAIRS)
        cube.show(root / name)
    before, damaged = (root / "zarr.json").read_bytes(), root / "historical" / "zarr.json"
    damaged.unlink() if content is None else damaged.write_bytes(content)
    cube.show(root / "ssp126")
    assert zarr.open_group(root, mode="r").attrs["parts"] == ["ssp126"]
    cube.show(root / "historical")
    assert (root / "zarr.json").read_bytes() == before


def test_a_root_whose_parts_are_all_damaged_is_left_as_it_is(tmp_path):
    root = tmp_path / "world.zarr"
    cube.create(root / "ssp126", identity={}, land=PAIRS, **ABOUT)
    (root / "ssp126" / "zarr.json").write_bytes(b"{")
    before = (root / "zarr.json").read_bytes()
    cube._tell_root(root)
    assert (root / "zarr.json").read_bytes() == before


def test_missing_cube_says_how_to_make_one(tmp_path):
    with pytest.raises(DataError, match="ai4land reconstruct"):
        cube.open_cube(tmp_path / "none.zarr")


def test_fill_value_marks_cells_that_are_not_mapped():
    assert EMPTY > SCALE


# -- overviews ----------------------------------------------------------------------------------------------------------


def test_overviews_hold_the_class_of_most_cells(tmp_path):
    grid = make_grid((-180, -90, 180, 90), coarse_cell=45.0, factor=48, shard=96)
    path, window = tmp_path / "cube.zarr", Window(96, 0, 96, 96)
    cube.create(path, identity={}, land=[window], **{**ABOUT, "grid": grid, "years": [2000, 2001], "years_a_shard": 2})
    block = Block(window, (2000, 2001))
    data = cells(block)
    codes = np.where(np.arange(96)[:, None] < 30, LEGEND.fill.code, np.sort(data["land_cover"], axis=-1)).astype(np.uint8)
    write_block(path, block, {**data, "land_cover": codes})
    cube.show(path)
    levels = zarr.open_group(path, mode="r").attrs["multiscales"]["layout"]
    assert [level["asset"] for level in levels] == ["land_cover", "overviews/1/land_cover"]
    view = xr.open_zarr(path, group="overviews/1", chunks=None, decode_coords="all")
    assert view["land_cover"].shape == (2, 48, 96) and view["year"].values.tolist() == [2000, 2001]
    assert levels[1]["spatial:shape"] == [48, 96] and levels[1]["spatial:transform"][0] == pytest.approx(360 / 96)
    assert view["latitude"].values[0] == pytest.approx(90 - 180 / 96)
    got = view["land_cover"].values[:, 24:, :24]
    for year in range(2):
        for row in range(24):
            for col in range(24):
                values, counts = np.unique(codes[year, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4], return_counts=True)
                land = values != LEGEND.fill.code
                if counts[land].sum() < 8:
                    assert got[year, row, col] == LEGEND.fill.code
                else:
                    assert counts[values == got[year, row, col]] == counts[land].max()
    assert (view["land_cover"].values[:, :24] == LEGEND.fill.code).all()


def test_each_level_is_the_majority_of_the_finest_and_not_of_the_one_before():
    block = np.array([[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 1, 2], [0, 1, 2, 2]], dtype=np.uint8)
    fine, coarse = reduce_classes(block, classes=3, factors=[2, 4])
    assert fine.tolist() == [[0, 1], [0, 2]]
    assert coarse.tolist() == [[1]]  # 7 cells of class 1 against 6 of class 0, which has more of the cells of the level before
    half = np.array([[0, MISSING], [MISSING, MISSING]], dtype=np.uint8)
    assert next(reduce_classes(half, classes=2, factors=[2])).tolist() == [[MISSING]]


@pytest.mark.parametrize(("factor", "shard", "land", "most"), [(25, 1200, 344, 450), (90, 3600, 463, 700)])
def test_a_year_of_the_globe_is_few_objects(factor, shard, land, most):
    """Shards with land: counted in a mask of 30 arc-seconds; see docs/cube.md."""
    grid = make_grid((-180, -90, 180, 90), coarse_cell=0.25, factor=factor, shard=shard)
    template, _ = make_template(
        grid=grid, legend=LEGEND, years=list(range(1900, 2000)), years_a_shard=10, attrs={}, totals="exact", land=[]
    )
    objects = 0.0
    for document in template["documents"].values():
        dims = document.get("dimension_names") or []
        if "latitude" in dims and "time" in dims:
            chunk = document["chunk_grid"]["configuration"]["chunk_shape"]
            assert document["shape"][-1] // chunk[-1] == grid.shape[1] // shard  # an object a shard
            objects += land / chunk[0]
    assert 0 < objects <= most
