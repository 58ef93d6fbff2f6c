from __future__ import annotations

import numpy as np
import pytest
import zarr

from ai4land.describe import read_map
from ai4land.digests import digest
from ai4land.errors import DataError
from ai4land.grid import make_grid, spatial_ref

LAND = {"flag_values": [0, 5], "flag_meanings": "sea land", "flag_colors": "#ffffff #00aa00"}


def make(path, *, grid=None, land=LAND, years=(850,), **attrs):
    """The little of a cube that a catalogue reads."""
    grid = grid or make_grid((-180, -90, 180, 90), coarse_cell=45.0, factor=4, shard=8)
    group = zarr.create_group(path, attributes={"history": "2026-05-06T07:08:09Z created by ai4land 1.2.3 on", **attrs})
    shape, dims = (len(years), *grid.shape), ("time", "latitude", "longitude")
    group.create_array("land_cover", shape=shape, dtype="uint8", fill_value=0, dimension_names=dims, attributes=land)
    share = {"scale_factor": 0.004, "units": "1", "long_name": "how *sure*"}
    group.create_array("confidence", shape=shape, dtype="uint8", fill_value=255, dimension_names=dims, attributes=share)
    group.create_array("year", data=np.array(years, np.int32))
    for name in ("latitude", "longitude"):
        group.create_array(name, data=grid.coords()[name])
    group.create_array(
        "spatial_ref", shape=(), dtype="int32", attributes={k: str(v) for k, v in spatial_ref(grid.fine).attrs.items()}
    )
    return path


def test_a_map_is_read_from_its_metadata(tmp_path):
    m = read_map(make(tmp_path / "c.zarr", years=(850, 851), ai4land_identity={"legend": "mine"}), id="a", title="A")
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
        read_map(make(tmp_path / "c.zarr", land=land), id="a", title="A")


def test_what_is_no_cube_is_refused(tmp_path):
    group = zarr.open_group(make(tmp_path / "c.zarr"), mode="r+")
    group["spatial_ref"].attrs.put({"crs_wkt": "nonsense"})
    with pytest.raises(DataError, match="crs_wkt and GeoTransform"):
        read_map(tmp_path / "c.zarr", id="a", title="A")
    del group["year"]
    with pytest.raises(DataError, match="has no year"):
        read_map(tmp_path / "c.zarr", id="a", title="A")
