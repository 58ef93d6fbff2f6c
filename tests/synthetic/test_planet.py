"""The synthetic planet: its files read like the real ones, and its land use changes where neighbours favour it."""

from __future__ import annotations

import json
from pathlib import Path

import netCDF4
import numpy as np
import pystac
import pytest
import rasterio
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from ai4land.errors import ConfigError
from ai4land.grid import block_sum, cell_areas, centres, make_grid
from ai4land.legend import load_legend
from ai4land.synthetic.luh2 import STATES
from ai4land.synthetic.planet import PlanetPaths, _best, _blocks, land_use, make_fields, make_planet

YEARS = range(1960, 1966)
SMALL = {"years": YEARS, "coarse_cell": 15.0, "factor": 8}
GRID = make_grid((-180, -90, 180, 90), coarse_cell=15, factor=8, shard=8)


@pytest.fixture(scope="module")
def planet(tmp_path_factory) -> PlanetPaths:
    return make_planet(tmp_path_factory.mktemp("planet"), seed=3, **SMALL)


def read_map(paths: PlanetPaths, year: int):
    with rasterio.open(str(paths.landcover).format(year=year)) as file:
        return file.read(1)


@pytest.fixture(scope="module")
def maps(planet):
    return {year: read_map(planet, year) for year in YEARS}


def read_states(paths: PlanetPaths):
    with netCDF4.Dataset(paths.states) as file:
        file.set_auto_mask(False)
        return {name: file[name][:] for name in STATES}


def read_static(paths: PlanetPaths, name: str):
    with netCDF4.Dataset(paths.static_data) as file:
        file.set_auto_mask(False)
        return file[name][:]


def test_same_seed_gives_same_bytes_and_another_seed_does_not(planet, tmp_path):
    again = make_planet(tmp_path / "again", seed=3, **SMALL)
    other = make_planet(tmp_path / "other", seed=4, **{**SMALL, "years": range(1960, 1961)})
    for year in YEARS:
        name = str(planet.landcover.relative_to(planet.folder)).format(year=year)
        assert (planet.folder / name).read_bytes() == (again.folder / name).read_bytes()
    assert not np.array_equal(read_map(planet, 1960), read_map(other, 1960))
    for name in STATES:
        np.testing.assert_array_equal(read_states(planet)[name], read_states(again)[name])


def test_states_have_the_luh2_header(planet):
    with netCDF4.Dataset(planet.states) as file:
        assert file["primf"].dimensions == ("time", "lat", "lon")
        assert set(STATES) | {"secma", "secmb"} <= set(file.variables)
        assert file["time"].units == "years since 850-01-01 0:0:0"
        assert file["time"].calendar == "noleap"
        np.testing.assert_array_equal(file["time"][:] + 850, list(YEARS))
        assert np.all(np.diff(file["lat"][:]) < 0)
        assert np.all(np.diff(file["lon"][:]) > 0)
        for name in STATES:
            attrs = file[name].__dict__
            assert file[name].dtype == np.float32
            assert attrs["missing_value"] == np.float32(1e20) == attrs["_Fillvalue"]
            assert "_FillValue" not in attrs
            assert (attrs["units"], attrs["standard_name"]) == ("1", "area_fraction")


def test_states_sum_to_one_minus_water_and_are_missing_without_land(planet, maps):
    states, water = read_states(planet), read_static(planet, "icwtr")
    dry = block_sum((maps[1960] != 0).astype(int), GRID.factor) == 0
    assert dry.any()
    for values in states.values():
        assert np.all(values[:, dry] == np.float32(1e20))
        assert np.all((values[:, ~dry] >= 0) & (values[:, ~dry] <= 1))
    total = sum(v.astype(float) for v in states.values())
    np.testing.assert_allclose(total[:, ~dry], np.broadcast_to(1 - water[~dry], total[:, ~dry].shape), atol=1e-6)
    assert np.all(water[dry] == 1)


def test_static_area_is_the_ellipsoid(planet):
    assert float(read_static(planet, "carea").astype(float).sum()) == pytest.approx(510.0656e6, rel=1e-6)


def test_states_are_the_aggregated_maps(planet, maps):
    states = read_states(planet)
    areas = np.broadcast_to(GRID.cell_areas()[:, None], GRID.shape)
    whole = cell_areas(GRID.coarse)[:, None]
    groups = {
        (11,): ("urban",),
        (22,): ("c3ann", "c4ann", "c3per", "c4per", "c3nfx"),
        (33,): ("pastr", "range"),
        (44,): ("primf", "secdf"),
        (55, 66): ("primn", "secdn"),
    }
    for step, year in enumerate(YEARS):
        land = states["urban"][step] < 1e19
        for codes, names in groups.items():
            want = block_sum(areas * np.isin(maps[year], codes), GRID.factor) / whole
            got = sum(states[name][step].astype(float) for name in names)
            np.testing.assert_allclose(got[land], want[land], atol=1e-6)


def test_primary_land_never_grows(planet):
    states = read_states(planet)
    for name in ("primf", "primn"):
        assert np.all(np.diff(states[name].astype(float), axis=0) < 1e-6)


def test_maps_are_georeferenced_and_hold_known_codes_only(planet, maps):
    legend = load_legend("hildaplus")
    seen = set()
    for year, codes in maps.items():
        index = legend.encode(codes, source=str(year))
        np.testing.assert_array_equal(legend.decode(index), codes)
        seen |= set(np.unique(codes).tolist())
        with rasterio.open(str(planet.landcover).format(year=year)) as file:
            assert file.transform == GRID.fine.affine
            assert (file.crs.to_epsg(), file.nodata, file.dtypes[0]) == (4326, 99, "uint8")
    assert seen == {0, *legend.codes.tolist()}


def test_land_share_and_yearly_change_are_sensible(maps):
    areas = np.broadcast_to(GRID.cell_areas()[:, None], GRID.shape)
    land = maps[1960] != 0
    assert 0.33 < (areas * land).sum() / areas.sum() < 0.42
    for year in YEARS[1:]:
        changed = maps[year] != maps[year - 1]
        assert not changed[~land].any()
        assert 0.002 < changed.sum() / land.sum() < 0.015


def test_nothing_flickers(maps):
    changes = sum((maps[year] != maps[year - 1]).astype(int) for year in YEARS[1:])
    assert changes.max() == 1


def test_changes_land_where_the_class_is_near(maps):
    at_change, beside = [], []
    for year in YEARS[1:]:
        before, after = maps[year - 1], maps[year]
        free = _blocks(np.isin(before, (44, 55)), GRID.factor)
        for code in (11, 22, 33):
            near = _blocks(ndimage.uniform_filter((before == code).astype(float), 5, mode=("nearest", "wrap")), GRID.factor)
            gained = _blocks((after == code) & (before != code), GRID.factor) & free
            same_cell = (near * free).sum(axis=1) / np.maximum(free.sum(axis=1), 1)
            at_change += near[gained].tolist()
            beside += np.broadcast_to(same_cell[:, None], near.shape)[gained].tolist()
    assert len(at_change) > 50
    assert np.mean(at_change) > 1.5 * np.mean(beside)


def test_catalogue_opens_and_describes_its_files(planet, maps):
    catalog = pystac.Catalog.from_file(str(planet.catalog))
    items = {item.id: item for item in catalog.get_items(recursive=True)}
    assert {c.id for c in catalog.get_children()} == {"terrain", "climate", "soil"}
    assert set(items) == {"terrain-west", "terrain-east", "climate-globe", "soil-globe"}
    for item in items.values():
        assert item.get_collection() is not None
        for name, asset in item.assets.items():
            assert not Path(asset.href).is_absolute()
            with rasterio.open(asset.get_absolute_href()) as file:
                assert asset.extra_fields["proj:transform"] == list(file.transform)[:6]
                assert asset.extra_fields["proj:shape"] == list(file.shape)
                assert asset.extra_fields["proj:code"] == "EPSG:4326" == file.crs.to_string()
                assert asset.extra_fields["data_type"] == file.dtypes[0]
                assert asset.extra_fields["bands"][0]["name"] == name == file.descriptions[0]
                assert tuple(file.bounds) == tuple(item.bbox)
                assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
    assert items["terrain-west"].bbox[2] == items["terrain-east"].bbox[0] == 0
    with rasterio.open(planet.static / "soil_depth.tif") as file:
        np.testing.assert_array_equal(np.isnan(file.read(1)), maps[1960] == 0)


def test_larger_layers_have_overviews(tmp_path):
    paths = make_planet(tmp_path / "p", coarse_cell=15, factor=24, years=range(2000, 2001))
    with rasterio.open(paths.static / "climate_zone.tif") as file:
        assert file.overviews(1)


def test_elevation_below_zero_is_ocean(planet, maps):
    halves = []
    for part in ("west", "east"):
        with rasterio.open(planet.static / f"elevation_{part}.tif") as file:
            halves.append(file.read(1))
    np.testing.assert_array_equal(np.hstack(halves) < 0, maps[1960] == 0)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_fields_are_seamless_at_the_dateline_and_the_poles(seed):
    grid = make_grid((-180, -90, 180, 90), coarse_cell=30, factor=8, shard=8)
    fields = make_fields(grid, seed=seed)
    for name in ("elevation", "temperature", "precipitation"):
        values = getattr(fields, name)
        steps = np.abs(np.diff(values, axis=1, append=values[:, :1])).mean(axis=0)
        assert steps[-1] < 1.5 * steps[:-1].max()
        # The cells round a pole lie close together, however many columns there are.
        assert max(values[0].std(), values[-1].std()) < 0.6 * values.std()
    assert np.isfinite(fields.slope).all()
    assert set(np.unique(fields.climate_zone)) <= set(range(6))


def test_land_use_is_continuous_over_the_dateline():
    grid = make_grid((-180, -90, 180, 90), coarse_cell=10, factor=16, shard=16)
    fields = make_fields(grid, seed=0)
    *_, (year, codes, last_used) = land_use(fields, grid=grid, years=range(1960, 1963), seed=0)
    differ = (codes != np.roll(codes, -1, axis=1)).mean(axis=0)
    assert year == 1962
    assert (codes[:, 0] != 0).any()
    assert differ[-1] <= np.quantile(differ[:-1], 0.99)
    assert last_used.max() == 1962


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_best_takes_the_highest_allowed_cells_of_each_coarse_cell(seed, factor):
    rng = np.random.default_rng(seed)
    shape = (3 * factor, 2 * factor)
    score = rng.permutation(shape[0] * shape[1]).reshape(shape).astype(np.float32)
    allowed = rng.random(shape) < 0.6
    quota = rng.integers(0, factor * factor + 2, 6)
    chosen = _best(score, allowed, quota, factor)
    assert not (chosen & ~allowed).any()
    rows = zip(_blocks(chosen, factor), _blocks(allowed, factor), _blocks(score, factor), quota, strict=True)
    for taken, free, values, wanted in rows:
        assert taken.sum() == min(wanted, free.sum())
        if taken.any() and (free & ~taken).any():
            assert values[taken].min() > values[free & ~taken].max()


def test_lai_of_the_last_two_years_follows_the_seasons(planet, maps):
    assert sorted(p.name for p in planet.lai.parent.iterdir()) == ["lai_1964.nc", "lai_1965.nc"]
    with xr.open_dataset(str(planet.lai).format(year=1965)) as data:
        lai = data["lai"]
        assert lai.dims == ("time", "latitude", "longitude")
        assert list(lai.time.dt.month.values) == list(range(1, 13))
        np.testing.assert_allclose(lai.latitude, centres(GRID.fine)[0])
        np.testing.assert_array_equal(np.isnan(lai[0]), np.isin(maps[1965], (0, 77)))
        assert 2 < float(lai.max()) <= 7
        north, south = lai.sel(latitude=slice(65, 35)).mean(("latitude", "longitude")), lai.sel(latitude=slice(-30, -65))
        assert north[6] > 1.3 * north[0]
        assert south[0].mean() > south[6].mean()


def test_a_complete_planet_is_reused_and_an_incomplete_one_rewritten(tmp_path):
    size = {"years": range(1960, 1964), "coarse_cell": 30.0, "factor": 4}
    paths = make_planet(tmp_path, seed=1, **size)
    first = str(paths.landcover).format(year=1960)
    written = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert make_planet(tmp_path, seed=1, **size) == paths
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == written

    content = Path(first).read_bytes()
    Path(first).write_bytes(content[:100])
    make_planet(tmp_path, seed=1, **size)
    assert Path(first).read_bytes() == content

    paths.marker.unlink()
    paths.states.unlink()
    make_planet(tmp_path, seed=1, **{**size, "years": range(1961, 1964)})
    assert not Path(first).exists()
    assert paths.states.is_file()
    marker = json.loads(paths.marker.read_text(encoding="utf-8"))
    assert (marker["seed"], marker["first_year"], marker["last_year"]) == (1, 1961, 1963)
    assert "SYNTHETIC" in paths.readme.read_text(encoding="utf-8")


def test_files_of_something_else_are_left_alone(tmp_path):
    (tmp_path / "landcover").mkdir()
    real = tmp_path / "landcover" / "HILDAplus_1960.tif"
    real.write_bytes(b"real data")
    with pytest.raises(ConfigError, match="not a synthetic planet"):
        make_planet(tmp_path, **SMALL)
    assert real.read_bytes() == b"real data"


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"years": [1960, 1962]}, "consecutive years"),
        ({"years": []}, "consecutive years"),
        ({"coarse_cell": 7.0}, "part of 180 degrees"),
        ({"factor": 0}, "fine cells from pole to pole"),
        ({"seed": -1}, "0 or more"),
    ],
)
def test_bad_parameters_are_named(tmp_path, wrong, text):
    with pytest.raises(ConfigError, match=text):
        make_planet(tmp_path / "p", **{**SMALL, **wrong})
    assert not (tmp_path / "p").exists()
