from __future__ import annotations

import json

import pytest

from ai4land.cube import cube, ledger
from ai4land.cube.verify import strike, verify
from ai4land.errors import DataError
from ai4land.grid import Window
from tests.cubes import ABOUT, PAIRS, YEARS, fill

GONE = Window(32, 0, 16, 16)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "cube.zarr"
    cube.create(path, identity={}, land=PAIRS, **ABOUT)
    fill(path, PAIRS)
    cube.show(path)
    assert verify(path) == []
    return path


def objects(path):
    return sorted(p for p in path.rglob("*") if p.is_file())


def test_one_flipped_byte_is_found_in_whatever_object_it_is(path):
    """Each object of the cube in turn, metadata and coordinates too, at its start, in its middle and at its end."""
    for number, file in enumerate(objects(path)):
        name, whole = file.relative_to(path).as_posix(), file.read_bytes()
        at = (0, len(whole) // 2, len(whole) - 1)[number % 3]
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        (damage,) = verify(path)
        assert damage.name == name, name
        shard = next((w for w in PAIRS if name.endswith(f"/{w.row // 16}/{w.col // 16}")), None)
        if "/c/" in name and shard is not None and name.split("/")[0] in ("land_cover", "fraction", "confidence"):
            assert {key[:2] for key in damage.keys} == {(shard.row, shard.col)} and "is damaged" in damage.what
        file.write_bytes(whole)
    assert number > 20 and verify(path) == []


def test_one_missing_object_is_found_whatever_it_is(path):
    for file in objects(path):
        whole = file.read_bytes()
        file.unlink()
        (damage,) = verify(path)
        assert str(damage) == f"{file.relative_to(path).as_posix()}: is missing"
        file.write_bytes(whole)


def test_a_truncated_ledger_is_found_and_what_it_lost_is_named(path):
    file = max(ledger.ledger_path(path).glob("*.jsonl"))
    whole = file.read_text()
    for text in (whole[: len(whole) // 2], whole.replace('"row": ', '"row": 1', 1), ""):
        file.write_text(text)
        found = verify(path)
        lost = {key for damage in found for key in damage.keys}
        assert lost and {key[:2] for key in lost} in ({(0, 0)}, {(16, 32)})
        assert any("the ledger lacks" in damage.what for damage in found)
    file.write_text(whole)
    assert verify(path) == []


def test_an_object_that_nothing_tells_of_is_found(path):
    (path / "land_cover/c/0/2").mkdir(parents=True, exist_ok=True)
    (path / "land_cover/c/0/2/2").write_bytes(b"x")
    (damage,) = verify(path)
    assert "no shard of the ledger has it" in damage.what
    strike(path, [damage])
    assert verify(path) == []


def test_years_that_are_not_seen_yet_may_lack(tmp_path):
    path = tmp_path / "cube.zarr"
    cube.create(path, identity={}, land=[*PAIRS, GONE], **ABOUT)
    fill(path, PAIRS)
    cube.show(path)
    assert verify(path) == []
    fill(path, [GONE])
    cube.show(path)
    assert verify(path) == []


def test_what_is_struck_is_to_be_done_again(path):
    file = path / "land_cover/c/0/0/0"
    file.write_bytes(b"")
    again = strike(path, verify(path))
    assert again == {(0, 0, year) for year in YEARS[:4]} and not file.exists()
    assert set(ledger.recorded(path)) == {(w.row, w.col, y) for w in PAIRS for y in YEARS} - again
    fill(path, PAIRS)
    assert verify(path) == [] and len(json.loads((path / "zarr.json").read_text())) > 1


@pytest.mark.parametrize("word", [b"created by", b'"legend": "hilda', b'"shape"', b"flag_meanings"])
def test_damaged_metadata_are_written_again_from_the_ledger(path, word):
    before = {p: p.read_bytes() for p in objects(path)}
    whole = (path / "zarr.json").read_bytes()
    assert word in whole
    (path / "zarr.json").write_bytes(whole.replace(word, word[:-1] + b"X", 1))
    strike(path, verify(path))
    cube.create(path, identity={}, land=PAIRS, **ABOUT)
    cube.show(path)
    assert {p: p.read_bytes() for p in objects(path)} == before and verify(path) == []


def test_a_cube_without_its_ledger_cannot_be_told(path):
    (ledger.ledger_path(path) / "template.json").unlink()
    with pytest.raises(DataError, match="has no whole template"):
        verify(path)
