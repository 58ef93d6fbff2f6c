from __future__ import annotations

import json
import shutil
import tempfile
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ai4land.errors import DataError, MismatchError
from ai4land.evaluate import plot
from ai4land.grid import COARSE_DIMS, Window, block_sum, coarse_slices
from ai4land.legend import MISSING, load_legend
from ai4land.run import evaluate as results
from ai4land.run import inputs
from ai4land.run.config import RunConfig
from ai4land.run.rivals import Wanted
from ai4land.store.read import Source, open_store
from ai4land.store.shard import Layer, of_array
from ai4land.store.write import write_store
from tests.scored import YEARS, make_cube, prepare, run_in


@pytest.fixture
def run(tiny_store, tmp_path) -> RunConfig:
    run = run_in(tmp_path)
    prepare(run, tiny_store.path)
    return run


# -- scores and figures -------------------------------------------------------------------------------------------------


def test_cube_of_the_observed_maps_scores_full_marks(run):
    for name in ("cube", "validation"):
        make_cube(run, name, observed=True)
    scores = results.evaluate(run)
    assert json.loads((run.folder / "evaluation.json").read_text()) == scores
    for split in ("validation", "test"):
        model, still = scores[split]["model"], scores[split]["persistence"]
        assert model["overall_accuracy"] == model["figure_of_merit"] == model["macro_f1"] == 1
        assert model["quantity_disagreement"] == model["allocation_disagreement"] == model["unpredicted_share"] == 0
        assert still["overall_accuracy"] < 1 and still["figure_of_merit"] == 0
        assert model["coarse_error"] < still["coarse_error"]
    assert list(scores["test"]["model"]["per_year"]) == ["2002", "2003"]


def test_cube_that_never_changes_scores_like_persistence(run):
    for name in ("cube", "validation"):
        make_cube(run, name, observed=False)
    scores = results.evaluate(run)
    model, still, other = (scores["test"][name] for name in ("model", "persistence", "proportional"))
    same = still.keys() - {"calibration", "change_calibration"}
    assert {k: model[k] for k in same} == {k: still[k] for k in same} != {k: other[k] for k in same}
    assert scores["test"]["most_likely"]["overall_accuracy"] == still["overall_accuracy"]


def test_figures_are_drawn(run):
    for name in ("cube", "validation"):
        make_cube(run, name, observed=True)
    rows = [{"step": 0, "validation_loss": 1.0}, {"step": 1, "loss": 0.5, "lr": 0.1}, {"step": 2, "loss": 0.4, "lr": 0.1}]
    rows[2] |= {"validation_loss": 0.6, "validation_accuracy": 0.5, "validation_figure_of_merit": 0.1}
    rows[0] |= {"validation_accuracy": 0.4, "validation_figure_of_merit": 0.0}
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    results.evaluate(run)
    made = {p.name: p.read_bytes() for p in (run.folder / "figures").iterdir()}
    assert made.keys() == {
        "map.png",
        "change.png",
        "curves.png",
        "test_by_year.png",
        "test_reliability.png",
        "validation_reliability.png",
    }
    assert all(data.startswith(b"\x89PNG") and len(data) > 2000 for data in made.values())


def test_unfinished_cube_is_not_scored(run):
    make_cube(run, "cube", observed=True, keep=2)
    make_cube(run, "validation", observed=True)
    with pytest.raises(DataError, match="lacks 2002 of shard"):
        results.evaluate(run)
    assert not (run.folder / "evaluation.json").exists()


def test_absent_cube_is_named_before_anything_is_aligned(tmp_path):
    run = run_in(tmp_path)
    with pytest.raises(DataError, match=r"no cube at .*cube\.zarr"):
        results.evaluate(run)
    assert not run.folder.exists()


def test_store_of_another_configuration_is_not_scored(run):
    for name in ("cube", "validation"):
        make_cube(run, name, observed=True)
    other = run.model_copy(update={"static": run.static[:1]})
    with pytest.raises(MismatchError, match="differs in static"):
        results.evaluate(other)


def test_years_that_are_not_those_of_the_training_are_not_scored(run):
    for name in ("cube", "validation"):
        make_cube(run, name, observed=True)
    test = run.split.test.model_copy(update={"years": [2003]})
    other = run.model_copy(update={"split": run.split.model_copy(update={"test": test})})
    with pytest.raises(MismatchError, match="was trained with split"):
        results.evaluate(other)
    assert not (run.folder / "evaluation.json").exists()


# -- memory and disk of scores and figures ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs_by_shards(tmp_path_factory) -> dict[int, RunConfig]:
    """Runs on one and on three shards of 256 x 256 cells, with a mask and a finished cube."""
    made = {}
    for shards in (1, 3):
        run = run_in(
            tmp_path_factory.mktemp(f"shards{shards}"),
            grid={"bbox": [-180, 45, -180 + 45 * shards, 90], "coarse_cell": 45 / 8, "factor": 32, "shard": 256},
            reconstruct={"reference": 2001, "years": [2002, 2003], "workers": 1},
        )
        grid, legend = inputs.Inputs.of(run).grid, load_legend("hildaplus")
        index = np.random.default_rng(0).integers(0, legend.n, (len(YEARS), *grid.shape)).astype(np.uint8)
        mask = np.ones(grid.shape, bool)
        mask[:7] = mask[:, :5] = False
        index[:, ~mask] = MISSING
        coords = {"year": YEARS, "state": [str(c) for c in legend.codes], **{d: grid.coords()[d] for d in COARSE_DIMS}}
        shares = np.full((len(YEARS), legend.n, *grid.coarse.shape), 1 / legend.n, np.float32)
        write_store(
            run.folder / "store.zarr",
            grid=grid,
            legend=legend,
            mask=of_array(mask),
            maps={year: of_array(codes) for year, codes in zip(YEARS, legend.decode(index), strict=True)},
            coarse=xr.DataArray(shares, dims=("year", "state", *COARSE_DIMS), coords=coords),
            layers=[Layer("height", False, of_array(np.ones(grid.shape, np.float32)))],
            identity={},
        )
        make_cube(run, "cube", observed=True)
        made[shards] = run
    return made


def peaks(what: Callable[[RunConfig], Any], runs: dict[int, RunConfig]) -> list[int]:
    """Most bytes that a call holds at once, for each run; a first call makes what is kept for good, such as modules."""
    what(runs[1])
    made = []
    for run in runs.values():
        tracemalloc.start()
        try:
            what(run)
            made.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    return made


def test_memory_of_the_maps_drawn_does_not_grow_with_the_map(runs_by_shards, monkeypatch):
    monkeypatch.setattr(plot, "MAX_SIDE", 64)
    one, three = peaks(lambda run: results.thin_maps(run), runs_by_shards)
    assert three < one + 50_000  # a whole map has 131 072 cells more than one shard


def score(run: RunConfig) -> dict[str, Any]:
    source = Source(run.folder / "store.zarr")
    split = inputs.Inputs.of(run).split
    return results._score(run, source, split, "test", split.test, split.cells(2))


def test_memory_of_scoring_does_not_grow_with_the_map(runs_by_shards):
    one, three = peaks(score, runs_by_shards)
    assert three < 1.05 * one


def test_scoring_keeps_no_maps_on_disk(runs_by_shards, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    run = runs_by_shards[1]
    before = {p for p in run.folder.rglob("*") if p.is_file()}
    assert "proportional" in score(run)
    assert {p.name for p in run.folder.rglob("*") if p.is_file() and p not in before} <= {"test_bias.nc"}


def test_thinned_maps_are_cells_of_the_maps(runs_by_shards, monkeypatch):
    monkeypatch.setattr(plot, "MAX_SIDE", 64)
    run = runs_by_shards[3]
    (year, last), (start, seen, guess), (west, south, east, north) = results.thin_maps(run)
    source = Source(run.folder / "store.zarr")
    whole = Window(0, 0, *source.grid.shape)
    for got, observed in ((start, 2001), (seen, 2003), (guess, 2003), (last, year)):
        assert np.array_equal(got, source.map_of(observed, whole)[17::12, 5::12])  # blocks of 12; the first row is not mapped
    assert (west, east) == (-180, -45) and (north, south) == pytest.approx((90 - 12 * 45 / 256, 90 - 21 * 12 * 45 / 256))


# -- wanted shares ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def all_land(tmp_path_factory) -> RunConfig:
    """A run whose map has a class everywhere and whose scenario is the class shares of the map."""
    run = run_in(tmp_path_factory.mktemp("land"))
    grid, legend = inputs.Inputs.of(run).grid, load_legend("hildaplus")
    rng = np.random.default_rng(0)
    index = rng.integers(0, legend.n, (len(YEARS), *grid.shape)).astype(np.uint8)
    shares = np.stack([[block_sum((m == k).astype(float), 8) / 64 for k in range(legend.n)] for m in index])
    coords = grid.coords()
    coarse = xr.DataArray(
        shares.astype(np.float32),
        dims=("year", "state", *COARSE_DIMS),
        coords={"year": YEARS, "state": [str(c) for c in legend.codes], **{d: coords[d] for d in COARSE_DIMS}},
    )
    write_store(
        run.folder / "store.zarr",
        grid=grid,
        legend=legend,
        mask=of_array(np.ones(grid.shape, bool)),
        maps={year: of_array(codes) for year, codes in zip(YEARS, legend.decode(index), strict=True)},
        coarse=coarse,
        layers=[Layer(name, False, of_array(np.ones(grid.shape, np.float32))) for name in ("height", "zone")],
        identity=inputs.Inputs.of(run).identity,
    )
    return run


def wanted_of(run: RunConfig, reference: int = 2001) -> Callable[[int], Any]:
    """Read the wanted shares of the whole coarse grid, NaN in shards without a map."""
    source = Source(run.folder / "store.zarr")
    wanted = Wanted(run, source, reference)

    def shares(year: int) -> Any:
        out = np.full((source.legend.n, *source.grid.coarse.shape), np.nan)
        for w in source.grid.shards():
            if np.asarray(source.mask[w.slices]).any():
                out[(slice(None), *coarse_slices(w, 8))] = wanted.shares(year, w)
        return out

    return shares


def test_wanted_is_the_scenario_where_it_agrees_with_the_map(all_land):
    shares = wanted_of(all_land)
    coarse = open_store(all_land.folder / "store.zarr")["coarse"]
    for year in (2001, 2000, 2003):
        wanted = shares(year)
        assert np.abs(wanted - coarse.sel(year=year).values).max() < 1e-6
        assert np.allclose(wanted.sum(axis=0), 1)
    assert np.abs(shares(2003) - shares(2000)).max() > 0.01


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rate=st.floats(0, 0.9), to=st.integers(0, 6))
def test_wanted_follows_the_change_of_a_scenario_of_another_level(all_land, tmp_path, rate, to):
    path = tmp_path / "small" / "store.zarr"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(all_land.folder / "store.zarr", path)
    array = zarr.open_group(path, mode="r+")["coarse"]
    values = np.zeros(array.shape, np.float32)
    values[:, to], values[:, (to + 1) % 7] = rate, 1 - rate
    array[...] = values
    run = run_in(tmp_path)
    shares = wanted_of(run)
    held = shares(2001)
    assert np.allclose(shares(2003), held)
    values[-1, to], values[-1, (to + 1) % 7] = rate + 0.05, 1 - rate - 0.05
    array[...] = values
    wanted = wanted_of(run)(2003)
    assert np.allclose(wanted.sum(axis=0), 1) and (wanted >= 0).all()
    enough = held[(to + 1) % 7] >= 0.06
    assert enough.any() and np.allclose((wanted - held)[to][enough], 0.05, atol=1e-6)


def test_cells_without_a_map_want_nothing(run):
    wanted = wanted_of(run)(2003)
    mask = open_store(run.folder / "store.zarr")["mask"].values
    empty = block_sum(mask.astype(int), 8) == 0
    assert empty.any() and np.isnan(wanted[:, empty]).all() and np.isfinite(wanted[:, ~empty]).any()
