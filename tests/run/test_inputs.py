from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from ai4land.errors import ConfigError
from ai4land.legend import load_legend
from ai4land.run import inputs
from ai4land.run.inputs import Inputs
from ai4land.train.splits import TEST, VALIDATION, Scored
from tests.runs import RUN, SMALL, run_of


def test_maps_and_states_are_needed_where_they_are_used():
    maps, states = inputs.needed_years(run_of())
    assert maps == {2000, 2001, 2002, 2003, 2005, 2006}
    assert states == set(range(2000, 2008))


def test_run_without_test_years_does_not_need_their_maps():
    maps, _ = inputs.needed_years(run_of(split={**SMALL["split"], "test": None}))
    assert maps == {2000, 2001, 2002, 2003}


def test_scenario_years_on_the_way_from_the_reference_map_are_needed_where_they_are_there():
    split = {**SMALL["split"], "test": {"reference": 2003, "years": [2008]}}
    run = run_of(split=split, reconstruct={"reference": 2003, "years": [2000, 2006]})
    plain = {2000, 2001, 2002, 2003, 2006, 2008}
    assert inputs.needed_years(run)[1] == plain
    assert inputs.needed_years(run, held=range(1990, 2020))[1] == plain | {2004, 2005, 2007}
    assert inputs.needed_years(run, held=[1999, 2004, 2009])[1] == plain | {2004}
    assert inputs.needed_years(run, held=range(1990, 2020))[0] == inputs.needed_years(run)[0]


def test_nothing_lies_on_the_way_without_a_reference_map():
    split = {"train": "2000-2002", "max_lead": 0, "validation": {"reference": None, "years": 2001}, "test": None}
    split["space"] = {"block": 2, "validation": 0.3, "test": 0.0}
    run = run_of(split=split, reconstruct={"reference": None, "years": [1990, 2020]})
    maps, states = inputs.needed_years(run, held=range(1980, 2030))
    assert (maps, states) == ({2000, 2001, 2002}, {1990, 2000, 2001, 2002, 2020})
    assert inputs.mask_year(run) == 2000 and inputs.mask_year(run_of()) == 2003
    assert inputs.cubes_of(run)["validation"][1] is None
    assert Inputs.of(run).identity["reference"] is None and Inputs.of(run).identity["mask_year"] == 2000
    assert "mask_year" not in Inputs.of(run_of()).identity
    assert Inputs.of(run).split.validation == Scored(None, (2001,))


def test_scenario_years_are_found_without_reading_it(tmp_path: Path):
    times = {"time": ("time", [10, 12], {"units": "years since 1990-01-01"})}
    xr.Dataset(coords=times).to_netcdf(tmp_path / "a.nc")
    xr.Dataset(coords={"year": [2001, 2003], "time": ("time", [2005])}).to_netcdf(tmp_path / "b.nc")
    luh2 = {"kind": "luh2", "paths": ["a.nc", "b.nc"], "time_units": None}
    assert inputs.held_states(run_of(data=str(tmp_path), scenario=luh2)) == {2000, 2002, 2005}
    assert inputs.held_states(run_of(data=str(tmp_path), scenario={"kind": "shares", "path": "b.nc", "variable": "v"})) == {
        2001,
        2003,
    }
    change = {"kind": "change", "base_year": 2009, "paths": {2010: "x.tif", 2011: "y.tif"}}
    assert inputs.held_states(run_of(scenario=change)) == {2009, 2010, 2011}
    years = {"files": [{"path": "b.nc", "year_dim": "year"}, {"path": "a.nc", "year": 2006}], "states": {"crop": "v"}}
    fractions = {"kind": "fractions", "crosswalk": "isimip2b_to_igbp", **years}
    assert inputs.held_states(run_of(data=str(tmp_path), scenario=fractions)) == {2001, 2003, 2006}
    igbp = {**RUN["landcover"], "legend": "igbp"}
    run = run_of(data=str(tmp_path), landcover=igbp, scenario={**fractions, "interpolate": True})
    assert inputs.held_states(run) == set(range(2001, 2007)) and "linearly" in Inputs.of(run).identity["interpolated"]


years = st.integers(1990, 2010)
experiments = st.none() | st.fixed_dictionaries(
    {"reference": st.none() | years, "years": st.sets(years, min_size=1, max_size=4).map(sorted)}
)


@given(
    validation=experiments, test=experiments, reference=st.none() | years, made=st.sets(years, min_size=1, max_size=5).map(sorted)
)
def test_every_scored_year_is_in_a_cube_from_its_reference_map(validation, test, reference, made):
    run = run_of(
        split={"train": [2000, 2001], "validation": validation, "test": test}, reconstruct={"reference": reference, "years": made}
    )
    cubes = inputs.cubes_of(run)
    assert cubes["cube"] == (run.folder / "cube.zarr", reference, made)
    assert len({path for path, *_ in cubes.values()}) == len(cubes)
    for name, experiment in (("validation", run.split.validation), ("test", run.split.test)):
        if experiment is None:
            assert name not in cubes
            continue
        _, base, held = cubes.get(name, cubes["cube"])
        assert base == experiment.reference and set(experiment.years) <= set(held)
    maps, states = inputs.needed_years(run)
    assert maps <= states and inputs.mask_year(run) in maps
    assert all({*held, *({base} - {None})} <= states for _, base, held in cubes.values())


def test_crosswalk_of_a_user_lies_beside_the_data(tmp_path: Path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "mine.csv").write_text("state,11,44\nprimf,0.25,0.75\nurban,1,0\n")
    scenario = {**SMALL["scenario"], "crosswalk": "tables/mine.csv"}
    crosswalk = Inputs.of(run_of(data=str(tmp_path), scenario=scenario)).crosswalk
    assert crosswalk.name == "mine" and crosswalk.matrix[0, [0, 3]].tolist() == [0.25, 0.75]
    assert Inputs.of(run_of(data=str(tmp_path))).crosswalk.name == "luh2_to_hildaplus"
    with pytest.raises(ConfigError, match=r"tables.none\.csv does not exist"):
        _ = Inputs.of(run_of(data=str(tmp_path), scenario={**SMALL["scenario"], "crosswalk": "tables/none.csv"})).crosswalk


def test_places_given_as_file_urls_are_folders(tmp_path: Path):
    cube = run_of(reconstruct={**RUN["reconstruct"], "cube": "file:///data/my%20cube.zarr", "part": "ssp126"})
    assert inputs.cubes_of(cube)["cube"][0] == Path("/data/my cube.zarr/ssp126")
    remote = run_of(reconstruct={**RUN["reconstruct"], "cube": "s3://bucket/cube.zarr"})
    assert inputs.cubes_of(remote)["cube"][0] == "s3://bucket/cube.zarr"
    maps = {2000: "file:///maps/a.tif", 2001: "b.tif"}
    run = run_of(data=str(tmp_path), landcover={"source": maps, "legend": "hildaplus"})
    assert inputs.map_source(run) == {2000: Path("/maps/a.tif"), 2001: tmp_path / "b.tif"}
    assert inputs.map_source(run_of(landcover={"source": "file:///maps/{year}.tif", "legend": "hildaplus"})) == "/maps/{year}.tif"
    for name, suffix, folder in (("scenario", "csv", "crosswalks"), ("landcover", "yaml", "legends")):
        built_in = {"csv": "luh2_to_hildaplus", "yaml": "hildaplus"}[suffix]
        file = tmp_path / f"my own.{suffix}"
        file.write_bytes((Path(str(files("ai4land"))) / "data" / folder / f"{built_in}.{suffix}").read_bytes())
        key = {"csv": "crosswalk", "yaml": "legend"}[suffix]
        run = run_of(**{name: {**RUN[name], key: file.as_uri()}})
        assert Inputs.of(run).crosswalk.states


def test_identity_crosswalk_is_no_file():
    shares = {"kind": "shares", "path": "s.nc", "variable": "v"}
    made = Inputs.of(run_of(scenario=shares, landcover={**SMALL["landcover"], "legend": "lccs_level1"}))
    assert np.array_equal(made.crosswalk.matrix, np.eye(made.legend.n)) and made.legend.n == 22


def test_legend_of_a_user_lies_beside_the_data(tmp_path: Path):
    text = (Path(str(files("ai4land"))) / "data" / "legends" / "hildaplus.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text)
    legend = Inputs.of(run_of(data=str(tmp_path), landcover={**SMALL["landcover"], "legend": "mine.yaml"})).legend
    assert legend.name == "mine" and np.array_equal(legend.codes, Inputs.of(run_of()).legend.codes)


def test_inputs_are_made_once_and_never_changed(monkeypatch):
    made = Inputs.of(run_of())
    assert made.grid is made.grid and made.split is made.split and made.crosswalk is made.crosswalk
    monkeypatch.setattr(inputs, "load_legend", None)
    assert made.identity["legend"] and made.legend.name == "hildaplus"
    with pytest.raises(AttributeError):
        made.run = run_of(seed=1)


def test_split_follows_the_run():
    run = run_of()
    grid = Inputs.of(run).grid
    split = Inputs.of(run).split
    assert split.training_years == [2000, 2001, 2002] and not split.in_space and split.roles.shape == grid.coarse.shape
    assert split.test is not None and split.test.years == (2005, 2006)
    assert Inputs.of(run_of(seed=3)).split.hash == split.hash


def test_split_in_space_follows_the_seed():
    space = {"block": 2, "validation": 0.2, "test": 0.2, "buffer": 0}
    runs = [run_of(seed=seed, split={**SMALL["split"], "space": space}) for seed in (0, 0, 1)]
    first, again, other = (Inputs.of(run).split for run in runs)
    assert first.hash == again.hash != other.hash
    assert (first.roles == VALIDATION).any() and (first.roles == TEST).any()


def test_split_without_anything_to_stop_by_is_refused():
    run = run_of(split={"train": "2000-2002", "space": {"validation": 0.0}})
    with pytest.raises(ConfigError, match="neither validation years nor validation cells"):
        _ = Inputs.of(run).split


def test_map_sources_are_paths_under_data():
    run = run_of(data="/somewhere", landcover={"source": {2000: "a.tif", 2001: "/else/b.tif"}, "legend": "hildaplus"})
    assert inputs.map_source(run) == {2000: Path("/somewhere/a.tif"), 2001: Path("/else/b.tif")}
    assert inputs.map_source(run_of(data="/somewhere")) == str(Path("/somewhere/maps/{year}.tif"))


def test_identity_changes_with_what_the_store_is_made_from_alone():
    same = [
        run_of(title="x"),
        run_of(train={"patch": 32, "steps": 5}),
        run_of(reconstruct={**SMALL["reconstruct"], "years": [2005]}),
    ]
    assert all(Inputs.of(run).identity == Inputs.of(run_of()).identity for run in same)
    other = run_of(static=[{"name": "slope", "path": "s.tif"}])
    changed = {k for k, v in Inputs.of(other).identity.items() if Inputs.of(run_of()).identity[k] != v}
    assert changed == {"static"}


@pytest.mark.parametrize("what", ["legend", "crosswalk"])
def test_identity_changes_with_the_content_of_built_in_tables(monkeypatch, what):
    """A release that edits a built-in table must not continue stores and cubes made with the table before."""
    before = Inputs.of(run_of()).identity
    legend = load_legend("hildaplus")
    crosswalk = Inputs.of(run_of()).crosswalk
    if what == "legend":
        monkeypatch.setattr(inputs, "load_legend", lambda _: legend.model_copy(update={"aliases": {12: 11}}))
    else:
        moved = crosswalk.model_copy(update={"weights": (crosswalk.weights[1], *crosswalk.weights[1:])})
        monkeypatch.setattr(inputs, "load_crosswalk", lambda *_: moved)
    after = Inputs.of(run_of()).identity
    assert {k for k in before if before[k] != after[k]} == {what}


def test_identity_does_not_change_with_titles_and_colours(monkeypatch):
    before, legend = Inputs.of(run_of()).identity, load_legend("hildaplus")
    plain = [c.model_copy(update={"colour": "#000000"}) for c in legend.classes]
    monkeypatch.setattr(inputs, "load_legend", lambda _: legend.model_copy(update={"title": "x", "classes": tuple(plain)}))
    assert Inputs.of(run_of()).identity == before
