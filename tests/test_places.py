"""Cubes in a folder and in an object store (a real S3 endpoint: moto), by the same code."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import xarray as xr

from ai4land import places
from ai4land.cube import claim as claims
from ai4land.cube import cube, ledger
from ai4land.cube.claim import check_claim, claim
from ai4land.cube.verify import strike, verify
from ai4land.cube.writer import Writer
from ai4land.errors import ConfigError, DataError, MismatchError
from ai4land.grid import Window, make_grid
from ai4land.places import delete, inside, lock, names, read, write
from tests.cubes import ABOUT, PAIRS, YEARS, cells, fill
from tests.waiting import until


@pytest.fixture(params=["folder", "file URL", "s3", "memory"])
def place(request, tmp_path):
    """A place of each kind: a folder by its path and by a URL, obstore and fsspec."""
    if request.param == "folder":
        return tmp_path / "place"
    if request.param == "file URL":
        return (tmp_path / "a place").as_uri()
    if request.param == "s3":
        return request.getfixturevalue("bucket")
    return f"memory://{tmp_path.name}"


def test_objects_are_written_read_listed_and_deleted(place):
    assert names(place) == [] and read(place, "a/b") is None
    write(place, "a/b", b"one")
    write(place, "a/b", b"two")
    write(place, "c", b"")
    assert names(place) == ["a/b", "c"] and names(place, "a/") == ["a/b"]
    assert read(place, "a/b") == b"two" and read(place, "c") == b"" and read(place, "a") is None
    delete(place, "a/b")
    delete(place, "a/b")
    assert names(place) == ["c"]


def test_a_prefix_is_of_characters(place):
    for name in ("0-12-ab.jsonl", "0-12-cd.jsonl", "0-120-ab.jsonl", "10-12-ab.jsonl", "part/0-12-x", "part/c/0", "party"):
        write(place, name, b"x")
    assert names(place, "0-12-") == ["0-12-ab.jsonl", "0-12-cd.jsonl"]
    assert names(place, "0-12-cd.jsonl") == ["0-12-cd.jsonl"]
    assert names(place, "part") == ["part/0-12-x", "part/c/0", "party"]
    assert names(place, "part/0-") == ["part/0-12-x"] and names(place, "part/") == ["part/0-12-x", "part/c/0"]
    assert names(place, "nothing/") == names(place, "0-13") == []


def test_a_shard_finds_its_own_records(place):
    path = inside(place, "cube.zarr")
    for row, col, years in ((0, 12, [2000, 2001]), (0, 12, [2002]), (0, 120, [2003]), (12, 0, [2004])):
        ledger.Book(path, row=row, col=col).enter(years=years, files={})
    assert ledger.years_of(path, row=0, col=12) == {2000, 2001, 2002}
    assert ledger.years_of(path, row=0, col=120) == {2003} and ledger.years_of(path, row=0, col=1) == set()


def test_a_cube_is_the_same_everywhere(place, tmp_path):
    here = tmp_path / "here.zarr"
    there = inside(place, "cube.zarr")
    for path in (here, there):
        cube.create(path, identity={}, land=PAIRS, **ABOUT)
        fill(path, PAIRS)
        assert cube.show(path) == YEARS and verify(path) == []
    assert ledger.recorded(here) == ledger.recorded(there)
    chunks = {name: read(here, name) for name in names(here) if "/c/" in name}
    assert {name: read(there, name) for name in names(there) if "/c/" in name} == chunks and len(chunks) > 20
    assert cube.open_cube(there).equals(cube.open_cube(here))
    name = "land_cover/c/0/0/0"
    write(there, name, chunks[name][:-1] + bytes([chunks[name][-1] ^ 1]))
    (damage,) = verify(there)
    assert damage.name == name
    strike(there, [damage])
    assert {y for *_, y in set(ledger.recorded(here)) - set(ledger.recorded(there))} == set(YEARS[:4])
    cube.create(there, identity={}, land=PAIRS, **ABOUT)
    with pytest.raises(MismatchError, match="differs in model"):
        cube.create(there, identity={"model": "b"}, land=PAIRS, **ABOUT)


def test_parts_lie_in_an_object_store_too(bucket):
    root = inside(bucket, "world.zarr")
    for name in ("historical", "ssp126"):
        cube.create(inside(root, name), identity={}, land=PAIRS, **ABOUT)
        fill(inside(root, name), PAIRS)
        cube.show(inside(root, name))
    with pytest.raises(DataError, match=f"open one of them: {root}/historical"):
        cube.open_cube(root)
    assert cube.open_cube(inside(root, "ssp126"))["year"].values.tolist() == YEARS
    store = places.open_place(root, read_only=True)
    assert xr.open_zarr(store, group="ssp126", consolidated=True, chunks=None)["land_cover"].shape[0] == len(YEARS)


def test_years_of_one_pixel_are_few_reads(bucket, s3):
    """From a fresh store: one request for the metadata, and two ranged reads for ten years: 20 for a century."""
    grid = make_grid((-180, -90, 180, 90), coarse_cell=45.0, factor=128, shard=512)  # four chunks a shard
    place, window, years = inside(bucket, "years.zarr"), Window(0, 0, 512, 512), list(range(1900, 1920))
    cube.create(place, identity={}, land=[window], **{**ABOUT, "grid": grid, "years": years, "years_a_shard": 10})
    made = cells(cube.Block(window, (1900,)))
    writer = Writer(place, window)
    for year in years:
        made["land_cover"] = np.roll(made["land_cover"], 1, axis=-1)
        writer.add(year, {name: a[0] for name, a in made.items()})
    cube.show(place)
    s3.asked.clear()
    ds = cube.open_cube(place)
    assert ds["year"].size == 20
    metadata = [path for method, path, _ in s3.asked if path.endswith(".json") or method == "HEAD" or "list-type" in path]
    assert len(metadata) == 1 and metadata[0].endswith("years.zarr/zarr.json")
    opened = len(s3.asked)
    assert opened <= 10  # the coordinates, a read each
    s3.asked.clear()
    pixel = ds["land_cover"].sel(latitude=80, longitude=-170, method="nearest").values
    assert len(np.unique(pixel)) > 3 and pixel.shape == (20,)
    assert dict(s3.requests) == {"GET range": 2 * 2} and opened + 2 * 10 <= 100


def test_places_that_no_library_knows_are_refused():
    with pytest.raises(ConfigError, match=r"nowhere://x cannot be opened .*expected a folder or a URL such as s3://"):
        names("nowhere://x")


# -- what fails ---------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    write(tmp_path, "a", b"before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot be written: .*No space left on device; mend it .free space"):
        write(tmp_path, "a", b"after")
    monkeypatch.undo()
    assert read(tmp_path, "a") == b"before" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataError, match=r"file cannot be written: .*Not a directory|File exists"):
        write(tmp_path / "file", "a/b", b"x")
    if os.geteuid():  # who is root may write all
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        with pytest.raises(DataError, match=r"cannot be written: .*Permission denied"):
            write(tmp_path, "a", b"x")


def test_a_bucket_that_is_not_there_says_so(s3):
    with pytest.raises(DataError, match=r"s3://no-such-bucket/x cannot be written: .*NoSuchBucket"):
        write("s3://no-such-bucket/x", "a", b"x")


@pytest.mark.parametrize("mode", ["refuse", "cut", "hang"])
def test_a_store_that_is_away_for_a_moment_is_waited_for(bucket, s3, mode, monkeypatch):
    monkeypatch.setattr(places, "_REQUEST", places._REQUEST / 10)
    places._remote.cache_clear()
    write(bucket, "before", b"x")
    began = time.monotonic()
    s3.fail(mode, 2.0)
    write(bucket, "a", b"y" * 100_000)
    assert read(bucket, "a") == b"y" * 100_000 and time.monotonic() - began > 1.5


def test_locks_and_files_need_no_zarr():
    code = (
        "import sys, ai4land.places as s; s.folder_of('a'); print([m for m in ('zarr', 'fsspec', 'obstore') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "[]"


def test_a_lock_is_held_by_one_until_it_is_closed(tmp_path):
    path = tmp_path / "new" / "lock"
    with lock(path) as file:
        file.write("mine")
        file.flush()
        with pytest.raises(BlockingIOError):
            lock(path)
        free = threading.Timer(0.3, file.close)
        free.start()
        lock(path, wait=True).close()
        free.join()
    with lock(path) as file:
        assert file.read() == "mine"
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(DataError, match=r"link cannot be written: .*symbolic link"):
        lock(tmp_path / "link")


# -- claims -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(claims, "_BEAT", 0.2)
    monkeypatch.setattr(claims, "_STALE", 1.5)


def test_a_cube_is_held_by_one_at_a_time(place, quick):
    path = inside(place, "cube.zarr")
    with claim(path) as token:
        check_claim(path, token)
        with pytest.raises(MismatchError, match=rf"being made by another run \(process {os.getpid()} on"), claim(path):
            pass
        with claim(inside(place, "other.zarr")):
            pass
        check_claim(path, token)
    with pytest.raises(MismatchError, match="held by another run by now"):
        check_claim(path, token)
    with claim(path) as again:
        assert again != token
        with claim(path, held=again) as inner:  # as mending does, which reconstructs under its own claim
            assert inner == again
        check_claim(path, again)
    with pytest.raises(MismatchError, match="held by another run by now"), claim(path, held=token):
        pass


def test_a_claim_without_locks_is_one_that_is_renewed(tmp_path, quick, monkeypatch):
    def lockless(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", lockless)
    path = tmp_path / "cube.zarr"
    with claim(path) as token:
        until(lambda: claims._held(ledger.ledger_path(path)).get("beat", 0) > 1, seconds=20)
        check_claim(path, token)
        with pytest.raises(MismatchError, match="is being made by another run"), claim(path):
            pass
    assert ledger.CLAIM not in names(ledger.ledger_path(path))


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"null"])
def test_a_damaged_claim_counts_as_none(place, quick, content):
    path = inside(place, "cube.zarr")
    write(ledger.ledger_path(path), ledger.CLAIM, content)
    with pytest.raises(MismatchError, match="held by another run by now"):
        check_claim(path, "t")
    with claim(path) as token:
        check_claim(path, token)


def test_a_claim_that_nobody_renews_is_taken_over_and_its_tasks_write_no_more(bucket, quick, monkeypatch):
    path, told = inside(bucket, "cube.zarr"), []
    cube.create(path, identity={}, land=PAIRS, **ABOUT)
    dead = {"token": "t", "host": "elsewhere", "pid": 1, "since": "2026", "beat": 3}
    write(ledger.ledger_path(path), ledger.CLAIM, claims.json.dumps(dead).encode())
    orphan = Writer(path, PAIRS[0], token="t")
    check_claim(path, "t")
    with claim(path, tell=told.append):
        assert "was held by process 1 on elsewhere; waiting up to" in told[0]
        with pytest.raises(MismatchError, match="this task is of one before it; nothing is written any more"):
            made = cells(cube.Block(PAIRS[0], tuple(YEARS)))
            for i, year in enumerate(YEARS):
                orphan.add(year, {name: a[i] for name, a in made.items()})
        assert ledger.recorded(path) == {} and not [n for n in names(path) if n.startswith("land_cover/c")]


def test_a_claim_goes_on_through_a_store_that_is_away(bucket, s3, quick):
    path = inside(bucket, "cube.zarr")
    with claim(path) as token:
        s3.fail("refuse", 1.0)
        time.sleep(1.5)
        until(lambda: claims._held(ledger.ledger_path(path)).get("beat", 0) > 1, seconds=20)
        check_claim(path, token)
    assert ledger.CLAIM not in names(ledger.ledger_path(path))


def test_of_many_that_want_a_cube_at_once_one_has_it(place, quick):
    path, start = inside(place, "cube.zarr"), threading.Barrier(4)
    outcome = []

    def want() -> None:
        start.wait()
        try:
            with claim(path):
                outcome.append("held")
                time.sleep(2.5)
        except MismatchError:
            outcome.append("refused")

    many = [threading.Thread(target=want) for _ in range(4)]
    for one in many:
        one.start()
    for one in many:
        one.join()
    assert sorted(outcome) == ["held", "refused", "refused", "refused"]
