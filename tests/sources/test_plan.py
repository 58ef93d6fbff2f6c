from __future__ import annotations

import sys

import pystac
import pytest
import requests

from ai4land.errors import ConfigError, DataError
from ai4land.sources.known import catalog_path, load_source
from ai4land.sources.plan import _signed, plan_known, signer

NONE = {"years": None, "bbox": None, "headers": {}, "modifier": None, "timeout": 5}

KNOWN = {p.parent.name: load_source(p.parent.name) for p in sorted(catalog_path().parent.glob("*/collection.json"))}


def names(source, folder, **options):
    plan = plan_known(load_source(source), folder=folder, **{**NONE, **options})
    return [f.name for thing in plan.things for f in thing.files.values()]


def test_files_of_every_source_have_places_of_their_own(tmp_path):
    counted = 0
    for source in KNOWN.values():
        if source.access.kind == "url":
            placed = names(source.id, tmp_path)
            assert len(set(placed)) == len(placed) == len(source.access.files) and all("/" not in n for n in placed)
            counted += len(placed)
    assert counted > 50
    assert names("luh2-v2h", tmp_path) == ["states.nc", "staticData_quarterdeg.nc"]
    assert "CHELSA_bio1_1981-2010_V.2.1.tif" in names("chelsa-bioclim", tmp_path)


def test_a_file_has_the_same_name_whatever_is_asked_for_beside_it(tmp_path):
    one = names("koppen-geiger-0p1", tmp_path, years=[1970])
    assert one == ["1961_1990.tif"] and set(one) < set(names("koppen-geiger-0p1", tmp_path))


def test_years_choose_files_and_files_without_years_are_always_taken(tmp_path):
    assert names("ghs-pop", tmp_path, years=range(1990, 1996)) == [
        f"GHS_POP_E{y}_GLOBE_R2023A_4326_30ss_V1_0.zip" for y in (1990, 1995)
    ]
    assert len(names("soilgrids", tmp_path, years=[2000])) == 18
    with pytest.raises(DataError, match="ghs-pop has no file of the years asked for"):
        names("ghs-pop", tmp_path, years=[1991])
    with pytest.raises(DataError, match="years of ghs-pop are 1975-2020"):
        names("ghs-pop", tmp_path, years=[1900])


def test_files_by_hand_are_found_by_their_names_with_their_years(tmp_path):
    for name in (
        "a/states_1960.tif",
        "states_all.tif",
        "states_1960_1970.tif",
        "other.tif",
        "states_1961.tif.part",
        "states_9.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "states_link.tif").symlink_to(tmp_path / "other.tif")
    plan = plan_known(load_source("hildaplus-v2"), folder=tmp_path, **NONE)
    assert sorted(f.name for t in plan.things for f in t.files.values()) == [
        "a/states_1960.tif",
        "states_1960_1970.tif",
        "states_all.tif",
    ]
    (tmp_path / "x").mkdir()
    source = load_source("luh3")
    (tmp_path / "x" / "multiple-states_0850-2024.nc").write_bytes(b"x")
    (thing,) = plan_known(source, folder=tmp_path / "x", **NONE).things
    item = thing.item(tmp_path / "x")
    assert item["properties"]["start_datetime"] == "0850-01-01T00:00:00Z" and item["properties"]["end_datetime"][:4] == "2024"
    assert item["assets"]["data"]["type"] == "application/netcdf"


def test_signers_are_named(monkeypatch):
    assert signer("") is None
    with pytest.raises(ConfigError, match="signing is 'me', expected planetary_computer"):
        signer("me")
    monkeypatch.setitem(sys.modules, "planetary_computer", None)
    with pytest.raises(ConfigError, match="package planetary-computer is not installed"):
        signer("planetary_computer")
    with pytest.raises(ConfigError, match="package planetary-computer is not installed"):
        names("cop-dem-glo-30", None)


def test_a_signature_that_fails_is_told_and_a_broken_line_is_tried_again():
    item = pystac.Item("a", None, None, None, {"start_datetime": "2000-01-01T00:00:00Z", "end_datetime": "2001-01-01T00:00:00Z"})
    item.add_asset("h", pystac.Asset("https://a.org/h.tif"))

    def fails(error):
        def modifier(item):
            item.assets["h"].href = "https://changed.org"
            raise error

        return modifier

    with pytest.raises(DataError, match="item a can not be signed"):
        _signed(item, "h", fails(KeyError("token")))
    with pytest.raises(requests.ConnectionError):
        _signed(item, "h", fails(requests.ConnectionError("cut")))
    assert item.assets["h"].href == "https://a.org/h.tif"
