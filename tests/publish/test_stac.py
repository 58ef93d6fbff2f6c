from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pystac.validation import validate_dict

from ai4land.cube.describe import read_map
from ai4land.grid import make_grid
from ai4land.publish.credits import Credit
from ai4land.publish.stac import classes, collection, credit_fields, item, plain, year_end, year_start
from tests.cubes import bare_cube


def test_a_collection_says_what_the_cube_says(tmp_path):
    m = read_map(bare_cube(tmp_path / "c.zarr", years=(850, 851), ai4land_identity={"legend": "mine"}), id="a", title="A")
    about = collection(m, credits=[], licence="other", cube="c", root="c", assets={})
    assert about["providers"][0]["processing:software"] == {"ai4land": "1.2.3"} and "mine" in about["keywords"]
    assert about["cube:dimensions"]["time"]["step"] == "P1Y"
    bands = {b["name"]: b for b in about["assets"]["cube"]["bands"]}
    assert bands["confidence"]["raster:scale"] == 0.004 and bands["confidence"]["description"] == "how \\*sure\\*"


def test_years_before_1000_keep_their_zeros(tmp_path):
    m = read_map(bare_cube(tmp_path / "c.zarr", years=(850, 2100)), id="a", title="A")
    made = item(m, 850, cube="c")
    assert made["properties"]["start_datetime"] == "0850-01-01T00:00:00Z" == year_start(850)
    assert made["properties"]["end_datetime"] == "0850-12-31T23:59:59Z" == year_end(850)
    about = collection(m, credits=[], licence="other", cube="c", root="c", assets={})
    assert about["extent"]["temporal"]["interval"] == [["0850-01-01T00:00:00Z", "2100-12-31T23:59:59Z"]]


def test_projected_grid_has_its_box_in_degrees(tmp_path):
    grid = make_grid((4e6, 2e6, 4.2e6, 2.2e6), coarse_cell=50_000, factor=4, shard=8, origin=(0.0, 6e6), crs="EPSG:3035")
    m = read_map(bare_cube(tmp_path / "c.zarr", grid=grid), id="a", title="A")
    west, south, east, north = m.bbox
    assert 5 < west < east < 14 and 38 < south < north < 45
    made = item(m, 850, cube="c")["properties"]
    assert made["proj:code"] == "EPSG:3035" and made["proj:transform"][:3] == [12500, 0, grid.bounds[0]]
    about = collection(m, credits=[], licence="other", cube="c", root="c", assets={})
    assert about["cube:dimensions"]["longitude"]["extent"] == [grid.bounds[0], grid.bounds[2]]


def test_credits_become_links_and_publications():
    credits = [
        Credit("A", "CC0-1.0", citation="A 2000", providers=({"name": "X", "roles": ["producer"]},), url="https://a.org"),
        Credit("B", "proprietary", doi="nonsense", url="https://b.org/collections/b", rel="derived_from"),
        Credit("C", "other", licence_url="https://c.org/terms", doi="10.1234/abc", providers=({"name": "X"}, {"roles": []})),
    ]
    fields, links = credit_fields(credits, licence="other")
    assert [(e["rel"], e["href"]) for e in links] == [
        ("license", "https://spdx.org/licenses/CC0-1.0.html"),
        ("via", "https://a.org"),
        ("derived_from", "https://b.org/collections/b"),
        ("license", "https://c.org/terms"),
        ("cite-as", "https://doi.org/10.1234/abc"),
    ]
    assert fields["providers"] == [{"name": "X", "roles": ["producer"]}]
    assert fields["sci:publications"] == [{"citation": "A 2000"}, {"doi": "10.1234/abc"}]


@given(st.text())
def test_plain_text_has_no_markup(text):
    assert not set("<>") & set(plain(text)) and "\n" not in plain(text)


@pytest.mark.parametrize("crs", ["EPSG:3035", "+proj=laea +lat_0=50 +lon_0=9 +x_0=4000000 +y_0=3000000 +datum=WGS84 +type=crs"])
def test_objects_of_a_projected_grid_are_valid(tmp_path, crs, schemas):
    grid = make_grid((4e6, 2e6, 4.2e6, 2.2e6), coarse_cell=50_000, factor=4, shard=8, origin=(0.0, 6e6), crs=crs)
    m = read_map(bare_cube(tmp_path / "c.zarr", grid=grid, years=(850, 900)), id="a", title="A")
    about = collection(m, credits=[], licence="other", cube="c", root="c", assets={})
    for made in (about, item(m, 850, cube="c", cog="c.tif", thumbnail="t.png")):
        value = {**made, "links": [*made["links"]]}
        assert len(validate_dict(value, validator=schemas)) == 1 + len(made["stac_extensions"])
    assert ("proj:wkt2" in item(m, 850, cube="c")["properties"]) == crs.startswith("+")


def test_names_of_classes_are_data(tmp_path):
    land = {"flag_values": [0, 5], "flag_meanings": "sea <b>x</b>", "flag_colors": "#ffffff #00aa00"}
    m = read_map(bare_cube(tmp_path / "c.zarr", land=land), id="a", title="A")
    assert classes(m.flags)[1] == {"value": 5, "name": "-b-x--b-", "description": "&lt;b&gt;x&lt;/b&gt;", "color_hint": "00AA00"}
