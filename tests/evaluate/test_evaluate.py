"""The evaluation by windows against the scores of whole maps."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from ai4land.constrain.totals import mapped_shares
from ai4land.errors import ConfigError, DataError
from ai4land.evaluate.change import coarse_net
from ai4land.evaluate.evaluate import evaluate_years
from ai4land.evaluate.scores import observed_change, per_class
from ai4land.evaluate.tally import Maps
from ai4land.grid import Grid, Window, coarse_slices, make_grid
from ai4land.legend import MISSING, load_legend
from tests.oracles import scores, table_sums, transition_table


class World:
    """A small globe with observed maps of three years and functions that read them."""

    def __init__(self) -> None:
        rng = np.random.default_rng(4)
        self.grid: Grid = make_grid((-180, -90, 180, 90), coarse_cell=45, factor=4, shard=8)
        self.names = tuple(load_legend("hildaplus").names)
        index = {2000: rng.integers(0, 7, self.grid.shape).astype(np.uint8)}
        for year in (2001, 2002):
            fresh = rng.integers(0, 7, self.grid.shape).astype(np.uint8)
            index[year] = np.where(rng.random(self.grid.shape) < 0.2, fresh, index[year - 1])
        for m in index.values():
            m[:4, :3] = MISSING
        self.index = index
        noise = rng.random(self.grid.shape) < 0.1
        self.guess = {year: np.where(noise, index[2000], m) for year, m in index.items()}
        self.mask = np.ones(self.grid.shape, bool)
        self.mask[:, 20:] = False

        self.chances = {y: np.where(rng.random(noise.shape) < 0.1, np.nan, rng.random(noise.shape)) for y in self.guess}

    def chance(self, year: int, window: Window) -> Any:
        return self.chances[year][window.slices].astype(np.float32)

    def observed(self, year: int, window: Window) -> Any:
        """The map of 2000 stands for all years before."""
        return self.index[max(year, 2000)][window.slices]

    def whole_shares(self, year: int) -> Any:
        index = self.index[year]
        return mapped_shares(index, index != MISSING, n=7, factor=4, areas=self.grid.cell_areas())[0]

    def shares(self, year: int, window: Window) -> Any:
        return cut(self.whole_shares(year), window)

    def evaluate(self, **changed: Any) -> dict[str, Any]:
        values: dict[str, Any] = {
            "predictions": {
                "model": lambda year, window: self.guess[year][window.slices],
                "persistence": lambda year, window: self.index[2000][window.slices],
                "perfect": lambda year, window: self.index[year][window.slices],
            },
            "observed": self.observed,
            "reference": 2000,
            "where": lambda window: self.mask[window.slices],
            "wanted": self.shares,
            "grid": self.grid,
            "classes": self.names,
            "windows": self.grid.shards(),
            "years": [2001, 2002],
        } | changed
        given = {f.name for f in dataclasses.fields(Maps)} & values.keys()
        return evaluate_years(Maps(**{k: values.pop(k) for k in given}), **values)


def cut(shares: Any, window: Window) -> Any:
    """Shares of the coarse cells of a window, of whole coarse cells of 4 x 4."""
    rows, cols = coarse_slices(window, 4)
    return shares[:, rows, cols]


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def same_numbers(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_numbers(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same_numbers(*pair) for pair in zip(a, b, strict=True))
    if isinstance(a, float):
        return isinstance(b, float) and math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    return bool(a == b)


def test_driver_equals_the_scores_of_the_whole_map(world: World) -> None:
    got = world.evaluate()["model"]
    areas, hidden = world.grid.cell_areas(), np.where(world.mask, 0, MISSING).astype(np.uint8)
    tables = {
        year: transition_table(world.index[2000], np.maximum(world.index[year], hidden), world.guess[year], n=7, weights=areas)
        for year in (2001, 2002)
    }
    want = vars(scores(tables[2001] + tables[2002]))
    assert {k: got[k] for k in want} == pytest.approx(want)
    assert got["figure_of_merit_by_side"]["1"] == pytest.approx(want["figure_of_merit"])
    assert {k: got["per_year"]["2002"][k] for k in want} == pytest.approx(vars(scores(tables[2002])))
    classes = dict(zip(world.names, per_class(table_sums(tables[2001] + tables[2002])), strict=True))
    assert same_numbers(got["per_class"], classes)


def test_driver_gives_what_the_report_needs(world: World) -> None:
    got = world.evaluate()
    assert json.loads(json.dumps(got)) == got
    assert list(got) == ["years", "bootstrap", "observed", "model", "persistence", "perfect", "differences"]
    assert got["persistence"]["figure_of_merit"] == 0.0
    assert got["perfect"]["figure_of_merit"] == pytest.approx(1.0)
    assert got["perfect"]["coarse_error"] == got["observed"]["coarse_error"] == pytest.approx(0.0, abs=1e-12)
    assert got["persistence"]["coarse_error"] > got["model"]["coarse_error"] > 0
    assert got["persistence"]["overall_accuracy"] == pytest.approx(1 - got["observed"]["gross"])
    assert got["model"]["unpredicted_share"] == 0.0


def test_driver_does_not_depend_on_the_windows(world: World) -> None:
    small = [Window(r, c, 4, 4) for r in range(0, 16, 4) for c in range(0, 32, 4)]
    more = {"confidence": {"model": world.chance}, "change_probability": {"perfect": world.chance}}
    for block in (1, 3):
        assert same_numbers(world.evaluate(block=block, **more), world.evaluate(windows=small[::-1], block=block, **more))


def test_intervals_are_those_of_resampled_blocks(world: World) -> None:
    got = world.evaluate(resamples=300, seed=5)
    areas = np.broadcast_to(world.grid.cell_areas()[:, None], world.grid.shape)
    tables = []
    for r in range(0, 16, 8):  # 2 x 2 coarse cells of 4 x 4 cells
        for c in range(0, 32, 8):
            part = np.s_[r : r + 8, c : c + 8]
            index = {y: np.where(world.mask[part], m[part], MISSING).astype(np.uint8) for y, m in world.index.items()}
            guess = [world.guess[y][part] for y in (2001, 2002)]
            pairs = zip((2001, 2002), guess, strict=True)
            tables.append(
                [
                    [transition_table(index[2000], index[y], g, n=7, weights=areas[part]) for y, g in pairs],
                    [transition_table(index[2000], index[y], index[2000], n=7, weights=areas[part]) for y in (2001, 2002)],
                ]
            )
    every = np.array(tables)
    every = every[every.any(axis=(1, 2, 3, 4, 5))]
    assert got["bootstrap"] == {"blocks": len(every), "block": 2, "resamples": 300, "seed": 5}
    rng = np.random.default_rng(5)
    drawn = [every[rng.integers(0, len(every), size=len(every))].sum(axis=0) for _ in range(300)]
    for field in ("overall_accuracy", "macro_f1", "mean_iou", "figure_of_merit", "change_f1"):
        model, still = ([getattr(scores(d[i].sum(axis=0)), field) for d in drawn] for i in (0, 1))
        assert got["model"]["interval"][field] == pytest.approx(np.quantile(model, [0.025, 0.975]))
        if field in ("overall_accuracy", "mean_iou", "figure_of_merit"):
            part = got["differences"]["model - persistence"][field]
            assert part["value"] == pytest.approx(got["model"][field] - got["persistence"][field])
            assert part["interval"] == pytest.approx(np.quantile(np.subtract(model, still), [0.025, 0.975]))
            if field != "mean_iou":
                year = [getattr(scores(d[0, 1]), field) for d in drawn]
                assert got["model"]["per_year"]["2002"]["interval"][field] == pytest.approx(np.quantile(year, [0.025, 0.975]))
    low, high = got["model"]["interval"]["coarse_error"]
    assert low <= got["model"]["coarse_error"] <= high


def test_differences_are_from_the_model_and_the_most_likely_class(world: World) -> None:
    read = {name: lambda year, window: world.guess[year][window.slices] for name in ("other", "most_likely", "model", "third")}
    got = world.evaluate(predictions=read, resamples=20)["differences"]
    assert set(got) == {
        "model - other",
        "model - most_likely",
        "model - third",
        "most_likely - other",
        "most_likely - third",
    }
    assert got["model - third"]["mean_iou"] == {"value": 0.0, "interval": [0.0, 0.0]}
    assert world.evaluate(predictions={"third": read["third"]})["differences"] == {}


def test_observed_change_has_its_bound(world: World) -> None:
    got = world.evaluate()["observed"]
    areas = world.grid.cell_areas()
    table, net = np.zeros((7, 7, 7)), 0.0
    for year in (2001, 2002):
        index = [np.where(world.mask, world.index[y], MISSING).astype(np.uint8) for y in (2000, year)]
        table += transition_table(*index, index[1], n=7, weights=areas)
        net += coarse_net(*index, factor=4, n=7, areas=areas)
    assert {k: got[k] for k in ("gross", "net")} == pytest.approx(observed_change(table.sum(axis=2)))
    assert got["coarse_net"] == pytest.approx(net / table.sum())
    assert got["figure_of_merit_bound"] == pytest.approx(got["coarse_net"] / got["gross"])
    assert got["net"] < got["coarse_net"] < got["gross"]
    assert set(got["per_year"]["2001"]) == {"gross", "net", "coarse_net", "figure_of_merit_bound"}


def test_probabilities_are_held_against_the_truth(world: World) -> None:
    got = world.evaluate(confidence={"model": world.chance}, change_probability={"persistence": world.chance})
    scored = (world.index[2000] != MISSING) & world.mask
    chance = np.stack([world.chances[y][scored] for y in (2001, 2002)]).astype(np.float64)
    area = np.broadcast_to(world.grid.cell_areas()[:, None], scored.shape)[scored] * np.ones((2, 1))
    right = np.stack([(world.guess[y] == world.index[y])[scored] for y in (2001, 2002)])
    moved = np.stack([(world.index[2000] != world.index[y])[scored] for y in (2001, 2002)])
    known = np.isfinite(chance)
    table = got["model"]["calibration"]
    assert table["covered"] == pytest.approx(area[known].sum() / area.sum())
    rows = [row for row in table["bins"] if row["share"]]
    assert sum(row["share"] * row["accuracy"] for row in rows) == pytest.approx(np.average(right[known], weights=area[known]))
    change = got["persistence"]["change_calibration"]
    assert change["rate"] == pytest.approx(np.average(moved[known], weights=area[known]))
    assert change["brier"] == pytest.approx(np.average((chance - moved)[known] ** 2, weights=area[known]))
    assert got["persistence"]["calibration"] is got["model"]["change_calibration"] is None


def test_leads_are_counted_from_the_reference_map(world: World) -> None:
    got = world.evaluate()
    model = got["model"]
    assert [row["lead"] for row in model["per_year"].values()] == [1, 2]
    first, last = (row["overall_accuracy"] for row in model["per_year"].values())
    assert model["accuracy_loss"] == pytest.approx(first - last)
    far = world.evaluate(reference=1992)
    assert [row["lead"] for row in far["model"]["per_year"].values()] == [9, 10]
    assert far["model"]["accuracy_loss"] == pytest.approx(first - last)
    assert world.evaluate(reference=1991)["model"]["accuracy_loss"] is None
    assert "lead" not in world.evaluate(reference=None)["model"]["per_year"]["2001"]


def test_flicker_of_the_driver_starts_at_the_reference_map(world: World) -> None:
    got = world.evaluate()
    maps = [world.index[y] for y in (2000, 2001, 2002)]
    scored = (maps[0] != MISSING) & world.mask
    area = world.grid.cell_areas()[:, None]
    want = (area * (scored & (maps[0] == maps[2]) & (maps[0] != maps[1]))).sum() / (area * scored).sum()
    assert 0 < want == pytest.approx(got["observed"]["flicker"]) == pytest.approx(got["perfect"]["flicker"])
    assert got["perfect"]["false_flicker"] == got["persistence"]["flicker"] == 0.0
    assert got["model"]["false_flicker"] >= 0.0
    assert world.evaluate(reference=1990)["model"]["flicker"] is None


def test_driver_without_a_reference_map_scores_no_change(world: World) -> None:
    got, with_map = world.evaluate(reference=None), world.evaluate()
    for name in ("model", "persistence", "perfect"):
        assert got[name]["figure_of_merit"] is got[name]["change_f1"] is got[name]["figure_of_merit_by_side"] is None
        for field in ("overall_accuracy", "macro_f1", "mean_iou", "coarse_error", "quantity_disagreement"):
            assert got[name][field] == pytest.approx(with_map[name][field])
        assert got[name]["interval"]["figure_of_merit"] is None
        assert got[name]["interval"]["mean_iou"] == pytest.approx(with_map[name]["interval"]["mean_iou"])
    assert got["differences"]["model - perfect"]["figure_of_merit"] == {"value": None, "interval": None}
    nothing = dict.fromkeys(("gross", "net", "coarse_net", "figure_of_merit_bound"))
    assert {k: got["observed"][k] for k in nothing} == got["observed"]["per_year"]["2001"] == nothing
    assert json.loads(json.dumps(got)) == got


def test_driver_without_a_reference_map_sees_flicker_over_the_scored_years(world: World) -> None:
    flip = {2000: 2001, 2001: 2002, 2002: 2001}
    read = {"flip": lambda year, window: world.index[flip[year]][window.slices]}
    got = world.evaluate(predictions=read, reference=None, years=[2000, 2001, 2002])
    maps = [world.index[flip[y]] for y in (2000, 2001, 2002)]
    scored, area = (maps[0] != MISSING) & world.mask, world.grid.cell_areas()[:, None]
    want = (area * (scored & (maps[0] == maps[2]) & (maps[0] != maps[1]))).sum() / (area * scored).sum()
    assert 0 < want == pytest.approx(got["flip"]["flicker"])


def test_coarse_error_needs_covered_coarse_cells(world: World) -> None:
    wrong = world.whole_shares(2001)
    wrong[:, 0, 0] = np.eye(7)[0]
    strict = world.evaluate(wanted=lambda year, window: cut(wrong, window), years=[2001])
    loose = world.evaluate(wanted=lambda year, window: cut(wrong, window), years=[2001], min_coverage=0.2)
    assert strict["perfect"]["coarse_error"] == pytest.approx(0.0, abs=1e-12)
    assert loose["perfect"]["coarse_error"] > 0.001


def test_driver_by_number_of_cells(world: World) -> None:
    index = world.index[2001]
    by_cells = mapped_shares(index, index != MISSING, n=7, factor=4, weights="cells")[0]
    right = world.evaluate(wanted=lambda year, window: cut(by_cells, window), years=[2001], weights="cells")
    mixed = world.evaluate(wanted=lambda year, window: cut(by_cells, window), years=[2001], weights="area")
    assert right["perfect"]["coarse_error"] == pytest.approx(0.0, abs=1e-12)
    assert mixed["perfect"]["coarse_error"] > 1e-4


def test_driver_without_a_scenario_has_no_coarse_error(world: World) -> None:
    got = world.evaluate(wanted=lambda year, window: None)
    assert got["model"]["coarse_error"] is None
    assert got["model"]["per_year"]["2001"]["coarse_error"] is None


def test_driver_tells_of_cells_without_a_prediction(world: World, caplog: pytest.LogCaptureFixture) -> None:
    def half(year: int, window: Window) -> Any:
        return np.where(np.arange(32)[window.slices[1]] < 10, world.index[year][window.slices], np.uint8(MISSING))

    got = world.evaluate(predictions={"half": half}, confidence={"half": lambda year, w: np.ones((w.height, w.width))})
    assert got["half"]["calibration"]["expected_calibration_error"] == pytest.approx(0.0)
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
        ({"predictions": {"differences": None}}, ConfigError, "choose another name"),
        ({"confidence": {"nobody": None}}, ConfigError, "confidence is of .'nobody'"),
        ({"change_probability": {"model": None}, "reference": None}, ConfigError, "without a reference map"),
        ({"confidence": {"model": lambda year, window: np.zeros((2, 2))}}, DataError, "confidence of model in 2001 is"),
        ({"observed": lambda year, window: np.zeros((2, 2), np.uint8)}, DataError, "map of 2000 is"),
        (
            {"predictions": {"model": lambda year, w: np.full((w.height, w.width), 7, np.uint8)}},
            DataError,
            "index 7, expected 0..6",
        ),
        ({"windows": [Window(0, 2, 4, 4)]}, ConfigError, "whole coarse cells"),
        ({"windows": [Window(0, 28, 4, 8)]}, ConfigError, "inside"),
        ({"where": lambda window: np.zeros((window.height, window.width), bool)}, DataError, "no cell is scored"),
        ({"wanted": lambda year, window: np.zeros((7, 3, 3))}, DataError, "wanted shares of 2001"),
    ],
)
def test_driver_refuses_what_cannot_be_scored(world: World, changed: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        world.evaluate(**changed)
