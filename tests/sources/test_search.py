from __future__ import annotations

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pystac
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai4land.errors import DataError
from ai4land.rasters.items import load_asset
from ai4land.sources.search import find_items, split_bbox, years_of_item
from tests.catalogs import GRID, VALUES, ZONES, make_item

VALUES[:5, :7] = np.nan


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


@given(west=st.floats(-539, 539), width=st.floats(0.1, 360), south=st.floats(-90, 89), height=st.floats(0.1, 1))
def test_split_boxes_lie_in_the_globe_and_keep_their_width(west, width, south, height):
    parts = split_bbox((west, south, west + width, south + height))
    assert all(-180 <= p[0] <= p[2] <= 180 and p[1] == south for p in parts)
    assert sum(p[2] - p[0] for p in parts) == pytest.approx(width, abs=1e-9)
    assert len(parts) <= 2


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


@pytest.mark.parametrize(
    ("start", "end", "years"),
    [
        ("2020-01-01T00:00:00Z", "2020-12-31T23:59:59Z", (2020, 2020)),
        ("2020-01-01T00:00:00Z", "2021-01-01T00:00:00Z", (2020, 2020)),
        ("2020-01-01T00:00:00Z", "2021-01-01T00:00:01Z", (2020, 2021)),
        ("2020-01-01T00:00:00Z", "2020-01-01T00:00:00Z", (2020, 2020)),
    ],
)
def test_an_interval_that_ends_with_a_year_is_of_that_year(start, end, years):
    item = make_item("a", {}, GRID.fine.affine, GRID.shape)
    item.properties |= {"start_datetime": start, "end_datetime": end}
    assert years_of_item(item) == years
