from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import rasterio
import zarr
from affine import Affine

from ai4land.errors import ConfigError, DataError, MismatchError
from ai4land.grid import Window, make_grid, tiles
from ai4land.legend import load_legend
from ai4land.rasters.items import forget_items, items_in
from ai4land.rasters.landcover import find_maps
from ai4land.run import align as alignment
from ai4land.run import inputs
from ai4land.run.align import align, check_years, read_layer
from ai4land.run.config import StaticLayer
from ai4land.run.file import load_run
from ai4land.scenario import luh2
from ai4land.scenario.coarse import as_scenario
from ai4land.scenario.luh2 import open_states
from ai4land.store.contents import contents_of
from ai4land.store.read import open_store
from ai4land.store.shard import Layer
from ai4land.store.write import SCENARIO_YEARS, write_store
from ai4land.synthetic.planet import make_planet
from tests.catalogs import make_item, save, write_cog
from tests.runs import run_of, write_run


@pytest.fixture(scope="module")
def planet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_planet(tmp_path_factory.mktemp("planet") / "p", coarse_cell=15.0, factor=8, years=range(2000, 2008)).folder


def bytes_in(folder: Path) -> dict[Path, bytes]:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_workers_make_the_store_that_this_process_makes(planet, tmp_path, monkeypatch):
    stores = []
    for name, small in (("here", alignment._SMALL), ("workers", 0)):
        monkeypatch.setattr(alignment, "_SMALL", small)
        lines: list[str] = []
        run = load_run(write_run(tmp_path / name, planet), ["grid.shard=48", "train.patch=24"])
        stores.append(bytes_in(align(run, tell=lines.append)))
        assert any(line.startswith("Dask dashboard") for line in lines) == (name == "workers")
        assert [line for line in lines if line.startswith("static layer: ")][-1].startswith("static layer: soil_depth")
    assert stores[0] == stores[1] and len(stores[0]) > 30


@pytest.mark.parametrize("side", [24, 32, 96])
def test_windows_of_every_layer_are_those_of_the_whole(planet, tmp_path, side):
    run = load_run(write_run(tmp_path, planet), ["grid.shard=96"])
    grid = inputs.Inputs.of(run).grid
    for layer in run.static:
        whole = read_layer(Window(0, 0, *grid.shape), layer=layer, run=run, grid=grid)
        for w in tiles(grid.shape, side):
            np.testing.assert_array_equal(read_layer(w, layer=layer, run=run, grid=grid), whole[w.slices])
        assert np.isfinite(whole).any()


def test_window_that_no_item_meets_is_empty(tmp_path):
    run = run_of(
        static=[{"name": "x", "catalog": "stac/catalog.json", "collection": "terrain", "asset": "height"}], data=str(tmp_path)
    )
    grid = inputs.Inputs.of(run).grid
    west = np.ones((grid.shape[0], grid.shape[1] // 2), np.float32)
    path = write_cog(tmp_path / "west.tif", west, grid.fine.affine, nodata=np.nan)
    save(tmp_path, {"terrain": [make_item("west", {"height": path}, grid.fine.affine, west.shape)]})
    fields = {w: read_layer(w, layer=run.static[0], run=run, grid=grid) for w in grid.shards()}
    assert all(np.isnan(field).all() == (w.col >= 64) and np.isfinite(field).all() == (w.col < 64) for w, field in fields.items())


def test_store_of_a_run_is_what_its_inputs_say(planet, tmp_path):
    run = load_run(write_run(tmp_path, planet))
    store = open_store(align(run))
    grid, legend = inputs.Inputs.of(run).grid, inputs.Inputs.of(run).legend
    maps = {y: m.read() for y, m in find_maps(inputs.map_source(run), grid=grid, legend=legend).items()}
    inside = maps[2004] != legend.fill.code
    assert np.array_equal(store["mask"].values.astype(bool), inside)
    assert store["observed_year"].values.tolist() == list(range(2000, 2008))
    assert all(np.array_equal(store["land_cover"].sel(observed_year=y).values, maps[y]) for y in maps)
    for layer, stored in zip(run.static, store["static"].values, strict=True):
        field = read_layer(Window(0, 0, *grid.shape), layer=layer, run=run, grid=grid)
        there = np.isfinite(field)
        assert np.array_equal(stored[there], field[there]) and np.isfinite(stored[inside]).all()
        assert np.array_equal(stored[~inside], field[~inside], equal_nan=True)


def test_coordinates_make_maps():
    run = run_of(static=[{"name": "north", "coordinate": "latitude"}, {"name": "east", "coordinate": "longitude"}])
    grid = inputs.Inputs.of(run).grid
    whole = Window(0, 0, *grid.shape)
    north, east = (read_layer(whole, layer=layer, run=run, grid=grid) for layer in run.static)
    part = Window(3, 8, 5, 7)
    for layer, field in zip(run.static, (north, east), strict=True):
        assert np.array_equal(read_layer(part, layer=layer, run=run, grid=grid), field[part.slices])
    assert north.shape == east.shape == grid.shape and north.dtype == np.float32
    assert (north[:, 0] == north[:, -1]).all() and (east[0] == east[-1]).all()
    assert north[0, 0] == pytest.approx(90 - 22.5 / 16) and east[0, 0] == pytest.approx(-180 + 22.5 / 16)


def test_mask_can_be_what_the_scenario_knows(planet, tmp_path):
    run = load_run(write_run(tmp_path, planet))
    grid, legend = inputs.Inputs.of(run).grid, inputs.Inputs.of(run).legend
    reference = find_maps(inputs.map_source(run), grid=grid, legend=legend)[2004]
    known = np.random.default_rng(0).random(grid.coarse.shape) < 0.5
    coarse = np.where(known, 0.5, np.nan)[None, None].repeat(2, 1)
    write_store(
        tmp_path / "s.zarr",
        grid=grid,
        legend=legend,
        mask=partial(alignment._mapped, reference=reference),
        maps={2004: reference.read},
        coarse=as_scenario(coarse, years=[2004], states=["a", "b"], grid=grid),
        layers=[Layer("one", False, lambda w: np.ones((w.height, w.width), np.float32))],
        identity={},
        known=known,
    )
    cells = np.repeat(np.repeat(known, grid.factor, 0), grid.factor, 1)
    assert np.array_equal(open_store(tmp_path / "s.zarr")["mask"].values, (reference.read() != legend.fill.code) & cells)


def test_store_of_other_years_is_refused(tiny_store):
    check_years(tiny_store.path, {2000, 2003}, {2001})
    with pytest.raises(MismatchError, match=r"lacks the land-cover maps \[1999\]"):
        check_years(tiny_store.path, {1999, 2000}, {2001})
    with pytest.raises(MismatchError, match=r"lacks the scenario years \[2004, 2005\]"):
        check_years(tiny_store.path, {2000}, {2003, 2004, 2005})


def test_locked_codes_that_the_legend_lacks_are_refused_before_anything_is_read(tmp_path):
    run = run_of(runs=str(tmp_path), data=str(tmp_path / "nowhere"), constrain={"lock": [77, 12345]})
    with pytest.raises(ConfigError, match=r"constrain\.lock has the codes \[12345\], expected some of \[11"):
        align(run)
    assert not list(tmp_path.iterdir())


def test_store_whose_files_hold_something_else_by_now_is_refused(planet, tmp_path):
    shutil.copytree(planet, tmp_path / "planet")
    run = load_run(write_run(tmp_path, tmp_path / "planet"))
    store = align(run)
    held = {p.name for p in map(Path, zarr.open_group(store, mode="r").attrs["files"])}
    assert {"HILDAplus_2004.tif", "states.nc", "staticData_quarterdeg.nc", "soil_depth.tif", "elevation_west.tif"} <= held
    assert "catalog.json" not in held
    for path in (tmp_path / "planet").rglob("*.tif"):
        path.touch()
    assert align(run) == store
    soil = tmp_path / "planet" / "static" / "soil_depth.tif"
    with rasterio.open(soil) as file:
        profile, values = file.profile, file.read()
    with rasterio.open(soil, "w", **profile) as file:
        file.write(values + 1)
    with pytest.raises(MismatchError, match=r"inputs hold something else than .*soil_depth\.tif; restore them"):
        align(run)
    before = contents_of(store, maps=[2004], states=[2004])
    shutil.rmtree(store)
    align(run)
    assert contents_of(store, maps=[2004], states=[2004]) != before


def test_a_store_of_more_years_holds_the_same_of_those_it_had(planet, tmp_path):
    run = load_run(write_run(tmp_path, planet), ["reconstruct.years=2004-2005", "grid.shard=96"])
    before = contents_of(align(run), maps=[2004], states=range(2004, 2006))
    shutil.rmtree(run.folder)
    run = load_run(write_run(tmp_path, planet), ["reconstruct.years=2003-2007", "grid.shard=96"])
    assert contents_of(align(run), maps=[2004], states=range(2004, 2006)) == before


def test_long_scenario_is_read_once_some_years_at_a_time(tmp_path, monkeypatch):
    planet = make_planet(tmp_path / "p", coarse_cell=15.0, factor=4, years=range(1980, 2020)).folder
    grid = make_grid((-180, -90, 180, 90), coarse_cell=15.0, factor=4, shard=16)
    years = [y for y in range(1980, 2020) if y != 1999]
    static = planet / "luh2" / "staticData_quarterdeg.nc"
    about = {"static": static, "grid": grid, "years": years}
    whole = open_states(planet / "luh2" / "states.nc", **about)
    opened, asked = [], []
    open_source, read = luh2.open_source, luh2._read
    monkeypatch.setattr(luh2, "open_source", lambda path: opened.append(path) or open_source(path))
    monkeypatch.setattr(luh2, "_read", lambda years, **more: asked.append(years) or read(years, **more))
    lazy = open_states(planet / "luh2" / "states.nc", years_at_once=SCENARIO_YEARS, **about)
    assert not asked and lazy["year"].values.tolist() == years and lazy.dtype == whole.dtype
    about = {"grid": grid, "legend": load_legend("hildaplus"), "mask": lambda w: np.ones((w.height, w.width), bool)}
    about |= {"maps": {1980: lambda w: np.full((w.height, w.width), 11, np.uint8)}, "identity": {}}
    about |= {"layers": [Layer("one", False, lambda w: np.ones((w.height, w.width), np.float32))]}
    write_store(tmp_path / "lazy.zarr", coarse=lazy, **about)
    write_store(tmp_path / "whole.zarr", coarse=whole, **about)
    assert bytes_in(tmp_path / "lazy.zarr") == bytes_in(tmp_path / "whole.zarr")
    assert opened == [static, planet / "luh2" / "states.nc"] and [len(part) for part in asked] == [16, 16, 7]
    assert np.array_equal(open_store(tmp_path / "lazy.zarr")["coarse"].values, whole.values, equal_nan=True)


def test_failure_on_workers_leaves_nothing(planet, tmp_path, monkeypatch):
    monkeypatch.setattr(alignment, "_SMALL", 0)
    shutil.copytree(planet, tmp_path / "planet")
    soil = tmp_path / "planet" / "static" / "soil_depth.tif"
    soil.write_bytes(soil.read_bytes()[: int(0.7 * soil.stat().st_size)])
    run = load_run(write_run(tmp_path, tmp_path / "planet"), ["grid.shard=24", "train.patch=24"])
    with pytest.raises(DataError, match=r"soil_depth\.tif is truncated"):
        align(run)
    assert not run.folder.exists() or not list(run.folder.iterdir())


def test_items_of_a_window_of_a_projected_grid_are_those_around_it(tmp_path):
    grid = make_grid(
        (4_000_000, 2_000_000, 5_600_000, 3_600_000),
        coarse_cell=100_000,
        factor=4,
        shard=16,
        origin=(4e6, 3.6e6),
        crs="EPSG:3035",
    )
    items = []
    for lon in range(0, 40, 5):
        values, t = np.full((40, 40), float(lon), np.float32), Affine(0.125, 0, lon, 0, -0.5, 60)
        path = write_cog(tmp_path / f"{lon}.tif", values, t, nodata=-1)
        items.append(make_item(f"t{lon:02d}", {"height": path}, t, values.shape))
    catalog = str(save(tmp_path, {"terrain": items}))
    forget_items()
    found = {w: [i.id for i in items_in(catalog, collection="terrain", grid=grid, window=w)] for w in grid.shards()}
    assert all(0 < len(ids) < 8 for ids in found.values()) and len({tuple(ids) for ids in found.values()}) > 1
    layer = StaticLayer(name="h", catalog=catalog, collection="terrain", asset="height", resampling="nearest")
    run = run_of(static=[layer.model_dump()], data=str(tmp_path))
    whole = read_layer(Window(0, 0, *grid.shape), layer=layer, run=run, grid=grid)
    for w in grid.shards():
        assert np.array_equal(read_layer(w, layer=layer, run=run, grid=grid), whole[w.slices], equal_nan=True)
    assert np.unique(whole[np.isfinite(whole)]).size > 3


def test_a_users_own_crosswalk_is_part_of_what_a_store_is_made_from(tmp_path):
    (tmp_path / "my.csv").write_text("state,11,44\nprimf,1,0\n")
    run = run_of(data=str(tmp_path), scenario={"kind": "luh2", "paths": ["states.nc"], "crosswalk": "my.csv"})
    before = inputs.Inputs.of(run).identity
    (tmp_path / "my.csv").write_text("# a comment changes nothing\nstate,11,44\nprimf,1,0\n")
    assert inputs.Inputs.of(run).identity == before
    (tmp_path / "my.csv").write_text("state,11,44\nprimf,0,1\n")
    assert {k for k, v in inputs.Inputs.of(run).identity.items() if before[k] != v} == {"crosswalk"}
