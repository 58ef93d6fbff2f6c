from __future__ import annotations

import pytest

from ai4land import sources
from ai4land.credits import Credit, credits_of, licence_of
from ai4land.describe import read_map
from tests.cubes import bare_cube
from tests.published import run_in


def of(*licences: str) -> list[Credit]:
    return [Credit(title=name, licence=name) for name in licences]


@pytest.mark.parametrize(
    ("ids", "others", "want"),
    [
        (["hildaplus-v2"], [], "CC-BY-4.0"),
        (["hildaplus-v2"], ["CC0-1.0", "CC-BY-4.0"], "CC-BY-4.0"),
        (["hildaplus-v2"], ["CC-BY-SA-4.0"], "CC-BY-SA-4.0"),
        (["hildaplus-v2", "luh2-v2h"], ["CC-BY-4.0"], "CC-BY-SA-4.0"),
        (["hildaplus-v2"], ["proprietary"], "other"),
        (["hildaplus-v2"], [""], "other"),
    ],
)
def test_licence_covers_all_inputs(tmp_path, ids, others, want):
    run = run_in(tmp_path, sources=ids)
    m = read_map(bare_cube(tmp_path / "c.zarr"), id="a", title="A")
    assert licence_of(run, m, [*of(*ids), *of(*others)]) == want


@pytest.mark.parametrize(("said", "want"), [("CC-BY-4.0", "CC-BY-4.0"), ("free for all", "other"), (None, "other")])
def test_without_sources_the_licence_is_that_of_the_cube(tmp_path, said, want):
    m = read_map(bare_cube(tmp_path / "c.zarr", **({} if said is None else {"license": said})), id="a", title="A")
    assert licence_of(run_in(tmp_path), m, of("CC0-1.0")) == want


def test_sources_and_collections_are_credited_once(tmp_path, terrain):
    layer = {"catalog": str(terrain), "collection": "relief", "asset": "height"}
    static = [{"name": "height", **layer}, {"name": "again", **layer}, {"name": "here", "path": "h.tif"}]
    found = credits_of(run_in(tmp_path, sources=["luh2-v2h", "luh2-v2h"], static=static))
    assert [c.title for c in found] == [sources.load_source("luh2-v2h").title, "Relief"]
    source, relief = found
    assert source.citation and source.doi and source.licence_url and source.url.startswith("https://")
    assert (relief.licence, relief.licence_url) == ("CC-BY-4.0", "https://example.org/terms")
    assert relief.providers == ({"name": "Hill Survey", "roles": ["producer"]},) and relief.url == ""
