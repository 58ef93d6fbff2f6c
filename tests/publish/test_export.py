from __future__ import annotations

import numpy as np
import pytest
import rasterio
import zarr
from affine import Affine
from matplotlib.image import imread
from odc.geo.geobox import GeoBox

from ai4land.cube.describe import Flag
from ai4land.publish.export import SIDE, equal_area, thumbnail, write_cog

FLAGS = (Flag(0, "sea", "#ffffff"), Flag(3, "land", "#00aa00"), Flag(9, "ice", "#0000ff"))
COLOURS = {f.code: [int(f.colour[i : i + 2], 16) for i in (1, 3, 5)] for f in FLAGS}


def globe(rows: int) -> GeoBox:
    return GeoBox((rows, 2 * rows), Affine(180 / rows, 0, -180, 0, -180 / rows, 90), "EPSG:4326")


def make_group(tmp_path, codes: np.ndarray, years=(2000, 2001), *, shards=None) -> zarr.Group:
    group = zarr.create_group(tmp_path / "cube.zarr")
    side = 32 if shards else codes.shape[1] // 2
    shape = {"chunks": (1, side, side), "shards": shards}
    group.create_array("land_cover", data=codes, fill_value=0, **shape)
    group.create_array("year", data=np.array(years, np.int32))
    return group


def pixels(path) -> np.ndarray:
    return (imread(path)[..., :3] * 255).round().astype(int)


def test_picture_shows_areas_as_large_as_they_are(tmp_path):
    """The caps beyond 60° have (1 - sin 60°) of the area of the sphere, not a third."""
    box = globe(64)
    codes = np.full((2, 64, 128), 3, np.uint8)
    codes[1, :11] = codes[1, -11:] = 9
    path = thumbnail(make_group(tmp_path, codes), year=2001, box=box, flags=FLAGS, path=tmp_path / "a" / "t.png")
    got = pixels(path)
    assert got.shape[1] == SIDE // 2 and max(got.shape) <= SIDE
    ice = (got == COLOURS[9]).all(axis=-1)
    edge = np.radians(90 - 11 * 180 / 64)
    assert ice.mean() == pytest.approx(1 - np.sin(edge), abs=0.01)
    assert ((got == COLOURS[3]).all(axis=-1) | ice).all()


def test_coarsest_overview_that_fills_the_picture_is_drawn(tmp_path):
    codes = np.zeros((2, 512, 1024), np.uint8)
    group = make_group(tmp_path, codes)
    layout = [{"asset": "land_cover"}]
    for level, (side, code) in enumerate([(256, 3), (128, 9)], start=1):
        child = group.create_group(f"overviews/{level}")
        child.create_array("land_cover", data=np.full((2, side, 2 * side), code, np.uint8))
        child.create_array("year", data=np.array([2001, 2000], np.int32))
        layout.append({"asset": f"overviews/{level}/land_cover"})
    layout += [{"asset": "../../secret/land_cover"}, "text", {}]
    group.attrs["multiscales"] = {"layout": layout}
    assert (pixels(thumbnail(group, year=2000, box=globe(512), flags=FLAGS, path=tmp_path / "t.png")) == COLOURS[3]).all()
    group.attrs["multiscales"] = {"layout": layout[:1]}
    assert (pixels(thumbnail(group, year=2000, box=globe(512), flags=FLAGS, path=tmp_path / "t.png")) == 255).all()


def test_large_map_becomes_a_small_picture(tmp_path):
    codes = np.zeros((1, 1200, 2400), np.uint8)
    codes[:, :, 1200:] = 3
    got = pixels(thumbnail(make_group(tmp_path, codes, [7]), year=7, box=globe(1200), flags=FLAGS, path=tmp_path / "t.png"))
    assert got.shape[1] == SIDE and (got[:, 510] == 255).all() and (got[:, 513] == COLOURS[3]).all()


@pytest.mark.parametrize(("crs", "shape"), [("EPSG:3035", (30, 60)), ("EPSG:3035", (60, 30))])
def test_projected_map_keeps_its_shape(crs, shape):
    box = GeoBox(shape, Affine(1000, 0, 4e6, 0, -1000, 3e6), crs)
    rows, cols = equal_area(box, shape, side=60)
    assert rows.tolist() == list(range(shape[0])) and cols.tolist() == list(range(shape[1]))


def test_regional_map_has_the_shape_of_the_region():
    box = GeoBox((100, 100), Affine(0.1, 0, 5, 0, -0.1, 65), "EPSG:4326")
    rows, cols = equal_area(box, (100, 100), side=400)
    assert len(rows) == 400 and len(cols) / 400 == pytest.approx(np.cos(np.radians(60)), abs=0.02)


def test_geotiff_has_codes_colours_and_overviews_by_majority(tmp_path):
    rng = np.random.default_rng(0)
    codes = np.zeros((2, 1152, 2304), np.uint8)
    codes[1, 100:900, 200:2000] = rng.choice(np.array([3, 9], np.uint8), (800, 1800), p=[0.7, 0.3])
    group = make_group(tmp_path, codes, shards=(1, 576, 576))
    box = globe(1152)
    path = write_cog(group["land_cover"], time=1, box=box, flags=FLAGS, fill=0, path=tmp_path / "a" / "m.tif")
    with rasterio.open(path) as file:
        assert np.array_equal(file.read(1), codes[1])
        assert file.nodata == 0 and file.crs.to_epsg() == 4326 and file.transform == box.affine
        assert {k: file.colormap(1)[k][:3] for k in (3, 9)} == {k: tuple(COLOURS[k]) for k in (3, 9)}
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG" and file.descriptions == ("land_cover",)
        assert file.overviews(1) and file.compression.name == "deflate"
        levels = len(file.overviews(1))
    threes = (codes[1] == 3).reshape(576, 2, 1152, 2).sum((1, 3))
    inside = (slice(60, 440), slice(110, 990))
    with rasterio.open(path, overview_level=0) as file:
        got = file.read(1)[inside]
    assert (got[threes[inside] > 2] == 3).all() and (got[threes[inside] < 2] == 9).all()
    with rasterio.open(path, overview_level=levels - 1) as file:
        assert (file.read(1)[20:100, 40:240] == 3).mean() > 0.9
    assert [p.name for p in path.parent.iterdir()] == ["m.tif"]


def test_failed_export_leaves_nothing(tmp_path):
    group = make_group(tmp_path, np.zeros((2, 64, 128), np.uint8))
    with pytest.raises(IndexError):
        write_cog(group["land_cover"], time=5, box=globe(64), flags=FLAGS, fill=0, path=tmp_path / "a" / "m.tif")
    assert not list((tmp_path / "a").iterdir())
