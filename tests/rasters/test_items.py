from __future__ import annotations

import dask.array
import numpy as np
import pytest
import rasterio
import xarray as xr
from affine import Affine

from ai4land.errors import ConfigError, DataError
from ai4land.grid import FINE_DIMS, Window, make_grid
from ai4land.rasters import lattice
from ai4land.rasters.gaps import check_any
from ai4land.rasters.items import items_in, load_asset
from ai4land.sources.search import find_items
from tests.catalogs import GRID, VALUES, ZONES, make_item, save, write_cog


def test_two_halves_make_one_exact_lazy_layer(world):
    items = find_items(world, collection="terrain", bbox=GRID.bounds)
    assert [i.id for i in items] == ["east", "west"]
    field = load_asset(items, asset="elevation", grid=GRID, resampling="exact")
    assert isinstance(field.data, dask.array.Array) and field.data.chunksize == (36, 36)
    assert field.dims == FINE_DIMS and set(field.coords) == set(FINE_DIMS) and field.dtype == np.float32
    assert all(np.array_equal(field[d].values, GRID.coords()[d]) for d in FINE_DIMS)
    np.testing.assert_array_equal(field.values, VALUES)


@pytest.mark.parametrize("resampling", ["nearest", "bilinear", "average", "mode"])
def test_cells_that_coincide_keep_their_values(world, resampling):
    items = find_items(world, collection="terrain")
    got = load_asset(items, asset="elevation", grid=GRID, resampling=resampling, nodata=float("nan")).values
    inside = np.isfinite(VALUES)
    np.testing.assert_array_equal(got[inside], VALUES[inside])


def test_codes_keep_their_type_and_take_the_asked_nodata(world):
    items = find_items(world, collection="terrain")
    field = load_asset(items, asset="zone", grid=GRID, resampling="exact", dtype="uint8")
    assert field.dtype == np.uint8 and field.attrs["nodata"] == 0
    np.testing.assert_array_equal(field.values, ZONES)
    other = load_asset(items, asset="zone", grid=GRID, resampling="nearest", dtype="uint8", nodata=255)
    np.testing.assert_array_equal(other.values, np.where(ZONES == 0, 255, ZONES))
    floats = load_asset(items, asset="zone", grid=GRID, resampling="exact")
    np.testing.assert_array_equal(floats.values, np.where(ZONES == 0, np.nan, ZONES.astype("float32")))


def test_overviews_are_not_used_and_items_without_projection_load(world):
    items = find_items(world, collection="soil")
    with rasterio.open(items[0].assets["depth"].href) as file:
        assert file.overviews(1)
    got = load_asset(items, asset="depth", grid=GRID, resampling="average").values
    np.testing.assert_allclose(got, np.nan_to_num(VALUES) + 4, rtol=1e-5)


def test_scale_and_offset_of_the_catalogue_are_applied(tmp_path):
    path = write_cog(tmp_path / "a.tif", np.full(GRID.shape, 200, "int16"), GRID.fine.affine, nodata=-1)
    fields = {"bands": [{"data_type": "int16", "nodata": -1, "raster:scale": 0.1, "raster:offset": -5}]}
    item = make_item("a", {"t": path}, GRID.fine.affine, GRID.shape, extra={"t": fields}, hrefs="file://{}")
    field = load_asset([item], asset="t", grid=GRID, resampling="bilinear")
    np.testing.assert_allclose(field.values, 15.0, rtol=1e-6)


@pytest.mark.parametrize("resampling", ["exact", "bilinear", "average"])
def test_tiles_that_reach_over_the_dateline_fill_both_edges_of_the_globe(tmp_path, resampling):
    items, half, over = [], GRID.shape[1] // 2, 3
    for name, start in (("east", half - over), ("west", -over)):
        columns = np.arange(start, start + half) % GRID.shape[1]
        t = GRID.fine.affine * Affine.translation(start, 0)
        path = write_cog(tmp_path / f"{name}.tif", np.nan_to_num(VALUES)[:, columns], t)
        items.append(make_item(name, {"h": path}, t, (GRID.shape[0], half), bbox=[t.c, -90, t.c + 180, 90]))
    catalog = save(tmp_path, {"tiles": items})
    for window in (None, *GRID.shards()):
        w = window or Window(0, 0, *GRID.shape)
        there = items_in(str(catalog), collection="tiles", grid=GRID, window=w)
        got = load_asset(there, asset="h", grid=GRID, resampling=resampling, window=window).values
        np.testing.assert_array_equal(got, np.nan_to_num(VALUES)[w.slices])


def test_a_window_at_one_side_of_the_dateline_finds_the_tile_at_the_other(tmp_path):
    width = 18
    items = []
    for col in range(0, GRID.shape[1], width):
        t = GRID.fine.affine * Affine.translation(col, 0)
        files = {"h": write_cog(tmp_path / f"{col}.tif", VALUES[:, col : col + width], t)}
        items.append(make_item(f"{col:03d}", files, t, (GRID.shape[0], width)))
    catalog = str(save(tmp_path, {"tiles": items}))
    last = GRID.shape[1] - width
    found = {
        c: {i.id for i in items_in(catalog, collection="tiles", grid=GRID, window=Window(0, c, 36, width))} for c in (0, 36, last)
    }
    assert found == {
        0: {"000", "018", f"{last:03d}"},
        36: {"018", "036", "054"},
        last: {"000", f"{last - width:03d}", f"{last:03d}"},
    }


# -- bad input ----------------------------------------------------------------------------------------------------------


def test_a_layer_half_a_cell_off_is_refused(tmp_path):
    t = GRID.fine.affine * Affine.translation(0.5, 0.5)
    values = np.ones((70, 142), "uint8")
    item = make_item("a", {"h": write_cog(tmp_path / "a.tif", values, t)}, t, values.shape, hrefs="file://{}")
    for resampling in ("exact", "nearest", "average"):
        with pytest.raises(DataError, match=r"h of item a .*half-pixel shift"):
            load_asset([item], asset="h", grid=GRID, resampling=resampling)
    bare = make_item("a", {"h": tmp_path / "a.tif"}, t, values.shape, projection=False, hrefs="file://{}")
    with pytest.raises(DataError, match="half-pixel shift"):
        load_asset([bare], asset="h", grid=GRID, resampling="exact")


def test_another_cell_size_or_reference_system_is_not_exact(tmp_path):
    t = GRID.fine.affine * Affine.scale(2)
    item = make_item("a", {"h": write_cog(tmp_path / "a.tif", np.ones((36, 72), "uint8"), t)}, t, (36, 72), hrefs="file://{}")
    with pytest.raises(DataError, match=r"cells of 5 x 5, expected 2.5 x 2.5"):
        load_asset([item], asset="h", grid=GRID, resampling="exact")
    assert (load_asset([item], asset="h", grid=GRID, resampling="bilinear") == 1).all()
    metres = Affine(1e5, 0, 4e6, 0, -1e5, 3e6)
    path = write_cog(tmp_path / "b.tif", np.ones((9, 9), "uint8"), metres, crs="EPSG:3035")
    other = make_item("b", {"h": path}, t, (9, 9), projection=False, bbox=[5, 40, 15, 50], hrefs="file://{}")
    with pytest.raises(DataError, match="reference system of h of item b is ETRS89-extended / LAEA Europe"):
        load_asset([other], asset="h", grid=GRID, resampling="exact")


@pytest.mark.parametrize("projection", [True, False])
def test_longitudes_of_0_to_360_are_refused(tmp_path, projection):
    t = Affine(2.5, 0, 0, 0, -2.5, 90)
    path = write_cog(tmp_path / "a.tif", np.ones(GRID.shape, "uint8"), t)
    box = [-180, -90, 180, 90] if projection else None
    item = make_item("a", {"h": path}, t, GRID.shape, projection=projection, bbox=box, hrefs="file://{}")
    with pytest.raises(DataError, match=r"longitudes run 0..360 in h of item a .*roll them"):
        load_asset([item], asset="h", grid=GRID, resampling="nearest")


def test_a_nodata_value_that_only_the_catalogue_knows_is_not_interpolated(tmp_path):
    values = np.full(GRID.shape, 10.0, "float32")
    values[::2, ::2] = -9999
    path = write_cog(tmp_path / "a.tif", values, GRID.fine.affine)
    item = make_item("a", {"h": path}, GRID.fine.affine, GRID.shape, extra={"h": {"nodata": -9999}}, hrefs="file://{}")
    with pytest.raises(DataError, match="nodata value -9999 of h is not in the files"):
        load_asset([item], asset="h", grid=GRID, resampling="average")
    got = load_asset([item], asset="h", grid=GRID, resampling="exact").values
    assert np.isnan(got[::2, ::2]).all() and np.nanmin(got) == 10


def test_codes_need_a_nodata_value_and_are_never_averaged(world):
    items = find_items(world, collection="soil")
    with pytest.raises(ConfigError, match="nodata value of depth is not known"):
        load_asset(items, asset="depth", grid=GRID, resampling="nearest", dtype="uint8")
    with pytest.raises(ConfigError, match="resampling of depth is average"):
        load_asset(items, asset="depth", grid=GRID, resampling="average", dtype="uint8", nodata=0)


def test_an_empty_layer_is_told_when_it_is_checked(world):
    items = find_items(world, collection="terrain")
    far = make_grid((-180, 77.5, -165, 90), coarse_cell=2.5, factor=1, shard=1)
    field = load_asset(items, asset="elevation", grid=far, resampling="exact")
    with pytest.raises(DataError, match="all nodata"):
        check_any("elevation", field)


def test_layers_of_two_collections_merge_exactly(world):
    zone = load_asset(find_items(world, collection="terrain"), asset="zone", grid=GRID, resampling="exact", dtype="uint8")
    depth = load_asset(find_items(world, collection="soil"), asset="depth", grid=GRID, resampling="average")
    both = xr.merge([zone, depth], join="exact")
    assert set(both) == {"zone", "depth"} and both.sizes == dict(zip(FINE_DIMS, GRID.shape, strict=True))
    np.testing.assert_array_equal(both["zone"], ZONES)
    np.testing.assert_array_equal(both["depth"], depth)
    with pytest.raises(DataError, match="asset is 'depth', expected one of"):
        load_asset(
            [*find_items(world, collection="soil"), *find_items(world, collection="terrain")],
            asset="depth",
            grid=GRID,
            resampling="average",
        )
    other = make_grid((-180, -90, 180, 90), coarse_cell=10, factor=2, shard=18)
    coarser = load_asset(find_items(world, collection="soil"), asset="depth", grid=other, resampling="average")
    with pytest.raises(ValueError, match="exact"):
        xr.merge([zone, coarser], join="exact")


def test_a_file_without_a_stated_shape_is_looked_at_before_it_is_read(tmp_path, monkeypatch):
    path = write_cog(tmp_path / "a.tif", np.ones((36, 72), "uint8"), GRID.fine.affine * Affine.scale(2))
    item = make_item("a", {"h": path}, GRID.fine.affine, (36, 72), projection=False, hrefs="file://{}")
    assert load_asset([item], asset="h", grid=GRID, resampling="nearest").shape == GRID.shape
    monkeypatch.setattr(lattice, "MOST_CELLS", 100)
    for patch in (None, lambda href: href):
        with pytest.raises(
            DataError, match=r"h of item a has 324 cells under a shard of 36 x 36 cells of the grid, expected at most 100"
        ):
            load_asset([item], asset="h", grid=GRID, resampling="nearest", patch_url=patch)


@pytest.mark.parametrize(
    "fields",
    [
        {"proj:transform": [1, 2]},
        {"proj:transform": "abcdef"},
        {"proj:code": "EPSG:nonsense"},
        {"proj:shape": [None, 3]},
        {"proj:shape": 3},
        {"bands": "many"},
        {"bands": {"nodata": 1}},
        {"bands": [{"nodata": "none at all"}]},
        {"bands": [7]},
    ],
)
def test_fields_of_an_asset_that_make_no_sense_are_named(tmp_path, fields):
    path = write_cog(tmp_path / "a.tif", np.ones(GRID.shape, "uint8"), GRID.fine.affine)
    item = make_item("a", {"h": path}, GRID.fine.affine, GRID.shape, extra={"h": fields}, hrefs="file://{}")
    with pytest.raises(DataError, match="fields of h of item a can not be read"):
        load_asset([item], asset="h", grid=GRID, resampling="nearest")
