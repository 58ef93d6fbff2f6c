"""Scores, against numbers worked out by hand, and what holds for every table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ai4land.constrain.totals import mapped_shares
from ai4land.errors import DataError
from ai4land.evaluate.scores import headline, number, observed_change, per_class, score_sums
from ai4land.grid import tiles
from ai4land.legend import MISSING
from tests.oracles import coarse_error, scores, table_sums, transition_table

# Ten cells of area 1, classes 0, 1, 2:                 hit hit miss wrong false  stay stay stay stay stay
REFERENCE = np.array([[0, 0, 0, 0, 1, 0, 1, 1, 2, 2]], np.uint8)
TRUTH = np.array([[1, 1, 1, 1, 1, 0, 1, 1, 2, 2]], np.uint8)
PREDICTED = np.array([[1, 1, 0, 2, 2, 0, 1, 1, 2, 2]], np.uint8)
ONE = np.ones(1)

indices = st.sampled_from([0, 1, 2, MISSING])


def maps(rows: int = 6, cols: int = 8) -> st.SearchStrategy[Any]:
    return st.tuples(*[hnp.arrays(np.uint8, (rows, cols), elements=indices)] * 3)


def test_table_counts_each_combination() -> None:
    table = transition_table(REFERENCE, TRUTH, PREDICTED, n=3, weights=ONE)
    want = np.zeros((3, 3, 3))
    want[0, 1, 1], want[0, 1, 0], want[0, 1, 2], want[1, 1, 2] = 2, 1, 1, 1
    want[0, 0, 0], want[1, 1, 1], want[2, 2, 2] = 1, 2, 2
    np.testing.assert_array_equal(table, want)


def test_scores_of_the_worked_example() -> None:
    got = scores(transition_table(REFERENCE, TRUTH, PREDICTED, n=3, weights=ONE))
    assert got.overall_accuracy == pytest.approx(0.7)
    # right 1, 4, 2; true 1, 7, 2; predicted 2, 4, 4
    assert got.macro_f1 == pytest.approx((2 / 3 + 8 / 11 + 4 / 6) / 3)
    assert got.mean_iou == pytest.approx((1 / 2 + 4 / 7 + 2 / 4) / 3)
    assert got.figure_of_merit == pytest.approx(2 / (2 + 1 + 1 + 1))
    # changed 4, predicted to change 4, both 3
    assert got.change_f1 == pytest.approx(6 / 8)
    assert got.quantity_disagreement == pytest.approx((1 + 3 + 2) / 2 / 10)
    assert got.allocation_disagreement == pytest.approx(0.0)


def test_allocation_disagreement_is_a_swap() -> None:
    a, b = np.array([[0, 1, 0, 0]], np.uint8), np.array([[1, 0, 0, 0]], np.uint8)
    got = scores(transition_table(a, a, b, n=2, weights=ONE))
    assert (got.quantity_disagreement, got.allocation_disagreement) == (0.0, 0.5)


def test_scores_per_class_of_the_worked_example() -> None:
    zero, one, two = per_class(table_sums(transition_table(REFERENCE, TRUTH, PREDICTED, n=3, weights=ONE)))
    assert one["precision"] == 1.0
    assert one["recall"] == pytest.approx(4 / 7)
    assert one["f1"] == pytest.approx(8 / 11)
    assert one["iou"] == pytest.approx(4 / 7)
    assert (one["share_true"], one["share_predicted"]) == (0.7, 0.4)
    assert (zero["precision"], zero["recall"], two["precision"], two["recall"]) == (0.5, 1.0, 0.5, 1.0)


def test_weights_are_areas_of_rows() -> None:
    maps_ = [np.array(v, np.uint8) for v in ([[0], [0]], [[0], [1]], [[0], [0]])]
    got = scores(transition_table(*maps_, n=2, weights=np.array([3.0, 1.0])))
    assert got.overall_accuracy == 0.75
    assert got.quantity_disagreement == 0.25


def test_a_class_that_is_nowhere_does_not_count_in_the_means() -> None:
    three = transition_table(REFERENCE, TRUTH, PREDICTED, n=3, weights=ONE)
    five = transition_table(REFERENCE, TRUTH, PREDICTED, n=5, weights=ONE)
    assert scores(five) == scores(three)
    assert per_class(table_sums(five))[4] == dict.fromkeys(("precision", "recall", "f1", "iou"), None) | {
        "share_true": 0.0,
        "share_predicted": 0.0,
    }


def test_nothing_changed_and_nothing_scored_give_none() -> None:
    still = scores(transition_table(REFERENCE, REFERENCE, REFERENCE, n=3, weights=ONE))
    assert (still.overall_accuracy, still.figure_of_merit, still.change_f1) == (1.0, None, None)
    empty = np.zeros((3, 3, 3))
    assert set(vars(scores(empty)).values()) == {None}
    assert observed_change(empty.sum(axis=2)) == {"gross": None, "net": None}


def test_observed_change_tells_gross_from_net() -> None:
    a = np.array([[0, 1, 0, 0, 1]], np.uint8)
    b = np.array([[1, 0, 1, 0, 1]], np.uint8)
    assert observed_change(transition_table(a, b, a, n=2, weights=ONE).sum(axis=2)) == {"gross": 0.6, "net": pytest.approx(0.2)}


@given(maps(), hnp.arrays(np.float64, 6, elements=st.floats(0.1, 10)))
@settings(max_examples=60, deadline=None)
def test_identities_hold_for_every_table(three: Any, weights: Any) -> None:
    reference, truth, predicted = three
    table = transition_table(reference, truth, predicted, n=3, weights=weights)
    known = (reference != MISSING) & (truth != MISSING) & (predicted != MISSING)
    np.testing.assert_allclose(table.sum(), (known * weights[:, None]).sum())
    got = scores(table)
    if not known.any():
        assert got.overall_accuracy is None
        return
    parts = (got.overall_accuracy, got.quantity_disagreement, got.allocation_disagreement)
    assert sum(v for v in parts if v is not None) == pytest.approx(1.0)
    assert all(v is None or -1e-12 <= v <= 1 + 1e-12 for v in vars(got).values())
    change = observed_change(table.sum(axis=2))
    assert change["gross"] is not None and change["net"] is not None
    assert change["net"] <= change["gross"] + 1e-12
    perfect = scores(transition_table(reference, truth, np.where(known, truth, MISSING).astype(np.uint8), n=3, weights=weights))
    assert perfect.overall_accuracy == perfect.macro_f1 == perfect.mean_iou == 1.0
    same = scores(transition_table(reference, truth, np.where(known, reference, MISSING).astype(np.uint8), n=3, weights=weights))
    if (known & (reference != truth)).any():
        assert perfect.figure_of_merit == perfect.change_f1 == 1.0
        assert same.figure_of_merit == same.change_f1 == 0.0
    assert same.overall_accuracy == pytest.approx(1 - change["gross"])


@given(maps(), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_tables_of_tiles_add_up_to_the_whole(three: Any, size: int) -> None:
    weights = np.linspace(1, 2, 6)
    whole = transition_table(*three, n=3, weights=weights)
    parts = [
        transition_table(*[m[w.slices] for m in three], n=3, weights=weights[w.slices[0]]) for w in tiles(three[0].shape, size)
    ]
    np.testing.assert_allclose(np.sum(parts, axis=0), whole)


def test_mapped_shares_by_area_and_by_cells() -> None:
    index = np.array([[0, 1, 2, 2], [0, 0, MISSING, 2]], np.uint8)
    mask = np.array([[True, True, True, False], [True, True, True, True]])
    areas = np.array([1.0, 3.0])
    shares, coverage = mapped_shares(index, mask, n=3, factor=2, areas=areas)
    np.testing.assert_allclose(shares[:, 0, 0], [7 / 8, 1 / 8, 0])
    np.testing.assert_allclose(shares[:, 0, 1], [0, 0, 1])
    np.testing.assert_allclose(coverage, [[1, 4 / 8]])
    shares, coverage = mapped_shares(index, mask, n=3, factor=2, weights="cells")
    np.testing.assert_allclose(shares[:, 0, 0], [3 / 4, 1 / 4, 0])
    np.testing.assert_allclose(coverage, [[1, 2 / 4]])


def test_mapped_shares_are_nan_where_nothing_is_mapped() -> None:
    shares, coverage = mapped_shares(np.zeros((2, 2), np.uint8), np.zeros((2, 2), bool), n=2, factor=2, weights="cells")
    assert np.isnan(shares).all()
    assert coverage.tolist() == [[0.0]]


def test_mapped_shares_refuse_what_does_not_fit() -> None:
    index, mask = np.zeros((4, 4), np.uint8), np.ones((4, 4), bool)
    with pytest.raises(DataError, match="whole coarse cells"):
        mapped_shares(index, mask, n=2, factor=3, weights="cells")
    with pytest.raises(DataError, match="areas are None"):
        mapped_shares(index, mask, n=2, factor=2)
    with pytest.raises(DataError, match="class index is 7"):
        mapped_shares(index + np.uint8(7), mask, n=2, factor=2, weights="cells")


def test_coarse_error_of_a_worked_example() -> None:
    got = np.array([[[1.0, 0.5, 0.2]], [[0.0, 0.5, 0.8]]])
    want = np.array([[[0.5, 0.5, np.nan]], [[0.5, 0.5, 0.8]]])
    # cell 0 is wrong by 0.5 with weight 1, cell 1 right with weight 3, cell 2 is dropped
    assert coarse_error(got, want, np.array([[1.0, 3.0, 5.0]])) == pytest.approx(0.125)
    assert coarse_error(got, want, np.array([[1.0, 0.0, 5.0]])) == pytest.approx(0.5)
    assert coarse_error(got, want, np.zeros((1, 3))) is None
    with pytest.raises(DataError, match="weights of"):
        coarse_error(got, want, np.ones(3))


@given(maps(), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_sums_of_groups_give_the_scores_of_their_tables(three: Any, groups: int) -> None:
    reference, truth, predicted = three
    weights = np.linspace(1, 2, 6)
    known = (reference != MISSING) & (truth != MISSING)
    group = np.broadcast_to(np.arange(8) * groups // 8, truth.shape)
    cells = {"areas": np.broadcast_to(weights[:, None], truth.shape)[known], "group": group[known], "groups": groups, "n": 3}
    sums = score_sums(truth[known], predicted[known], reference[known], **cells)
    many = headline(sums)
    for g in range(groups):
        table = transition_table(reference, np.where(group == g, truth, MISSING), predicted, n=3, weights=weights)
        want = vars(scores(table))
        assert {k: number(v[g]) for k, v in many.items()} == {k: pytest.approx(v) for k, v in want.items()}
        assert per_class(sums[g]) == [{k: pytest.approx(v) for k, v in row.items()} for row in per_class(table_sums(table))]
    alone = headline(score_sums(truth[known], predicted[known], **cells))
    assert np.isnan(alone["figure_of_merit"]).all() and np.isnan(alone["change_f1"]).all()
    np.testing.assert_allclose(alone["mean_iou"], many["mean_iou"])
