from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ai4land.store.contents import changed_files, contents_of, held_of, note_files, sample_of


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.sampled_from([0, 1, 1000, 2**22 - 1, 2**22, 2**22 + 1, 2**23]), at=st.floats(0, 1))
def test_a_changed_byte_of_a_small_file_and_another_size_of_any_are_seen(tmp_path, size, at):
    path = tmp_path / "a"
    data = bytearray(np.random.default_rng(size).bytes(size))
    path.write_bytes(data)
    before = sample_of(path)
    path.write_bytes(data + b"x")
    assert sample_of(path) != before
    where = min(int(at * size), size - 1)
    if 0 < size <= 2**22 or (where in (0, size - 1) and size):
        data[where] ^= 1
        path.write_bytes(data)
        assert sample_of(path) != before


def test_files_that_are_touched_or_gone_have_not_changed(tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir()
    paths = {name: data / name for name in ("same", "touched", "edited", "longer", "gone", "tile", "grown tile")}
    for path in paths.values():
        path.write_bytes(path.name.encode())
    named = {str(path): "tile" not in name for name, path in paths.items()}
    noted = note_files({**named, "s3://bucket/x": True, str(tmp_path): True, str(data / "never"): True}, beside=str(data))
    assert sorted(noted) == sorted(paths)
    os.utime(paths["touched"], (1, 1))
    for name, text in (
        ("edited", b"EDITED"),
        ("longer", b"longer than it was"),
        ("tile", b"TILE"),
        ("grown tile", b"a larger tile"),
    ):
        paths[name].write_bytes(text)
        os.utime(paths[name], (2, 2))
    paths["gone"].unlink()
    assert changed_files(noted, beside=str(data)) == sorted(str(paths[n]) for n in ("edited", "longer", "grown tile"))


def test_files_are_followed_where_their_names_lead(tmp_path: Path):
    for version in ("one", "two"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "states.nc").write_bytes(version.encode())
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "one")
    noted = note_files({str(link / "states.nc"): True}, beside=str(link))
    assert list(noted) == ["states.nc"]
    assert changed_files(noted, beside=str(tmp_path / "one")) == []
    assert changed_files(noted, beside=str(tmp_path / "two")) == [str(tmp_path / "two" / "states.nc")]
    link.unlink()
    link.symlink_to(tmp_path / "two")
    assert changed_files(noted, beside=str(link)) == [str(link / "states.nc")]


def test_a_zarr_group_is_known_by_its_metadata(tmp_path: Path):
    path = tmp_path / "maps.zarr"
    zarr.create_group(path, zarr_format=3)
    noted = note_files({str(path): True}, beside=str(tmp_path))
    assert list(noted) == ["maps.zarr/zarr.json"] and changed_files(noted, beside=str(tmp_path)) == []
    zarr.open_group(path).attrs["history"] = "made anew"
    assert len(changed_files(noted, beside=str(tmp_path))) == 1


def test_a_cube_is_made_from_its_own_years_and_those_on_the_way_to_them(tmp_path: Path):
    path = tmp_path / "store.zarr"
    years = [str(y) for y in range(2000, 2010)]
    held = {"mask": "m", "static": "s", "land_cover": dict.fromkeys(years, "l"), "coarse": dict.fromkeys(years, "c")}
    group = zarr.create_group(path, zarr_format=3)
    group.attrs["contents"] = held
    on_the_way, alone = held_of(path, reference=2001, years=[2003, 2005]), held_of(path, reference=None, years=[2003, 2005])
    group.attrs["contents"] = {**held, "coarse": {**held["coarse"], "2004": "other"}}
    assert held_of(path, reference=2001, years=[2003, 2005]) != on_the_way
    assert held_of(path, reference=None, years=[2003, 2005]) == alone
    group.attrs["contents"] = {**held, "coarse": {**held["coarse"], "2006": "other"}}
    assert held_of(path, reference=2001, years=[2003, 2005]) == on_the_way


def test_contents_are_those_of_the_years_asked_for(tmp_path: Path):
    held = {"mask": "m", "static": "s", "land_cover": {"2000": "a", "2001": "b"}, "coarse": {"2000": "c"}}
    path = tmp_path / "store.zarr"
    zarr.create_group(path, zarr_format=3).attrs["contents"] = held
    one = contents_of(path, maps=[2000], states=[2000])
    assert one == contents_of(path, maps={2000}, states=(2000,)) != contents_of(path, maps=[2000, 2001], states=[2000])
    for name, other in (("mask", "M"), ("static", "S"), ("land_cover", {"2000": "A"}), ("coarse", {"2000": "C"})):
        zarr.open_group(path).attrs["contents"] = {**held, name: other}
        assert contents_of(path, maps=[2000], states=[2000]) != one
    zarr.open_group(path).attrs["contents"] = {**held, "land_cover": {"2000": "a", "2001": "B", "2002": "new"}}
    assert contents_of(path, maps=[2000], states=[2000]) == one


@pytest.mark.parametrize("size", [2**22 + 1, 2**24])
def test_samples_reach_from_end_to_end(tmp_path: Path, size: int):
    path = tmp_path / "a"
    data = bytearray(size)
    path.write_bytes(data)
    before = sample_of(path)
    for where in (0, size - 1):
        path.write_bytes(data[:where] + b"\x01" + data[where + 1 :])
        assert sample_of(path) != before
