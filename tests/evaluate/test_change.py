"""Change at coarser resolution, its bound and flicker, against plain loops over cells."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ai4land.evaluate.change import Flicker, coarse_net, merit_parts, square_sides
from ai4land.evaluate.scores import observed_change, ratio
from ai4land.legend import MISSING
from tests.oracles import scores, transition_table

AREAS = np.linspace(1, 2, 8)


def maps(count: int = 3) -> st.SearchStrategy[Any]:
    one = hnp.arrays(np.uint8, (8, 12), elements=st.sampled_from([0, 0, 1, 2, MISSING]))
    return st.tuples(*[one] * count)


def plain_merit(reference: Any, truth: Any, predicted: Any, side: int) -> tuple[float, float]:
    hits = change = 0.0
    for r in range(0, 8, side):
        for c in range(0, 12, side):
            seen: Counter[Any] = Counter()
            meant: Counter[Any] = Counter()
            for i in range(r, r + side):
                for j in range(c, c + side):
                    a, t, p = (int(m[i, j]) for m in (reference, truth, predicted))
                    if MISSING not in (a, t, p):
                        seen[a, t] += AREAS[i] * (t != a)
                        meant[a, p] += AREAS[i] * (p != a)
            hits += sum(min(seen[k], meant[k]) for k in seen)
            for a in range(3):
                change += max(sum(v for k, v in part.items() if k[0] == a) for part in (seen, meant))
    return hits, change


def test_sides_divide_the_factor() -> None:
    assert square_sides(1) == [1]
    assert square_sides(100) == [1, 2, 4, 5, 10, 20, 25, 50, 100]


@given(maps())
@settings(max_examples=40, deadline=None)
def test_merit_equals_a_loop_over_squares(three: Any) -> None:
    got = merit_parts(*three, squares=[1, 2, 4], n=3, areas=AREAS)
    np.testing.assert_allclose(got, [plain_merit(*three, side) for side in (1, 2, 4)])


@given(maps())
@settings(max_examples=40, deadline=None)
def test_merit_is_the_figure_of_merit_and_never_falls(three: Any) -> None:
    hits, change = merit_parts(*three, squares=[1, 2, 4], n=3, areas=AREAS).T
    assert (np.diff(hits) >= -1e-9).all()
    assert (np.diff(change) <= 1e-9).all()
    want = scores(transition_table(*three, n=3, weights=AREAS)).figure_of_merit
    assert (want is None) == (change[0] == 0)
    if want is not None:
        assert hits[0] / change[0] == pytest.approx(want)


def test_change_in_the_wrong_cell_is_a_hit_of_the_square_around() -> None:
    reference, truth, predicted = np.zeros((3, 4, 4), np.uint8)
    truth[0, 0], predicted[1, 1] = 1, 1
    got = merit_parts(reference, truth, predicted, squares=[1, 2, 4], n=2, areas=np.ones(4))
    assert got.tolist() == [[0, 2], [1, 1], [1, 1]]


def test_few_changes_and_many_squares_give_the_same() -> None:
    rng = np.random.default_rng(2)
    reference = rng.integers(0, 3, (60, 60)).astype(np.uint8)
    truth, predicted = (np.where(rng.random((60, 60)) < 0.01, (reference + 1) % 3, reference).astype(np.uint8) for _ in range(2))
    few = merit_parts(reference, truth, predicted, squares=[3, 30], n=3, areas=np.ones(60))
    many = merit_parts(reference, truth, predicted, squares=[3, 30], n=150, areas=np.ones(60))
    np.testing.assert_allclose(few, many)


@given(maps(count=2))
@settings(max_examples=40, deadline=None)
def test_net_change_of_coarse_cells_equals_plain_counts(two: Any) -> None:
    reference, truth = two
    known = (reference != MISSING) & (truth != MISSING)
    want = 0.0
    for r in range(0, 8, 4):
        for c in range(0, 12, 4):
            cut = np.s_[r : r + 4, c : c + 4]
            area = known[cut] * AREAS[r : r + 4, None]
            want += sum(abs((area * (truth[cut] == k)).sum() - (area * (reference[cut] == k)).sum()) for k in range(3)) / 2
    got = coarse_net(reference, truth, factor=4, n=3, areas=AREAS)
    assert got == pytest.approx(want)
    table = transition_table(reference, truth, reference, n=3, weights=AREAS)
    change = observed_change(table.sum(axis=2))
    if change["gross"] is not None and change["net"] is not None:
        assert change["net"] * table.sum() - 1e-9 <= got <= change["gross"] * table.sum() + 1e-9


def test_a_map_of_net_changes_cannot_pass_the_bound_but_reach_it() -> None:
    reference = np.array([[0, 0, 1, 0]], np.uint8)
    truth = np.array([[1, 1, 0, 0]], np.uint8)  # gross 3, net 1
    best = np.array([[1, 0, 1, 0]], np.uint8)
    bound = coarse_net(np.tile(reference, (4, 1)), np.tile(truth, (4, 1)), factor=4, n=2, areas=np.ones(4)) / 12
    assert bound == pytest.approx(1 / 3)
    assert scores(transition_table(reference, truth, best, n=2, weights=np.ones(1))).figure_of_merit == pytest.approx(bound)


def measure(truth: Any, predicted: Any, start: Any = None, years: Any = None, **more: Any) -> Any:
    """Flicker of a stack of maps ``(year, rows, columns)`` from 2001 on, with ``start`` in 2000."""
    count, rows, cols = truth.shape
    years = list(range(2001, 2001 + count)) if years is None else years
    areas = np.arange(1.0, rows + 1).repeat(cols)
    flicker = Flicker(["observed", "model"], areas, [*years, *([] if start is None else [2000])], **more)
    if start is not None:
        flicker.add(2000, dict.fromkeys(("observed", "model"), start.ravel()))
    for year, seen, guess in zip(years, truth, predicted, strict=True):
        flicker.add(year, {"observed": seen.ravel(), "model": guess.ravel()})
    (area, own, none), (shared, flickers, false) = flicker.sums()
    assert none == 0
    return {
        "observed": {"flicker": ratio(own, area)},
        "model": {"flicker": ratio(flickers, shared), "false_flicker": ratio(false, shared)},
    }


def plain_back(series: Any, within: int) -> bool:
    return any(
        series[a] == series[b] and any(series[m] != series[a] for m in range(a + 1, b))
        for a in range(len(series))
        for b in range(a + 2, min(a + within, len(series) - 1) + 1)
    )


stacks = hnp.arrays(np.uint8, (9, 3, 4), elements=st.sampled_from([0, 0, 0, 0, 1, 1, 1, 2, 3, 4]))


@given(stacks, stacks, st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_flicker_equals_a_loop_over_cells(truth: Any, predicted: Any, within: int) -> None:
    truth[4, 0, 0] = MISSING
    predicted[7, 1, 1] = MISSING
    start = np.full((3, 4), 3, np.uint8)
    whole = own = false = seen = seen_whole = 0.0
    for r in range(3):
        for c in range(4):
            t, p = ([3, *m[:, r, c].tolist()] for m in (truth, predicted))
            if MISSING in t:
                continue
            seen_whole += r + 1
            seen += (r + 1) * plain_back(t, within)
            if MISSING not in p:
                whole += r + 1
                own += (r + 1) * plain_back(p, within)
                false += (r + 1) * (plain_back(p, within) and not plain_back(t, within))
    got = measure(truth, predicted, start, within=within)
    assert got["observed"]["flicker"] == pytest.approx(seen / seen_whole)
    assert got["model"] == {"flicker": pytest.approx(own / whole), "false_flicker": pytest.approx(false / whole)}


def test_flicker_needs_three_years_in_a_row() -> None:
    flip = np.array([0, 1, 0, 1], np.uint8)[:, None, None]
    still = np.zeros_like(flip)
    assert measure(still, flip)["model"] == {"flicker": 1.0, "false_flicker": 1.0}
    assert measure(flip, flip)["model"] == {"flicker": 1.0, "false_flicker": 0.0}
    assert measure(still[:2], flip[:2])["model"] == {"flicker": None, "false_flicker": None}
    assert measure(still[:2], flip[1:3], np.zeros((1, 1), np.uint8))["model"]["flicker"] == 1.0
    gaps = [2001, 2002, 2004, 2005]
    assert measure(still, flip, years=gaps)["observed"] == {"flicker": None}
    run = [2001, 2003, 2004, 2005]
    assert measure(still, np.array([1, 0, 1, 1], np.uint8)[:, None, None], years=run)["model"]["flicker"] == 0.0


def test_a_class_that_returns_after_more_years_does_not_flicker() -> None:
    slow = np.array([0, 1, 1, 1, 1, 1, 0], np.uint8)[:, None, None]
    assert measure(slow, slow)["observed"]["flicker"] == 0.0
    assert measure(slow[1:], slow[1:] * 0)["observed"]["flicker"] == 0.0
    assert measure(slow, slow, within=6)["observed"]["flicker"] == 1.0
