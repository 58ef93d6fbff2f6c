from __future__ import annotations

import datetime as dt
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import dask.array
import numpy as np
import pystac
import pytest
import rasterio
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st

from ai4land.catalog import find_items, load_asset, split_bbox
from ai4land.errors import ConfigError, DataError
from ai4land.gaps import check_any
from ai4land.grid import FINE_DIMS, make_grid

GRID = make_grid((-180, -90, 180, 90), coarse_cell=10, factor=4, shard=36)
VALUES = np.random.default_rng(0).random(GRID.shape).astype("float32")
VALUES[:5, :7] = np.nan
ZONES = np.random.default_rng(1).integers(0, 9, GRID.shape).astype("uint8")


def write_cog(path: Path, values, transform, *, nodata=None, crs="EPSG:4326") -> Path:
    profile = {"height": values.shape[0], "width": values.shape[1], "count": 1, "dtype": values.dtype, "blocksize": 128}
    with rasterio.open(path, "w", "COG", crs=crs, transform=transform, nodata=nodata, **profile) as file:
        file.write(values, 1)
    return path


def make_item(name, files, transform, shape, *, year=2000, projection=True, extra=None, bbox=None, hrefs="{}"):
    west, north = transform.c, transform.f
    east, south = west + shape[1] * transform.a, north + shape[0] * transform.e
    box = bbox or [west, south, east, north]
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    item = pystac.Item(name, {"type": "Polygon", "coordinates": [ring]}, box, dt.datetime(year, 6, 1, tzinfo=dt.UTC), {})
    described = {"proj:code": "EPSG:4326", "proj:shape": list(shape), "proj:transform": list(transform)[:6]} if projection else {}
    for key, path in files.items():
        fields = {**described, **(extra or {}).get(key, {})}
        item.add_asset(
            key, pystac.Asset(hrefs.format(path), media_type=pystac.MediaType.COG, roles=["data"], extra_fields=fields)
        )
    return item


def save(root: Path, collections) -> Path:
    """Write a self-contained catalogue with relative hrefs; collections by name."""
    catalog = pystac.Catalog("world", "made for tests")
    for name, items in collections.items():
        space, time = pystac.SpatialExtent([[-180, -90, 180, 90]]), pystac.TemporalExtent([[dt.datetime(2000, 1, 1), None]])
        child = pystac.Collection(name, name, pystac.Extent(space, time), license="CC0-1.0")
        child.add_items(items)
        catalog.add_child(child)
    catalog.normalize_hrefs(str(root / "stac"))
    catalog.make_all_asset_hrefs_relative()
    catalog.save(pystac.CatalogType.SELF_CONTAINED)
    return root / "stac" / "catalog.json"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A catalogue in a folder with a blank: terrain in two halves of other years, soil as one."""
    root = tmp_path_factory.mktemp("my world")
    half = GRID.shape[1] // 2
    items = []
    for name, cut, year in (("west", slice(0, half), 2000), ("east", slice(half, None), 2005)):
        t = GRID.fine.affine * Affine.translation(cut.start, 0)
        files = {
            "elevation": write_cog(root / f"h_{name}.tif", VALUES[:, cut], t, nodata=np.nan),
            "zone": write_cog(root / f"z_{name}.tif", ZONES[:, cut], t, nodata=0),
        }
        extra = {"elevation": {"nodata": "nan", "data_type": "float32"}, "zone": {"nodata": 0, "data_type": "uint8"}}
        items.append(make_item(name, files, t, VALUES[:, cut].shape, year=year, extra=extra))
    fine = np.kron(np.nan_to_num(VALUES), np.ones((4, 4), "float32")) + np.tile(
        np.float32([[0, 8], [8, 0]]), 2 * np.array(GRID.shape)
    )
    t = GRID.fine.affine * Affine.scale(0.25)
    soil = make_item("globe", {"depth": write_cog(root / "soil.tif", fine, t)}, t, fine.shape, projection=False)
    return save(root, {"terrain": items, "soil": [soil]})


@pytest.fixture(scope="module")
def server(world):
    """The folder of the catalogue over HTTP."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(world.parents[1])))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


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


def test_a_catalogue_over_http_gives_the_same(world, server):
    url = f"{server}/stac/catalog.json"
    items = find_items(url, collection="terrain", headers={"X-Test": "1"}, timeout=10)
    assert all(a.href.startswith(server) for i in items for a in i.assets.values())
    near = find_items(world, collection="terrain")
    assert [i.id for i in items] == [i.id for i in near]
    remote = load_asset(items, asset="zone", grid=GRID, resampling="exact", dtype="uint8").values
    np.testing.assert_array_equal(remote, ZONES)


def test_a_collection_file_and_a_file_url_are_catalogues_too(world):
    path = world.parent / "terrain" / "collection.json"
    for source in (path, str(path), f"file://{world.as_posix()}"):
        items = find_items(source, collection="terrain")
        assert len(items) == 2
        assert all(i.assets["zone"].href.startswith("file:///") for i in items)


def test_items_are_picked_by_box_and_year(world):
    def names(**options):
        return [i.id for i in find_items(world, collection="terrain", **options)]

    assert names(bbox=(10, 0, 20, 10)) == ["east"]
    assert names(bbox=(170, 0, -170, 10)) == names(bbox=(170, 0, 190, 10)) == ["east", "west"]
    assert names(bbox=(-20, 0, -10, 10), years=[2000, 2005]) == ["west"]
    assert names(years=[2005]) == ["east"]
    with pytest.raises(DataError, match=r"no item that meets bbox None and years 1990 \(2 in all\)"):
        names(years=[1990])


def test_items_are_signed_by_modifier_and_patch_url(world):
    seen = []

    def sign(item):
        item.properties["signed"] = True

    items = find_items(world, collection="terrain", modifier=sign)
    assert all(i.properties["signed"] for i in items)
    copies = find_items(
        world, collection="terrain", modifier=lambda i: pystac.Item.from_dict({**i.to_dict(), "id": f"{i.id}-copy"})
    )
    assert {i.id for i in copies} == {"east-copy", "west-copy"}

    def patch(href):
        seen.append(href)
        return href

    load_asset(items, asset="zone", grid=GRID, resampling="exact", dtype="uint8", patch_url=patch).compute()
    assert any("z_west.tif" in href for href in seen)


def test_scale_and_offset_of_the_catalogue_are_applied(tmp_path):
    path = write_cog(tmp_path / "a.tif", np.full(GRID.shape, 200, "int16"), GRID.fine.affine, nodata=-1)
    fields = {"bands": [{"data_type": "int16", "nodata": -1, "raster:scale": 0.1, "raster:offset": -5}]}
    item = make_item("a", {"t": path}, GRID.fine.affine, GRID.shape, extra={"t": fields}, hrefs="file://{}")
    field = load_asset([item], asset="t", grid=GRID, resampling="bilinear")
    np.testing.assert_allclose(field.values, 15.0, rtol=1e-6)


@given(west=st.floats(-180, 179), width=st.floats(0.1, 360), south=st.floats(-90, 89), height=st.floats(0.1, 1))
def test_split_boxes_lie_in_the_globe_and_keep_their_width(west, width, south, height):
    parts = split_bbox((west, south, west + width, south + height))
    assert all(-180 <= p[0] <= p[2] <= 180 and p[1] == south for p in parts)
    assert sum(p[2] - p[0] for p in parts) == pytest.approx(width, abs=1e-9)
    assert len(parts) == 1 or west + width > 180


# -- bad input ----------------------------------------------------------------------------------------------------------


def test_unknown_collections_and_assets_are_told_what_there_is(world):
    with pytest.raises(DataError, match=r"collection is 'climate', expected one of \['soil', 'terrain'\]"):
        find_items(world, collection="climate")
    items = find_items(world, collection="terrain")
    with pytest.raises(DataError, match=r"asset is 'slope', expected one of \['elevation', 'zone'\]"):
        load_asset(items, asset="slope", grid=GRID, resampling="nearest")
    with pytest.raises(DataError, match="list of STAC items is empty"):
        load_asset([], asset="slope", grid=GRID, resampling="nearest")


def test_catalogues_that_can_not_be_read_are_named(tmp_path, server, world):
    (tmp_path / "bad.json").write_text("{not json")
    (tmp_path / "other.json").write_text('{"type": "Banana"}')
    for source in (tmp_path / "none.json", tmp_path / "bad.json", tmp_path / "other.json", f"{server}/none.json"):
        with pytest.raises(DataError, match="can not be read"):
            find_items(source, collection="terrain")
    item = next((world.parent / "terrain" / "west").glob("*.json"))
    with pytest.raises(DataError, match="is a STAC Item, expected a catalogue"):
        find_items(item, collection="terrain")


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
