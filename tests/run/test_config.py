from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from ai4land.errors import ConfigError
from ai4land.run.config import Coordinate, LandCoverConfig, RunConfig, StaticLayer
from ai4land.run.file import load_run, pipelines

SECTIONS = ("grid", "landcover", "scenario", "static", "split", "model", "train", "reconstruct")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    monkeypatch.delenv("AI4LAND_TEST_DATA", raising=False)


def rewritten(tmp_path: Path, **changes) -> Path:
    values = yaml.safe_load((pipelines() / "demo.yaml").read_text())
    values.update(changes)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [("demo", "luh2"), ("bavaria", "shares"), ("uk", "change"), ("bavaria_space", "shares"), ("global_modis", "fractions")],
)
def test_packaged_pipelines_load_and_save_equal(name, kind, tmp_path):
    run = load_run(f"{name}.yaml")
    assert (run.name, run.scenario.kind) == (name, kind)
    assert load_run(f"pipelines/{name}.yaml") == run
    run.save(tmp_path / "deep" / "config.yaml")
    again = load_run(tmp_path / "deep" / "config.yaml")
    assert again == run
    assert again.fingerprint(*SECTIONS) == run.fingerprint(*SECTIONS)


def test_missing_file_lists_the_packaged_ones(tmp_path):
    for path in ("nothing.yaml", tmp_path / "demo.yaml", tmp_path):
        with pytest.raises(ConfigError, match=r"does not exist.*'bavaria.yaml', .*'demo.yaml', .*'uk.yaml'"):
            load_run(path)


def test_overrides_reach_nested_keys_lists_and_years():
    run = load_run(
        "demo.yaml",
        ["train.steps=7", "reconstruct.years=[1992-1994, 1960]", "grid.bbox=[-180, -90, 180, 90]", "title=a = b",
         "split.space.block=3", "scenario.units=percent", "split.test=null"],
    )  # fmt: skip
    assert run.train.steps == 7
    assert run.reconstruct.years == [1960, 1992, 1993, 1994]
    assert run.title == "a = b"
    assert run.split.space is not None
    assert (run.split.space.block, run.split.space.buffer) == (3, 1)
    assert run.scenario.units == "percent"
    assert run.split.test is None
    assert run.train.batch == load_run("demo.yaml").train.batch


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=7", r"train\.stepz: Extra inputs"),
        ("colour=red", "colour: Extra inputs"),
        ("train.steps", "'train.steps', expected key=value"),
        ("train.steps.deep=1", "goes below 'steps', which is not a section"),
        ("train.steps=[1", "'train.steps=.1' is not YAML"),
        ("train.steps=many", r"train\.steps: .*got 'many'"),
        ("train.steps=0", r"train\.steps: .*greater than or equal to 1"),
        ("split.train=1999-1992", "expected the first year first"),
        ("split.train=", r"split\.train: .*expected numbers such as 1992"),
        ("split.train=[]", r"split\.train: .*at least 1 item"),
        ("split.train={a: 1}", r"split\.train: .*expected numbers"),
        ("scenario.kind=luh9", r"scenario: .*'luh2', 'shares', 'fractions', 'change'"),
        ("scenario.kind=shares", r"scenario\.shares\.path: Field required"),
        ("scenario={paths: [a]}", "scenario: Unable to extract tag using discriminator 'kind'"),
        ("scenario.variable=x", r"scenario\.luh2\.variable: Extra inputs"),
        ("static=[]", "static: .*at least 1 item"),
        ("name=a b", "name: String should match"),
        ("grid.shard=100", r"grid\.shard is 100, expected a multiple of 8 .*try 96"),
        ("train.patch=100", r"train\.patch is 100, expected a multiple of 8"),
        ("train.patch=296", r"train\.patch is 296, expected at most the shard of 288"),
        ("model.depth=5", r"train\.patch|grid\.shard"),
        ("constrain.method=sometimes", r"constrain\.method: .*'change', 'level' or 'none'"),
        ("constrain.keep=-1", r"constrain\.keep: .*greater than or equal to 0"),
        ("constrain.protected=parks", r"constrain\.protected is 'parks', expected a static map of \['elevation'"),
        ("train.precision=float16", r"train\.precision: .*'float32'"),
        ("split.train=[1992.9]", r"split\.train: .*expected numbers such as 1992"),
        ("train.steps=true", r"steps is True, expected no true or false"),
        ("reconstruct.reference=true", r"reference is True, expected no true or false"),
        ("split.train=true", r"train is True, expected no true or false"),
        ("constrain.lock=[11, true]", r"lock is \[11, True\], expected no true or false"),
        ("runs=s3://bucket/runs", r"folder is 's3://bucket/runs', expected one on this machine"),
        ("data=https://a.org/data", r"folder is 'https://a.org/data', expected one on this machine"),
    ],
)  # fmt: skip
def test_bad_overrides_are_refused_by_name(override, message):
    overrides = [override] if override != "model.depth=5" else ["train.patch=48", override]
    with pytest.raises(ConfigError, match=message):
        load_run("demo.yaml", overrides)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"name": "x"}, "needs either a path"),
        ({"name": "x", "path": "a.tif", "catalog": "c"}, "needs either a path"),
        ({"name": "x", "catalog": "c", "asset": "a"}, "needs either a path"),
        ({"name": "a b", "path": "a.tif"}, "String should match"),
        ({"name": "x", "path": "a.tif", "categorical": True, "resampling": "bilinear"}, "expected nearest, mode or exact"),
    ],
)
def test_static_layers_need_one_source(layer, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_run(rewritten(tmp_path, static=[layer]))


def test_static_layers_need_different_names(tmp_path):
    with pytest.raises(ConfigError, match="expected each name once"):
        load_run(rewritten(tmp_path, static=[{"name": "x", "path": "a.tif"}, {"name": "x", "path": "b.tif"}]))


@pytest.mark.parametrize("part", ["split.validation", "split.test", "reconstruct"])
def test_reference_map_may_be_left_out_where_training_does_without(part):
    run = load_run("demo.yaml", [f"{part}.reference=null"])
    section: Any = run
    for name in part.split("."):
        section = getattr(section, name)
    assert section.reference is None
    assert load_run("demo.yaml").fingerprint("split", "reconstruct") != run.fingerprint("split", "reconstruct")
    with pytest.raises(ConfigError, match=rf"train.mask_all is 0, expected more, because \['{part}'\] have no reference map"):
        load_run("demo.yaml", [f"{part}.reference=null", "train.mask_all=0"])
    with pytest.raises(ConfigError, match=r"reference: Field required"):
        load_run("demo.yaml", ["split.test={years: 2005}"])


def test_new_pipelines_do_without_a_reference_map():
    for name in ("bavaria_space", "global_modis"):
        run = load_run(f"{name}.yaml")
        assert run.reconstruct.reference is None and run.train.mask_all == 1 and run.split.max_lead == 0
        assert run.split.test is not None and run.split.test.reference is None and run.split.space is not None


def test_files_of_fractions_need_one_source_of_years():
    files = load_run("global_modis.yaml").scenario.files
    assert [(f.year, f.year_dim, f.select.get("rcp")) for f in files] == [(None, "period", "rcp60"), (2005, None, None)]
    for text in ("{path: a.nc}", "{path: a.nc, year: 2005, year_dim: time}"):
        with pytest.raises(ConfigError, match=r"file a\.nc needs either year, or year_dim"):
            load_run("global_modis.yaml", [f"scenario.files=[{text}]"])


def test_coordinates_are_static_layers_too(tmp_path):
    layers = [{"name": "north", "coordinate": "latitude"}, {"name": "x", "path": "a.tif"}]
    run = load_run(rewritten(tmp_path, static=layers))
    assert isinstance(run.static[0], Coordinate) and isinstance(run.static[1], StaticLayer) and not run.static[0].categorical
    run.save(tmp_path / "config.yaml")
    assert load_run(tmp_path / "config.yaml") == run
    with pytest.raises(ConfigError, match="expected each name once"):
        load_run(rewritten(tmp_path, static=[layers[0], {"name": "north", "path": "a.tif"}]))
    with pytest.raises(ConfigError, match="'latitude' or 'longitude'"):
        load_run(rewritten(tmp_path, static=[{"name": "up", "coordinate": "height"}]))


def test_static_layer_method_follows_its_kind():
    assert StaticLayer(name="a", path="a").method == "bilinear"
    assert StaticLayer(name="a", path="a", categorical=True).method == "nearest"
    assert StaticLayer(name="a", path="a", categorical=True, resampling="mode").method == "mode"


@pytest.mark.parametrize(
    "text", ["- a\n", "", "name: [", "plain", "1: 2\n", "!!python/object:ai4land.run.config.ModelConfig {}", b"\xff\xfe\x00"]
)
def test_files_that_are_no_run_are_refused(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_run(path)


def test_data_is_expanded_from_the_environment(tmp_path, monkeypatch):
    assert load_run("uk.yaml").data == "../shared/data"
    monkeypatch.setenv("AI4LAND_TEST_DATA", "/elsewhere")
    assert load_run("uk.yaml").data == "/elsewhere"
    assert load_run("uk.yaml", ["data=${AI4LAND_NOT_SET:-}/x"]).data == "/x"
    with pytest.raises(ConfigError, match="environment variable AI4LAND_NOT_SET is not set"):
        load_run("uk.yaml", ["data=${AI4LAND_NOT_SET}/x"])


def test_file_urls_are_paths_in_every_setting_that_names_a_place():
    run = load_run("demo.yaml", ["runs=file:///some/my%20runs", "data=file:///some/data"])
    assert run.folder == Path("/some/my runs") / run.name and run.data == "/some/data"
    assert run.path("file:///x/a.tif") == run.path("file:/x/a.tif") == "/x/a.tif"
    assert run.file("file:///x/a.csv") == Path("/x/a.csv") and run.file("a.csv") == Path("/some/data/a.csv")
    assert run.path("s3://bucket/a.zarr") == "s3://bucket/a.zarr"
    with pytest.raises(ConfigError, match=r"input is s3://bucket/a\.csv, expected a file on this machine"):
        run.file("s3://bucket/a.csv")


def test_paths_start_at_data():
    run = load_run("demo.yaml", ["data=base"])
    assert run.path("a/b.tif") == str(Path("base/a/b.tif"))
    assert run.path("/a/b.tif") == "/a/b.tif"
    assert run.path("s3://bucket/b.tif") == "s3://bucket/b.tif"
    assert run.folder == Path("runs/demo")


@pytest.mark.parametrize(
    ("override", "section"),
    [("grid.factor=8", "grid"), ("landcover.legend=ipcc", "landcover"), ("scenario.units=percent", "scenario"),
     ("split.max_lead=3", "split"), ("model.base=4", "model"), ("train.seed=9", "train"), ("reconstruct.workers=3", "reconstruct")],
)  # fmt: skip
def test_fingerprint_changes_with_its_section_alone(override, section):
    before, after = load_run("demo.yaml"), load_run("demo.yaml", [override])
    for name in SECTIONS:
        assert (before.fingerprint(name) == after.fingerprint(name)) == (name != section), name
    assert before.fingerprint(*SECTIONS) != after.fingerprint(*SECTIONS)


def test_runs_are_frozen():
    run = load_run("demo.yaml")
    with pytest.raises(ValueError, match="frozen"):
        run.train.steps = 3
    assert isinstance(run, RunConfig)


@pytest.mark.parametrize(
    ("landcover", "text"),
    [
        ({}, "landcover needs either a source, or catalog, collection and asset"),
        ({"source": "a.tif", "catalog": "c.json", "collection": "c", "asset": "a"}, "landcover needs either a source"),
        ({"catalog": "c.json", "collection": "c"}, "landcover needs either a source"),
        ({"catalog": "c.json", "collection": "c", "asset": "a", "resampling": "mode"}, "expected exact or nearest for a STAC"),
    ],
)
def test_maps_come_from_files_or_from_a_collection(landcover, text):
    with pytest.raises(ValidationError, match=text):
        LandCoverConfig(legend="hildaplus", **landcover)
