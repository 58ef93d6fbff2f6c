"""The driver against the scores of whole maps."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from ai4land.errors import ConfigError, DataError
from ai4land.evaluate import evaluate_years
from ai4land.grid import Grid, Window, make_grid
from ai4land.legend import MISSING, Legend, load_legend
from ai4land.scores import class_shares, per_class, scores, transition_table


class World:
    """A small globe with observed maps of three years and functions that read them."""

    def __init__(self) -> None:
        rng = np.random.default_rng(4)
        self.grid: Grid = make_grid((-180, -90, 180, 90), coarse_cell=45, factor=4, shard=8)
        self.legend: Legend = load_legend("hildaplus")
        index = {2000: rng.integers(0, 7, self.grid.shape).astype(np.uint8)}
        for year in (2001, 2002):
            fresh = rng.integers(0, 7, self.grid.shape).astype(np.uint8)
            index[year] = np.where(rng.random(self.grid.shape) < 0.2, fresh, index[year - 1])
        for m in index.values():
            m[:4, :3] = MISSING
        self.index = index
        self.codes = {year: self.legend.decode(m) for year, m in index.items()}
        noise = rng.random(self.grid.shape) < 0.1
        self.guess = {year: np.where(noise, self.codes[2000], m) for year, m in self.codes.items()}
        self.mask = np.ones(self.grid.shape, bool)
        self.mask[:, 20:] = False

    def shares(self, year: int) -> Any:
        return class_shares(self.index[year], self.index[year] != MISSING, n=7, factor=4, areas=self.grid.cell_areas())[0]

    def evaluate(self, **changed: Any) -> dict[str, Any]:
        values: dict[str, Any] = {
            "predictions": {
                "model": lambda year, window: self.guess[year][window.slices],
                "persistence": lambda year, window: self.codes[2000][window.slices],
                "perfect": lambda year, window: self.codes[year][window.slices],
            },
            "truth": lambda year, window: self.codes[year][window.slices],
            "reference": lambda window: self.codes[2000][window.slices],
            "where": lambda window: self.mask[window.slices],
            "wanted": self.shares,
            "grid": self.grid,
            "legend": self.legend,
            "windows": self.grid.shards(),
            "years": [2001, 2002],
        } | changed
        return evaluate_years(values.pop("predictions"), **values)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def same_numbers(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_numbers(a[k], b[k]) for k in a)
    if isinstance(a, float):
        return isinstance(b, float) and math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    return bool(a == b)


def test_driver_equals_the_scores_of_the_whole_map(world: World) -> None:
    got = world.evaluate()["model"]
    areas, hidden = world.grid.cell_areas(), np.where(world.mask, 0, MISSING).astype(np.uint8)
    tables = {
        year: transition_table(
            world.index[2000], np.maximum(world.index[year], hidden), world.legend.encode(world.guess[year]), n=7, weights=areas
        )
        for year in (2001, 2002)
    }
    want = vars(scores(tables[2001] + tables[2002]))
    assert {k: got[k] for k in want} == pytest.approx(want)
    assert {k: got["per_year"]["2002"][k] for k in want} == pytest.approx(vars(scores(tables[2002])))
    classes = dict(zip(world.legend.names, per_class(tables[2001] + tables[2002]), strict=True))
    assert same_numbers(got["per_class"], classes)


def test_driver_gives_what_the_report_needs(world: World) -> None:
    got = world.evaluate()
    assert json.loads(json.dumps(got)) == got
    assert list(got) == ["years", "observed", "model", "persistence", "perfect"]
    assert got["persistence"]["figure_of_merit"] == 0.0
    assert got["perfect"]["figure_of_merit"] == pytest.approx(1.0)
    assert got["perfect"]["coarse_error"] == got["observed"]["coarse_error"] == pytest.approx(0.0, abs=1e-12)
    assert got["persistence"]["coarse_error"] > got["model"]["coarse_error"] > 0
    assert got["persistence"]["overall_accuracy"] == pytest.approx(1 - got["observed"]["gross"])
    assert got["model"]["unpredicted_share"] == 0.0


def test_driver_does_not_depend_on_the_windows(world: World) -> None:
    small = [Window(r, c, 4, 4) for r in range(0, 16, 4) for c in range(0, 32, 4)]
    assert same_numbers(world.evaluate(), world.evaluate(windows=small))


def test_coarse_error_needs_covered_coarse_cells(world: World) -> None:
    wrong = world.shares(2001)
    wrong[:, 0, 0] = np.eye(7)[0]
    strict = world.evaluate(wanted=lambda year: wrong, years=[2001])
    loose = world.evaluate(wanted=lambda year: wrong, years=[2001], min_coverage=0.2)
    assert strict["perfect"]["coarse_error"] == pytest.approx(0.0, abs=1e-12)
    assert loose["perfect"]["coarse_error"] > 0.001


def test_driver_by_number_of_cells(world: World) -> None:
    index = world.index[2001]
    by_cells = class_shares(index, index != MISSING, n=7, factor=4, weights="cells")[0]
    right = world.evaluate(wanted=lambda year: by_cells, years=[2001], weights_kind="cells")
    mixed = world.evaluate(wanted=lambda year: by_cells, years=[2001], weights_kind="area")
    assert right["perfect"]["coarse_error"] == pytest.approx(0.0, abs=1e-12)
    assert mixed["perfect"]["coarse_error"] > 1e-4


def test_driver_without_a_scenario_has_no_coarse_error(world: World) -> None:
    got = world.evaluate(wanted=lambda year: None)
    assert got["model"]["coarse_error"] is None
    assert got["model"]["per_year"]["2001"]["coarse_error"] is None


def test_driver_tells_of_cells_without_a_prediction(world: World, caplog: pytest.LogCaptureFixture) -> None:
    def half(year: int, window: Window) -> Any:
        return np.where(np.arange(32)[window.slices[1]] < 10, world.codes[year][window.slices], world.legend.fill.code)

    got = world.evaluate(predictions={"half": half})
    areas = world.grid.cell_areas()
    scored = (world.index[2000] != MISSING) & world.mask
    want = (scored[:, 10:] * areas[:, None]).sum() / (scored * areas[:, None]).sum()
    assert got["half"]["unpredicted_share"] == pytest.approx(want)
    assert "half has no class" in caplog.text


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"years": []}, ConfigError, "expected at least one"),
        ({"years": [2001, 2001]}, ConfigError, "each year once"),
        ({"predictions": {"years": None}}, ConfigError, "choose another name"),
        ({"windows": [Window(0, 2, 4, 4)]}, ConfigError, "whole coarse cells"),
        ({"windows": [Window(0, 28, 4, 8)]}, ConfigError, "inside"),
        ({"where": lambda window: np.zeros((window.height, window.width), bool)}, DataError, "no cell is scored"),
        ({"wanted": lambda year: np.zeros((7, 2, 2))}, DataError, "wanted shares of 2001"),
    ],
)
def test_driver_refuses_what_cannot_be_scored(world: World, changed: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        world.evaluate(**changed)
