from __future__ import annotations

import math

import numpy as np
import pytest
from affine import Affine
from odc.geo.geobox import GeoBox
from pyproj import Transformer

from ai4land.serve.tiles import choose, point, series, tile
from tests.maps import HILDA, only, pixels, some_codes, write_maps

RGB = {c.code: (*bytes.fromhex(c.colour[1:]), 255) for c in HILDA.classes}


@pytest.fixture(scope="module")
def codes():
    return some_codes()


@pytest.fixture(scope="module")
def part(codes, tmp_path_factory):
    return only(write_maps(tmp_path_factory.mktemp("tiles") / "c.zarr", codes=codes))


def colours(codes: np.ndarray) -> np.ndarray:
    table = np.zeros((256, 4), np.uint8)
    for code, colour in RGB.items():
        table[code] = colour
    return table[codes]


def centre_cells(z: int, x: int, y: int, cell: float):
    """Row and column of the cell at the middle of every pixel, and whether it lies a quarter of a pixel from the next cell."""
    n = 256 * 2**z
    at = (np.arange(256) + 0.5) / n
    lon = 360 * (x / 2**z + at) - 180
    lat = np.degrees(np.arctan(np.sinh(math.pi * (1 - 2 * (y / 2**z + at)))))
    col, row = (lon + 180) / cell, (90 - lat) / cell
    wide = 360 / n / cell / 4
    tall = wide * np.cos(np.radians(lat))

    def clear(place, margin):
        return np.floor(place - margin) == np.floor(place + margin)

    return row.astype(int), col.astype(int), clear(row, tall)[:, None] & clear(col, wide)[None, :]


@pytest.mark.parametrize(
    ("z", "x", "y"),
    [
        (0, 0, 0),
        (1, 0, 0),
        (1, 1, 1),
        (2, 3, 1),
        (3, 0, 3),
        (3, 7, 4),
        (3, 4, 0),
        (3, 2, 7),
        (5, 16, 10),
        (6, 63, 0),
        (7, 0, 127),
    ],
    ids=lambda v: str(v),
)
def test_pixels_have_exactly_the_colours_of_their_cells(part, codes, z, x, y):
    got = pixels(tile(part, year=2001, z=z, x=x, y=y))
    assert got.shape == (256, 256, 4)
    row, col, clear = centre_cells(z, x, y, 2.8125)
    wanted = colours(codes[1][np.ix_(row, col)])
    assert clear.mean() > 0.2
    assert np.array_equal(got[clear], wanted[clear])
    assert len(np.unique(got.reshape(-1, 4), axis=0)) > (1 if z < 5 else 0)


def test_fill_is_transparent_and_other_years_are_other_maps(part, codes):
    got = pixels(tile(part, year=2000, z=0, x=0, y=0))
    row, col, clear = centre_cells(0, 0, 0, 2.8125)
    empty = codes[0][np.ix_(row, col)] == HILDA.fill.code
    assert (got[..., 3][empty & clear] == 0).all() and (got[..., 3][~empty & clear] == 255).all() and empty.any()
    assert not np.array_equal(got, pixels(tile(part, year=2005, z=0, x=0, y=0)))


@pytest.mark.parametrize("name", [(1999, 0, 0, 0), (2000, 1, 2, 0), (2000, 1, 0, 2), (2000, 23, 0, 0), (2000, 2, -1, 0)])
def test_what_is_no_tile_is_refused(part, name):
    year, z, x, y = name
    with pytest.raises(KeyError):
        tile(part, year=year, z=z, x=x, y=y)


def test_the_deepest_zoom_shows_one_cell(part, codes):
    got = pixels(tile(part, year=2000, z=22, x=2**21 + 100_000, y=2**21 - 100_000))
    col, row = int((180 + 360 * 100_000 / 2**22) / 2.8125), int((90 - 360 * 100_000 / 2**22) / 2.8125)
    assert (got == colours(codes[0][row, col])).all()


def test_an_overview_is_read_where_a_pixel_holds_its_cells(codes, tmp_path):
    box = GeoBox((64, 128), Affine(0.028125, 0, -1.8, 0, -0.028125, 0.9), "EPSG:4326")
    urban, water = np.full((3, 16, 32), 11, np.uint8), np.full((1, 4, 8), 77, np.uint8)
    part = only(
        write_maps(tmp_path / "c.zarr", codes=codes, box=box, levels={4: (urban, (2000, 2001, 2005)), 16: (water, (2000,))})
    )
    cells = [choose(part, year=2000, z=z, y=2**z // 2).cell for z in (0, 2, 6)]
    assert cells == pytest.approx([0.45, 0.1125, 0.028125])
    assert choose(part, year=2001, z=0, y=0).cell == pytest.approx(0.1125), "the coarser overview lacks this year"
    for year, z, place, code in ((2000, 0, (127, 127), 77), (2001, 0, (127, 127), 11), (2000, 3, (253, 253), 11)):
        got = pixels(tile(part, year=year, z=z, x=2**z // 2 - (z > 0), y=2**z // 2 - (z > 0)))
        assert tuple(got[place]) == RGB[code]


def test_a_tile_outside_a_region_is_transparent_and_one_across_its_edge_is_in_part(codes, tmp_path):
    box = GeoBox((64, 128), Affine(0.1, 0, 5, 0, -0.1, 51), "EPSG:4326")
    part = only(write_maps(tmp_path / "c.zarr", codes=some_codes(fill=False), box=box))
    assert not pixels(tile(part, year=2000, z=3, x=0, y=0)).any()
    shown = pixels(tile(part, year=2000, z=4, x=8, y=5))[..., 3] == 255
    assert 0.05 < shown.mean() < 0.9


def test_a_projected_map_lies_where_it_should(tmp_path):
    box = GeoBox((64, 64), Affine(1000, 0, 4_300_000, 0, -1000, 3_100_000), "EPSG:3035")
    codes = some_codes((3, 64, 64), fill=False)
    part = only(write_maps(tmp_path / "c.zarr", codes=codes, box=box))
    back = Transformer.from_crs("EPSG:3035", "EPSG:4326", always_xy=True)
    for row, col in ((10, 10), (30, 50), (61, 2)):
        lon, lat = back.transform(4_300_000 + 1000 * (col + 0.5), 3_100_000 - 1000 * (row + 0.5))
        found = point(part, lon=lon, lat=lat, year=2000)
        assert found["code"] == codes[0, row, col] and found["cell"] == pytest.approx((lon, lat), abs=1e-5)
        z = 12
        x = (lon + 180) / 360 * 2**z
        y = (1 - math.asinh(math.tan(math.radians(lat))) / math.pi) / 2 * 2**z
        got = pixels(tile(part, year=2000, z=z, x=int(x), y=int(y)))
        assert tuple(got[int(y % 1 * 256), int(x % 1 * 256)]) == RGB[int(codes[0, row, col])]
    assert point(part, lon=-170, lat=-80, year=2000)["code"] is None


def test_a_point_gives_class_confidence_and_all_its_years(part, codes):
    row, col = next((r, c) for r in range(64) for c in range(128) if codes[1, r, c] and codes[0, r, c] == HILDA.fill.code)
    lon, lat = -180 + 2.8125 * (col + 0.3), 90 - 2.8125 * (row + 0.6)
    assert point(part, lon=lon, lat=lat, year=2001) == {
        "code": int(codes[1, row, col]),
        "cell": (-180 + 2.8125 * (col + 0.5), 90 - 2.8125 * (row + 0.5)),
        "confidence": 0.8,
    }
    assert point(part, lon=lon, lat=lat, year=2000) == {
        "code": None,
        "cell": (-180 + 2.8125 * (col + 0.5), 90 - 2.8125 * (row + 0.5)),
        "confidence": None,
    }
    wanted = [None if c == HILDA.fill.code else int(c) for c in codes[:, row, col]]
    assert series(part, lon=lon, lat=lat) == {"years": [2000, 2001, 2005], "codes": wanted}


@pytest.mark.parametrize(
    ("lon", "lat", "row", "col"),
    [(-180, 90, 0, 0), (180, -90, 63, 0), (179.999, 0.001, 31, 127), (360, 0.001, 31, 64), (-181, 45, 16, 127)],
)
def test_points_at_the_edges_of_the_world(part, codes, lon, lat, row, col):
    code = int(codes[0, row, col])
    assert point(part, lon=lon, lat=lat, year=2000)["code"] == (None if code == HILDA.fill.code else code)


@pytest.mark.parametrize(("lon", "lat"), [(0, 91), (0, -90.1), (float("nan"), 0), (float("inf"), 0)])
def test_points_off_the_world_are_nothing(part, lon, lat):
    assert point(part, lon=lon, lat=lat, year=2000)["code"] is None
    assert series(part, lon=lon, lat=lat)["codes"] == [None] * 3
    with pytest.raises(KeyError):
        point(part, lon=0, lat=0, year=1999)
