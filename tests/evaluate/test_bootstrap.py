"""Intervals of the block bootstrap, against plain resampling and against data whose truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ai4land.evaluate.bootstrap import BlockSums, all_scores, blocks_of, draw, interval, intervals, summary
from ai4land.grid import Grid, Window, make_grid, tiles

GRID: Grid = make_grid((-180, -90, 180, 90), coarse_cell=30, factor=2, shard=12)
FIELDS = ("overall_accuracy", "figure_of_merit", "change_f1", "coarse_error")


def sums_of(right: Any, wrong: Any) -> Any:
    """Sums of one prediction of two classes: ``right`` and ``wrong`` area of each block, all of it true of class 0."""
    out = np.zeros((len(right), 3 * 2 + 8))
    out[:, 0], out[:, 2], out[:, 4], out[:, 5] = right, np.add(right, wrong), right, wrong
    out[:, 6], out[:, 7], out[:, 13] = np.divide(right, 2), wrong, np.add(right, wrong)
    return out


def blocks(names: int = 1) -> st.SearchStrategy[Any]:
    numbers = st.floats(0.5, 100)
    return st.integers(2, 12).flatmap(lambda n: hnp.arrays(np.float64, (2, n, names), elements=numbers))


@given(st.integers(1, 4), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_a_block_is_the_same_in_all_windows(block: int, size: int) -> None:
    whole_ids, whole = blocks_of(Window(0, 0, *GRID.shape), GRID, block)
    rows, cols = np.indices(whole.shape) // block
    same = (rows[..., None, None] == rows) & (cols[..., None, None] == cols)
    np.testing.assert_array_equal(same, whole[..., None, None] == whole)
    for w in tiles(GRID.shape, 2 * size):
        ids, place = blocks_of(w, GRID, block)
        cut = whole[w.row // 2 : (w.row + w.height) // 2, w.col // 2 : (w.col + w.width) // 2]
        np.testing.assert_array_equal(ids[place], whole_ids[cut])


@given(blocks(), st.randoms())
@settings(max_examples=20, deadline=None)
def test_sums_of_blocks_arrive_in_any_order(values: Any, random: Any) -> None:
    sums = sums_of(values[0, :, 0], values[1, :, 0])
    parts = [(i, share) for i in range(len(sums)) for share in (0.25, 0.75)]
    random.shuffle(parts)
    store = BlockSums(sums.shape[1:])
    for i, share in parts:
        store.add(np.array([7 * i, 9999]), np.stack([share * sums[i], 0 * sums[i]]))
    ids, got = store.merged()
    assert ids.tolist() == [7 * i for i in range(len(sums))]
    np.testing.assert_allclose(got, sums)


def test_no_blocks_have_no_sums() -> None:
    assert BlockSums((2, 3)).merged()[1].shape == (0, 2, 3)


def test_draws_are_sums_of_blocks_drawn_with_replacement() -> None:
    sums = np.random.default_rng(1).random((5, 2, 3))
    rng = np.random.default_rng(8)
    want = [sum(sums[i] for i in rng.integers(0, 5, size=5)) for _ in range(40)]
    np.testing.assert_allclose(draw(sums, resamples=40, seed=8), want)


def test_draws_do_not_depend_on_how_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = np.random.default_rng(1).random((5, 2))
    whole = draw(sums, resamples=50, seed=3)
    monkeypatch.setattr("ai4land.evaluate.bootstrap._AT_ONCE", 12)
    np.testing.assert_allclose(draw(sums, resamples=50, seed=3), whole)


@given(blocks())
@settings(max_examples=40, deadline=None)
def test_interval_of_a_ratio_holds_the_value(values: Any) -> None:
    sums = sums_of(values[0, :, 0], values[1, :, 0])[:, None]
    got, _ = intervals(sums, ["model"], ["overall_accuracy", "figure_of_merit"], resamples=400)
    point = summary(sums.sum(axis=0)[0])
    for name, (low, high) in got["model"].items():
        assert low - 1e-12 <= point[name] <= high + 1e-12


@given(blocks(names=2), st.integers(2, 9))
@settings(max_examples=20, deadline=None)
def test_blocks_that_are_all_alike_leave_no_doubt(values: Any, times: int) -> None:
    one = np.stack([sums_of(values[0, :1, k], values[1, :1, k])[0] for k in range(2)])
    sums = np.repeat(one[None], times, axis=0)
    got, differences = intervals(sums, ["a", "b"], ["mean_iou", "macro_f1"], pairs=[("a", "b")], resamples=50)
    for name, total in zip("ab", sums.sum(axis=0), strict=True):
        for field, (low, high) in got[name].items():
            assert low == pytest.approx(high) == pytest.approx(summary(total)[field])
    for part in differences["a - b"].values():
        assert part["interval"] == pytest.approx([part["value"]] * 2, abs=1e-12)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hit = 0
    for trial in range(200):
        right = rng.beta(4, 1, size=60)
        got, _ = intervals(sums_of(right, 1 - right)[:, None], ["m"], ["overall_accuracy"], resamples=300, seed=trial)
        low, high = got["m"]["overall_accuracy"]
        hit += low <= 0.8 <= high
    assert 0.89 <= hit / 200 <= 0.985


def test_difference_is_of_the_same_draws() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(40)
    better = np.clip(hard + 0.02 + 0.005 * rng.normal(size=40), 0, 1)
    sums = np.stack([sums_of(better, 1 - better), sums_of(hard, 1 - hard)], axis=1)
    got, differences = intervals(sums, ["model", "other"], FIELDS, pairs=[("model", "other")])
    part = differences["model - other"]["overall_accuracy"]
    assert part["value"] == pytest.approx(better.mean() - hard.mean())
    low, high = part["interval"]
    assert 0 < low < part["value"] < high
    assert got["model"]["overall_accuracy"][0] < got["other"]["overall_accuracy"][1]


def test_what_is_not_defined_has_no_interval() -> None:
    sums = sums_of(np.ones(4), np.ones(4))
    sums[:, 6:10] = 0
    got, differences = intervals(np.stack([sums, sums], axis=1), ["a", "b"], FIELDS, pairs=[("a", "b")], resamples=20)
    assert got["a"]["overall_accuracy"] is not None
    assert got["a"]["figure_of_merit"] is got["a"]["change_f1"] is got["a"]["coarse_error"] is None
    assert differences["a - b"]["figure_of_merit"] == {"value": None, "interval": None}
    alone, _ = intervals(sums[:1, None], ["a"], FIELDS)
    assert set(alone["a"].values()) == {None}
    assert interval(np.array([np.nan])) is None


def test_resamples_without_change_are_dropped() -> None:
    sums = sums_of(np.ones(3), np.zeros(3))
    sums[1:, 6] = 0
    got, _ = intervals(sums[:, None], ["a"], ["figure_of_merit"], resamples=200)
    assert got["a"]["figure_of_merit"] == [1.0, 1.0]


def test_scores_of_sums_have_the_coarse_error_and_what_is_lacking() -> None:
    sums = np.zeros(14)
    sums[-4:] = 1, 4, 3, 30
    got = all_scores(sums)
    assert (float(got["coarse_error"]), float(got["unpredicted_share"])) == (0.25, 0.1)
    assert summary(np.zeros(14)) == dict.fromkeys(got)
