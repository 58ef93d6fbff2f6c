from __future__ import annotations

import pytest
import zarr

from ai4land.cube.describe import read_map
from ai4land.digests import digest
from ai4land.errors import DataError
from tests.cubes import LAND, bare_cube


def test_a_map_is_read_from_its_metadata(tmp_path):
    m = read_map(bare_cube(tmp_path / "c.zarr", years=(850, 851), ai4land_identity={"legend": "mine"}), id="a", title="A")
    assert m.years == (850, 851) and m.bbox == (-180, -90, 180, 90) and m.fill == 0 and not m.consolidated
    assert [f.code for f in m.flags] == [0, 5] and list(m.variables) == ["confidence", "land_cover"]
    assert m.stamps == ["2026-05-06T07:08:09Z"] and m.version == digest({"legend": "mine"})


@pytest.mark.parametrize(
    ("land", "message"),
    [
        ({}, "0 flag_values"),
        ({**LAND, "flag_meanings": "sea"}, "1 flag_meanings"),
        ({**LAND, "flag_colors": "#ffffff url(x)"}, r"colour 'url\(x\)'"),
    ],
)
def test_classes_that_can_not_be_read_are_refused(tmp_path, land, message):
    with pytest.raises(DataError, match=message):
        read_map(bare_cube(tmp_path / "c.zarr", land=land), id="a", title="A")


def test_what_is_no_cube_is_refused(tmp_path):
    group = zarr.open_group(bare_cube(tmp_path / "c.zarr"), mode="r+")
    group["spatial_ref"].attrs.put({"crs_wkt": "nonsense"})
    with pytest.raises(DataError, match="crs_wkt and GeoTransform"):
        read_map(tmp_path / "c.zarr", id="a", title="A")
    del group["year"]
    with pytest.raises(DataError, match="has no year"):
        read_map(tmp_path / "c.zarr", id="a", title="A")
