from __future__ import annotations

import fnmatch
import hashlib
import json

import pystac
import pytest
import yaml
from pystac.validation import validate_dict
from pystac.validation.stac_validator import STACValidator

from ai4land.crosswalk import load_crosswalk
from ai4land.errors import ConfigError
from ai4land.legend import load_legend
from ai4land.run.file import load_run, pipelines
from ai4land.run.inputs import needed_years
from ai4land.sources.known import catalog_path, credits_of, licence_of, load_source

KNOWN = {p.parent.name: load_source(p.parent.name) for p in sorted(catalog_path().parent.glob("*/collection.json"))}


FILE_EXTENSION = "https://stac-extensions.github.io/file/v2.1.0/schema.json"
GLOBAL = ("global_1km.yaml", "global_300m.yaml")
DOCUMENTS = sorted(catalog_path().parent.rglob("*.json"))
HASHES = {"1220": 32, "d50110": 16}
"""Prefixes of multihashes (code and length): SHA-256 and MD5; bytes of each."""


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.parent.name)
def test_every_document_is_valid(path, schemas: STACValidator):
    fields = read(path)
    # The schema of the file extension is not among those at hand; its fields are checked below.
    extensions = [e for e in fields.get("stac_extensions", []) if e != FILE_EXTENSION]
    checked = validate_dict({**fields, "stac_extensions": extensions}, validator=schemas)
    assert len(checked) == 1 + len(extensions)


def test_an_invalid_document_is_told(schemas):
    fields = read(catalog_path().parent / "soilgrids" / "collection.json")
    for broken in ({**fields, "license": "no licence!"}, {k: v for k, v in fields.items() if not k.startswith("sci:")}):
        with pytest.raises(pystac.STACValidationError):
            validate_dict(broken, validator=schemas)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.parent.name)
def test_links_are_relative_and_lead_somewhere_and_a_doi_is_cited(path):
    fields = read(path)
    for link in fields["links"]:
        if link["rel"] in ("root", "parent", "child"):
            assert not link["href"].startswith(("/", "http")) and (path.parent / link["href"]).is_file()
        else:
            assert link["href"].startswith("https://")
    if fields["type"] == "Collection":
        assert path.parent.name == fields["id"]
        assert sum(link["rel"] == "license" for link in fields["links"]) == 1
        cited = [link["href"] for link in fields["links"] if link["rel"] == "cite-as"]
        assert cited == ([f"https://doi.org/{fields['sci:doi']}"] if "sci:doi" in fields else [])


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if p != catalog_path()], ids=lambda p: p.parent.name)
def test_files_have_an_address_and_whole_checksums(path):
    fields = read(path)
    told = [a for a in fields.get("assets", {}).values() if {"file:size", "file:checksum"} & set(a)]
    assert (FILE_EXTENSION in fields["stac_extensions"]) == bool(told)
    for asset in told:
        assert asset.get("file:size", 1) > 0
        if "file:checksum" in asset:
            prefix = next(p for p in HASHES if asset["file:checksum"].startswith(p))
            assert len(bytes.fromhex(asset["file:checksum"][len(prefix) :])) == HASHES[prefix]
    access = load_source(fields["id"]).access
    if access.kind == "url":
        assert access.files and all(f.href.startswith("https://") for f in access.files)
    elif access.kind == "stac":
        assert access.api.startswith("https://") and access.collection and access.asset and not access.files
    else:
        assert access.page.startswith("https://") and access.page in access.steps + load_source(fields["id"]).page
        assert access.steps and access.patterns


def test_the_catalogue_holds_what_the_project_uses():
    sources = KNOWN
    scenarios = {f"luh2-v2f-{s}" for s in ("ssp119", "ssp126", "ssp245", "ssp370", "ssp434", "ssp460", "ssp534", "ssp585")}
    assert scenarios | {"luh2-v2h", "luh3", "hildaplus-v2", "esa-cci-lc", "c3s-lc", "cop-dem-glo-30", "soilgrids"} <= set(sources)
    assert len(sources) == len(DOCUMENTS) - 1
    assert sources["luh2-v2h"].years == (850, 2015) and sources["luh2-v2f-ssp585"].years == (2015, 2100)
    for source in sources.values():
        assert source.title and source.citation and source.providers and source.licence_url
        assert source.years[0] <= source.years[1] and source.bbox[0] < source.bbox[2]
        assert source.bbox[0] >= -180 and source.bbox[2] <= 180 and len(set(source.providers)) == len(source.providers)


def test_legends_and_crosswalks_are_those_of_the_package():
    for source in KNOWN.values():
        if source.legend is not None:
            assert load_legend(source.legend).name == source.legend
        for name in source.crosswalks:
            assert load_crosswalk(name, load_legend(name.split("_to_")[1])).states


def test_sources_of_the_pipelines_are_known():
    for path in sorted(pipelines().glob("*.yaml")):
        named = yaml.safe_load(path.read_text(encoding="utf-8")).get("sources", [])
        assert [s.id for s in credits_of(named)] == sorted(set(named))


def test_checksums_are_those_of_the_real_files(real_data):
    folders = {"hildaplus-uk": "uk_hilda_plus", "koppen-geiger-0p1": "global_koppen_geiger"}
    checked = 0
    for name, folder in folders.items():
        for file in load_source(name).access.files:
            leaf = file.href.rsplit("/", 1)[1]
            local = real_data / folder / (leaf if name == "hildaplus-uk" else f"{file.key}_{leaf}")
            data = local.read_bytes()
            assert file.size == len(data) and file.checksum == "1220" + hashlib.sha256(data).hexdigest()
            checked += 1
    assert checked == 23


def test_a_doi_is_of_the_data_or_else_of_the_publication():
    assert load_source("hildaplus-v2").doi == "10.1594/PANGAEA.974335"
    assert load_source("soilgrids").doi == "10.5194/soil-7-217-2021"
    assert load_source("isimip3a-population").doi == ""


def test_an_unknown_source_is_told_what_there_is():
    with pytest.raises(ConfigError, match=r"source is 'luh4', expected one of \['c3s-lc', .*'soilgrids'\]"):
        load_source("luh4")
    for function in (credits_of, licence_of):
        with pytest.raises(ConfigError, match="source is 'luh4'"):
            function(["luh3", "luh4"])


def test_credits_name_each_source_once():
    assert [s.id for s in credits_of(["soilgrids", "luh3", "soilgrids"])] == ["luh3", "soilgrids"]
    assert credits_of([]) == []


@pytest.mark.parametrize(
    ("names", "licence"),
    [
        (["hildaplus-v1", "hildaplus-v2"], "CC-BY-4.0"),
        (["chelsa-bioclim"], "CC0-1.0"),
        (["chelsa-bioclim", "etopo5"], "CC-BY-4.0"),
        (["chelsa-bioclim", "etopo5", "soilgrids"], "CC-BY-4.0"),
        (["luh2-v2h", "luh2-v2f-ssp245"], "CC-BY-SA-4.0"),
        (["luh2-v2h", "hildaplus-v2", "chelsa-bioclim"], "CC-BY-SA-4.0"),
        (["luh2-v2h", "esa-cci-lc"], "other"),
        (["hildaplus-v2", "cop-dem-glo-30"], "other"),
        ([], "other"),
    ],
)
def test_the_licence_of_a_mix(names, licence):
    assert licence_of(names) == licence


@pytest.mark.parametrize("name", GLOBAL)
def test_global_runs_read_what_fetch_brings(name):
    run = load_run(name)
    known = {s.id: s for s in credits_of(run.sources)}
    paths = [*run.scenario.paths, run.scenario.static, *(s.path for s in run.static if s.path)]
    paths += [run.landcover.source] if run.landcover.source else []
    for path in paths:
        folder, _, leaf = path.partition("/")
        access = known[folder].access
        if access.kind == "url":
            assert leaf in [f.href.rpartition("/")[2] for f in access.files]
        else:
            assert access.kind == "manual" and any(fnmatch.fnmatch(leaf.replace("{year}", "2000"), p) for p in access.patterns)
    collections = {(s.catalog, s.collection, s.asset) for s in run.static if s.catalog}
    collections |= {(run.landcover.catalog, c, run.landcover.asset) for c in run.landcover.collections}
    for catalog, collection, asset in collections:
        assert catalog == "catalog.json" and known[collection].access.asset == asset
    used = {path.partition("/")[0] for path in paths} | {c for _, c, _ in collections}
    assert used == set(run.sources)
    maps = [known[c] for c in run.landcover.collections] or [known[str(run.landcover.source).partition("/")[0]]]
    assert needed_years(run)[0] <= {year for s in maps for year in range(s.years[0], s.years[1] + 1)}
