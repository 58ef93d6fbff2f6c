from __future__ import annotations

import pytest

from ai4land.errors import ConfigError
from ai4land.publish.credits import credits_of
from ai4land.sources import known


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
def test_licence_covers_all_inputs(ids, others, want):
    assert known.mix({*(c.licence for c in credits_of(ids)), *others}) == want


def test_sources_and_collections_are_credited_once(terrain):
    found = credits_of(["luh2-v2h", "luh2-v2h"], [(str(terrain), "relief"), (str(terrain), "relief"), ("none.json", "luh2-v2h")])
    assert [c.title for c in found] == [known.load_source("luh2-v2h").title, "Relief"]
    source, relief = found
    assert source.citation and source.doi and source.licence_url and source.url.startswith("https://")
    assert (relief.licence, relief.licence_url) == ("CC-BY-4.0", "https://example.org/terms")
    assert relief.providers == ({"name": "Hill Survey", "roles": ["producer"]},) and relief.url == ""


def test_what_cannot_be_read_has_no_licence(tmp_path):
    told: list[str] = []
    (credit,) = credits_of([], [(str(tmp_path / "none.json"), "relief")], tell=told.append)
    assert (credit.title, credit.licence) == ("relief", "") and "licence of collection relief" in told[0]
    with pytest.raises(ConfigError, match="source is 'nobody'"):
        credits_of(["nobody"])
