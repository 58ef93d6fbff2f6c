from __future__ import annotations

import json

import numpy as np
import pytest
import zarr
from affine import Affine
from odc.geo.geobox import GeoBox

from ai4land.cube import cube
from ai4land.cube.numbers import EMPTY, FRACTION_EMPTY, FRACTION_SCALE
from ai4land.errors import ConfigError, DataError
from ai4land.grid import centres, make_grid, spatial_ref
from ai4land.serve.atlas import MOST_CELLS, open_atlas, version_of
from ai4land.serve.tiles import point, tile
from tests.cubes import write_block
from tests.maps import CODES, FLAGS, HILDA, only, pixels, plain, some_codes, write_maps


def small_cube(path):
    """A cube as the writer makes it, 192 x 384 cells with an overview of 48 x 96: 4 years, of which the first 3 are whole."""
    grid = make_grid((-180, -90, 180, 90), coarse_cell=45.0, factor=48, shard=96)
    years = [1999, 2000, 2001, 2002]
    cube.create(path, grid=grid, legend=HILDA, years=years, identity={}, title="t", source="s", totals="exact", years_a_shard=1)
    maps = some_codes((4, *grid.shape), seed=3)
    for window in grid.shards():
        for i, year in enumerate(years):
            if year == 2002 and window.row:
                continue
            codes = maps[i][window.slices]
            empty = codes == HILDA.fill.code
            shares = (codes[None] == CODES[:, None, None]).astype(np.uint16) * FRACTION_SCALE
            sure = np.where(empty, EMPTY, 225).astype(np.uint8)
            arrays = {
                "land_cover": codes,
                "most_likely": codes,
                "fraction": np.where(empty, FRACTION_EMPTY, shares).astype(np.uint16),
                "confidence": sure,
                "change_probability": sure,
            }
            write_block(path, cube.Block(window, (year,)), {name: data[None] for name, data in arrays.items()})
    cube.show(path)
    return path, maps


def test_a_cube_of_the_writer_itself_is_opened(tmp_path):
    path, maps = small_cube(tmp_path / "cube.zarr")
    part = only(path)
    assert part.years == (1999, 2000, 2001) and part.attrs["title"] == "t" and part.bounds == (-180, -90, 180, 90)
    assert [e.code for e in part.legend] == CODES.tolist() and part.fill.code == HILDA.fill.code
    assert [e.name for e in part.legend] == [n.replace("_", " ") for n in HILDA.names]
    assert [e.colour for e in part.legend] == [c.colour.lower() for c in HILDA.classes]
    assert set(part.shares) == {"confidence", "change_probability"}
    assert [level.codes.shape for level in part.levels] == [(3, 192, 384), (3, 48, 96)]
    got = np.stack([pixels(tile(part, year=year, z=0, x=0, y=0)) for year in part.years])
    assert len(np.unique(got.reshape(-1, 4), axis=0)) == HILDA.n + 1
    found = point(part, lon=-179.9, lat=89.9, year=2000)
    code = int(maps[1, 0, 0])
    assert (found["code"] or HILDA.fill.code, found["confidence"]) == (code, None if code == HILDA.fill.code else 0.9)


def test_levels_come_from_the_layout_finest_first(tmp_path):
    codes = some_codes()
    path = write_maps(
        tmp_path / "c.zarr",
        codes=codes,
        levels={16: (codes[:, ::16, ::16], (2000, 2001, 2005)), 4: (codes[:2, ::4, ::4], (2000, 2001))},
    )
    levels = only(path).levels
    assert [level.codes.shape for level in levels] == [(3, 64, 128), (2, 16, 32), (3, 4, 8)]
    assert [level.cell for level in levels] == [2.8125, 11.25, 45.0]
    assert [sorted(level.index) for level in levels] == [[2000, 2001, 2005], [2000, 2001], [2000, 2001, 2005]]


def test_a_layout_that_is_not_ours_counts_for_nothing(tmp_path):
    layout = {"layout": [{"asset": "land_cover"}, {"asset": "../other/land_cover"}, {"asset": "overviews/9/land_cover"}, {}]}
    path = write_maps(tmp_path / "c.zarr", codes=some_codes(), attrs={"multiscales": layout})
    assert len(only(path).levels) == 1


def test_parts_are_child_groups(tmp_path):
    path = tmp_path / "c.zarr"
    for name in ("ssp126", "historical"):
        write_maps(path, codes=some_codes(), group=name, attrs={"title": name})
    zarr.open_group(path, mode="a").create_group("notes")
    atlas = open_atlas(str(path))
    assert list(atlas.parts) == ["historical", "ssp126"] and atlas.parts["ssp126"].attrs["title"] == "ssp126"


def test_a_region_keeps_its_bounds_and_its_projection(tmp_path):
    box = GeoBox((64, 64), Affine(1000, 0, 4_300_000, 0, -1000, 3_100_000), "EPSG:3035")
    part = only(write_maps(tmp_path / "c.zarr", codes=some_codes((3, 64, 64)), box=box))
    west, south, east, north = part.bounds
    assert 9 < west < east < 11.5 and 50 < south < north < 52 and not part.crs.is_geographic


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        ({"flag_colors": " ".join(["red"] * 8)}, "expected colours as #rrggbb"),
        ({"flag_colors": "#000000"}, "1 flag_colors, expected one of each"),
        ({"flag_meanings": ""}, "0 flag_meanings"),
        ({"flag_values": []}, "0 flag_values"),
    ],
)
def test_a_legend_that_does_not_fit_is_refused(tmp_path, spoil, text):
    path = write_maps(tmp_path / "c.zarr", codes=some_codes(), flags={**FLAGS, **spoil})
    with pytest.raises(DataError, match=text):
        open_atlas(str(path))


def test_codes_of_another_type_are_refused(tmp_path):
    path = write_maps(tmp_path / "c.zarr", codes=some_codes().astype(np.int16))
    with pytest.raises(DataError, match="int16, expected class codes as uint8"):
        open_atlas(str(path))


def test_what_is_no_cube_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no cube at .*ai4land reconstruct"):
        open_atlas(str(tmp_path / "none.zarr"))
    (tmp_path / "some").mkdir()
    with pytest.raises(DataError, match="no cube at"):
        open_atlas(str(tmp_path / "some"))
    (tmp_path / "file.zarr").write_text("{}")
    with pytest.raises(DataError, match="no cube at"):
        open_atlas(str(tmp_path / "file.zarr"))
    (tmp_path / "torn.zarr").mkdir()
    (tmp_path / "torn.zarr" / "zarr.json").write_text("{")
    with pytest.raises(DataError, match="no cube at"):
        open_atlas(str(tmp_path / "torn.zarr"))
    zarr.open_group(tmp_path / "store.zarr", mode="w").create_array("height", shape=(4,), dtype="f4")
    zarr.consolidate_metadata(tmp_path / "store.zarr")
    with pytest.raises(DataError, match="without a variable land_cover"):
        open_atlas(str(tmp_path / "store.zarr"))


def test_a_cube_without_a_finished_year_is_refused(tmp_path):
    grid = make_grid((-180, -90, 180, 90), coarse_cell=45.0, factor=8, shard=16)
    path = tmp_path / "cube.zarr"
    cube.create(path, grid=grid, legend=HILDA, years=[1999, 2000], identity={}, title="t", source="s", totals="exact")
    with pytest.raises(DataError, match="0 finished years, expected at least one"):
        open_atlas(str(path))


def test_a_part_without_a_finished_year_waits_for_it(tmp_path):
    path = write_maps(tmp_path / "c.zarr", codes=some_codes(), group="historical")
    write_maps(path, codes=some_codes((0, 64, 128)), years=(), group="ssp126")
    assert list(open_atlas(str(path)).parts) == ["historical"]


def test_an_address_that_does_not_answer_is_said_soon():
    with pytest.raises(ConfigError, match="nothing://x cannot be opened"):
        open_atlas("nothing://x")
    with pytest.raises(DataError, match=r"no cube at http://127\.0\.0\.1:9/x"):
        open_atlas("http://127.0.0.1:9/x")


def test_a_cube_whose_metadata_are_not_consolidated_is_refused(tmp_path):
    path = write_maps(tmp_path / "c.zarr", codes=some_codes())
    document = json.loads((path / "zarr.json").read_text())
    del document["consolidated_metadata"]
    (path / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="its metadata are not consolidated; make one with: ai4land reconstruct"):
        open_atlas(str(path))


def test_zoom_begins_where_a_tile_reads_little_enough(tmp_path):
    path = tmp_path / "big.zarr"
    side = 0.01
    box = GeoBox((18000, 36000), Affine(side, 0, -180, 0, -side, 90), "EPSG:4326")
    group = zarr.open_group(path, mode="w", zarr_format=3)
    about = {"grid_mapping": "spatial_ref", **FLAGS}
    dims = ("time", "latitude", "longitude")
    group.create_array(
        "land_cover",
        shape=(1, *box.shape),
        dtype="u1",
        chunks=(1, 450, 450),
        fill_value=0,
        dimension_names=dims,
        attributes=about,
    )
    for name, values in (*zip(dims[1:], centres(box), strict=True), ("time", np.zeros(1, "i4"))):
        group.create_array(name, data=values, dimension_names=(name,))
    group.create_array("year", data=np.array([2000], "i4"), dimension_names=("time",))
    group.create_array("spatial_ref", shape=(), dtype="i4", attributes=plain(spatial_ref(box).attrs))
    zarr.consolidate_metadata(path)
    part = only(path)
    first, last = part.zooms
    assert (360 / 2**first / side) ** 2 <= MOST_CELLS < (360 / 2 ** (first - 1) / side) * (180 / 2 ** (first - 1) / side) * 2
    assert 2 <= side / (360 / 256 / 2**last) <= 8


def test_the_version_changes_with_the_cube(tmp_path):
    path = write_maps(tmp_path / "c.zarr", codes=some_codes())
    before = version_of(str(path))
    assert open_atlas(str(path)).version == before
    zarr.open_group(path, mode="r+").attrs["title"] = "another"
    assert version_of(str(path)) != before
