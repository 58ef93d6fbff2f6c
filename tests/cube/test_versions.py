"""Icechunk over a cube in a folder and on a real S3 endpoint (moto)."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from typer.testing import CliRunner

from ai4land import cli
from ai4land.cube import cube, versions
from ai4land.cube.verify import strike, verify
from ai4land.cube.versions import commit, open_version, repository_path
from ai4land.errors import ConfigError, DataError, MismatchError
from ai4land.grid import Window, make_grid
from ai4land.places import delete, folder_of, inside, names, open_place, read, write
from tests.cubes import ABOUT, PAIRS, YEARS, fill

icechunk = pytest.importorskip("icechunk", reason="Icechunk is not installed: pip install ai4land[icechunk]")


@pytest.fixture(params=["folder", "file URL", "s3"])
def root(request, tmp_path):
    kinds = {"folder": lambda: tmp_path, "file URL": tmp_path.as_uri, "s3": lambda: request.getfixturevalue("bucket")}
    return kinds[request.param]()


@pytest.fixture
def place(root):
    """A cube whose first four years are whole."""
    made = inside(root, "cube.zarr")
    cube.create(made, identity={"model": "a"}, land=PAIRS, **ABOUT)
    fill(made, PAIRS, years=YEARS[:4])
    cube.show(made)
    return made


def test_every_year_is_a_commit_and_no_shard_is_copied(place):
    told: list[tuple[int, int, str]] = []
    assert commit(place, progress=lambda *step: told.append(step)) == YEARS[:4]
    assert told == [(i, 4, str(year)) for i, year in enumerate(YEARS[:4], start=1)]
    to = repository_path(place)
    assert open_version(to).identical(cube.open_cube(place))
    for count, year in enumerate(YEARS[:4], start=1):
        ds = open_version(to, year=year)
        assert ds["year"].values.tolist() == YEARS[:count]
        assert ds["land_cover"].identical(cube.open_cube(place)["land_cover"][:count])
    shards = [n for n in names(place) if n.startswith("land_cover/c/")]
    delete(place, shards[0])
    with pytest.raises(icechunk.IcechunkError, match="error fetching virtual reference"):
        open_version(to)["land_cover"].load()


def test_new_years_are_added_and_old_commits_stay(place):
    commit(place)
    before = open_version(repository_path(place), year=2006).load()
    assert commit(place) == []
    fill(place, PAIRS, years=YEARS[4:])
    cube.show(place)
    assert commit(place) == [2007]
    now = open_version(repository_path(place))
    assert now["year"].values.tolist() == YEARS and now.identical(cube.open_cube(place))
    assert open_version(repository_path(place), year=2006).identical(before)


def age(place):
    """Make the files of a cube an hour old: Icechunk tells their times to the second."""
    folder = folder_of(place)
    for path in () if folder is None else folder.rglob("*"):
        os.utime(path, (time.time() - 3600.25,) * 2)


def make_again(place, *, seed: int) -> None:
    name = next(n for n in names(place) if n.startswith("land_cover/c/"))
    write(place, name, b"x" * len(read(place, name) or b""))
    strike(place, verify(place))
    fill(place, PAIRS, years=YEARS[:4], seed=seed)
    assert verify(place) == []


def test_a_shard_made_again_with_other_cells_is_refused_in_old_commits(place):
    age(place)
    commit(place)
    old = open_version(repository_path(place), year=2005).load()
    make_again(place, seed=7)
    with pytest.raises(icechunk.IcechunkError, match="the object owning the virtual chunk has changed"):
        open_version(repository_path(place), year=2005).load()
    assert commit(place) == []
    now = open_version(repository_path(place)).load()
    assert now.identical(cube.open_cube(place).load()) and not now["land_cover"][:3].equals(old["land_cover"])
    with pytest.raises(icechunk.IcechunkError, match="the object owning the virtual chunk has changed"):
        open_version(repository_path(place), year=2005).load()
    assert commit(place) == [] and open_version(repository_path(place), year=2006).identical(now)


def test_a_shard_made_again_with_the_same_cells_is_read(place):
    age(place)
    commit(place)
    before = open_version(repository_path(place)).load()
    make_again(place, seed=0)
    if folder_of(place) is not None:
        with pytest.raises(icechunk.IcechunkError, match="the object owning the virtual chunk has changed"):
            open_version(repository_path(place)).load()
    else:  # an object with the same bytes has the same ETag
        assert open_version(repository_path(place), year=2005).load().identical(before.isel(time=slice(3)))
    assert commit(place) == [] and open_version(repository_path(place)).identical(before)
    fill(place, PAIRS, years=YEARS[4:])
    cube.show(place)
    assert commit(place) == [2007] and open_version(repository_path(place)).identical(cube.open_cube(place))


@pytest.mark.parametrize(("content", "said"), [(b"x", "has 1 bytes"), (None, "is missing")])
def test_a_damaged_cube_is_not_committed(place, content, said):
    name = next(n for n in names(place) if n.startswith("land_cover/c/"))
    delete(place, name) if content is None else write(place, name, content)
    with pytest.raises(DataError, match=rf"{name} of .* {said}, expected \d+ as in the ledger; mend the cube with"):
        commit(place)


def test_overviews_and_parts_are_there_too(root):
    part = inside(inside(root, "world.zarr"), "ssp126")
    grid = make_grid((-180, -90, 180, 90), coarse_cell=45.0, factor=48, shard=96)
    windows = [Window(0, 0, 96, 96), Window(96, 192, 96, 96)]
    cube.create(part, identity={}, land=windows, **{**ABOUT, "grid": grid})
    fill(part, windows)
    cube.show(part)
    assert commit(part) == YEARS
    to = repository_path(part)
    assert str(to).endswith("world.icechunk/ssp126")
    store = versions._repository(to, cube=None).readonly_session("main").store
    seen, want = (zarr.open_group(s, mode="r")["overviews/1/land_cover"][...] for s in (store, open_place(part, read_only=True)))
    assert np.array_equal(seen, want) and np.unique(want).size > 2


def test_another_cube_is_refused(place, root):
    commit(place)
    other = inside(root, "other.zarr")
    cube.create(other, identity={"model": "b"}, land=PAIRS, **ABOUT)
    fill(other, PAIRS)
    cube.show(other)
    with pytest.raises(MismatchError, match=r"repository .*cube\.icechunk is of .*cube\.zarr/, and not of .*other\.zarr/"):
        commit(other, to=repository_path(place))


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="no repository at"):
        open_version(tmp_path / "none.icechunk")
    assert not (tmp_path / "none.icechunk").exists()
    with pytest.raises(DataError, match="has no whole template"):
        commit(tmp_path / "none.zarr")
    cube.create(tmp_path / "cube.zarr", identity={}, land=PAIRS, **ABOUT)
    assert commit(tmp_path / "cube.zarr") == []
    with pytest.raises(DataError, match="has no commit;"):
        open_version(tmp_path / "cube.icechunk")
    cube.create(tmp_path / "a b" / "cube.zarr", identity={}, land=PAIRS, **ABOUT)
    with pytest.raises(ConfigError, match="has characters that Icechunk cannot find a chunk by"):
        commit(tmp_path / "a b" / "cube.zarr")
    assert not (tmp_path / "a b" / "cube.icechunk").exists()
    with pytest.raises(ConfigError, match="gs://b/r is at a URL that Icechunk is not used with here"):
        open_version("gs://b/r")


def test_command_line(tmp_path: Path):
    cube.create(tmp_path / "cube.zarr", identity={}, land=PAIRS, **ABOUT)
    fill(tmp_path / "cube.zarr", PAIRS)
    cube.show(tmp_path / "cube.zarr")
    done = CliRunner().invoke(cli.app, ["commit", str(tmp_path / "cube.zarr"), "--to", str(tmp_path / "repo")])
    assert done.exit_code == 0 and done.stdout.strip().endswith("repo")
    with pytest.raises(DataError, match="has no commit of 1999"):
        open_version(tmp_path / "repo", year=1999)
    assert open_version(tmp_path / "repo", year=2005)["year"].values.tolist() == [2000, 2001, 2005]
