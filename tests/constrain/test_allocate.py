"""The class map: quotas met to the cell at nearly the best sum of scores, locks and fill untouched, tiles like the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from ai4land.constrain.allocate import allocate
from ai4land.constrain.quotas import class_quotas, level_quotas
from ai4land.errors import DataError
from ai4land.grid import block_sum
from ai4land.legend import MISSING

KEEPS = st.sampled_from([None, np.inf, 0.0, 0.5, 5.0])


@st.composite
def problems(draw: st.DrawFn) -> Any:
    """Scores (spread, tied or huge), a map with gaps, and quotas that sum to its cells."""
    n, factor = draw(st.integers(2, 6)), draw(st.integers(1, 6))
    crows, ccols = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (crows * factor, ccols * factor)
    scores = rng.uniform(-1, 1, (n, *shape)) * draw(st.sampled_from([0.0, 1.0, 80.0]))
    if draw(st.booleans()):
        scores = np.rint(scores * 2)
    current = rng.integers(0, n, shape).astype(np.uint8)
    current[rng.random(shape) > draw(st.sampled_from([0.2, 0.7, 1.0]))] = MISSING
    wild = rng.dirichlet(np.full(n, 0.3), (crows, ccols)).transpose(2, 0, 1)
    have = counts(current, n, factor)
    mapped = have.sum(0)
    mild = have / np.maximum(mapped, 1) * 0.9 + 0.1 * wild
    shares = draw(st.sampled_from([wild, mild]))
    quotas = level_quotas(shares / shares.sum(0) if mapped.all() else wild, mapped)
    return scores.astype(draw(st.sampled_from([np.float32, np.float64]))), current, quotas, factor, rng


def counts(index: Any, n: int, factor: int) -> Any:
    return np.stack([block_sum((index == k).astype(np.int64), factor) for k in range(n)])


@given(problems(), KEEPS)
@settings(max_examples=200, deadline=None)
def test_quotas_are_met_and_gaps_stay(problem: Any, keep: Any) -> None:
    scores, current, quotas, factor, _ = problem
    before = scores.copy(), current.copy()
    got = allocate(scores, current=current, quotas=quotas, factor=factor, keep=keep)
    assert np.array_equal(counts(got.land_cover, len(scores), factor), quotas)
    assert not got.unmet.any()
    assert np.array_equal(got.land_cover == MISSING, current == MISSING)
    assert np.array_equal(scores, before[0])
    assert np.array_equal(current, before[1])


@given(problems())
@settings(max_examples=60, deadline=None)
def test_without_a_map_before_the_mapped_cells_are_filled(problem: Any) -> None:
    scores, current, quotas, factor, _ = problem
    got = allocate(scores, current=None, mapped=current != MISSING, quotas=quotas, factor=factor)
    assert np.array_equal(counts(got.land_cover, len(scores), factor), quotas)
    assert np.array_equal(got.land_cover == MISSING, current == MISSING)


@given(problems(), st.sampled_from([None, np.inf]))
@settings(max_examples=60, deadline=None)
def test_net_change_alone_moves_from_losing_to_gaining_classes(problem: Any, keep: Any) -> None:
    scores, current, quotas, factor, _ = problem
    got = allocate(scores, current=current, quotas=quotas, factor=factor, keep=keep).land_cover
    change = np.repeat(np.repeat(quotas - counts(current, len(scores), factor), factor, 1), factor, 2)
    moved = got != current
    at = np.nonzero(moved)
    assert (change[(current[moved].astype(int), *at)] < 0).all()
    assert (change[(got[moved].astype(int), *at)] > 0).all()
    assert moved.sum() == np.maximum(change, 0).sum() // factor**2


@given(problems(), KEEPS)
@settings(max_examples=80, deadline=None)
def test_locked_cells_stay_and_only_what_they_hold_too_much_is_unmet(problem: Any, keep: Any) -> None:
    scores, current, quotas, factor, rng = problem
    locked = rng.random(current.shape) < 0.5
    got = allocate(scores, current=current, quotas=quotas, factor=factor, keep=keep, locked=locked)
    assert np.array_equal(got.land_cover[locked], current[locked])
    have = counts(got.land_cover, len(scores), factor)
    assert np.array_equal(got.unmet, have - quotas)
    held = counts(np.where(locked, current, MISSING), len(scores), factor)
    excess = np.maximum(held - quotas, 0)
    assert np.array_equal(np.maximum(got.unmet, 0), excess)
    assert (got.unmet.sum(0) == 0).all()


@given(problems(), KEEPS)
@settings(max_examples=80, deadline=None)
def test_tiles_give_the_map_of_the_whole_and_so_does_a_second_run(problem: Any, keep: Any) -> None:
    scores, current, quotas, factor, rng = problem
    locked = rng.random(current.shape) < 0.1
    whole = allocate(scores, current=current, quotas=quotas, factor=factor, keep=keep, locked=locked).land_cover
    again = allocate(scores, current=current, quotas=quotas, factor=factor, keep=keep, locked=locked).land_cover
    assert whole.tobytes() == again.tobytes()
    for i, j in np.ndindex(quotas.shape[1:]):
        cut = np.s_[i * factor : (i + 1) * factor, j * factor : (j + 1) * factor]
        tile = allocate(
            scores[(slice(None), *cut)],
            current=current[cut],
            quotas=quotas[:, i : i + 1, j : j + 1],
            factor=factor,
            keep=keep,
            locked=locked[cut],
        )
        assert np.array_equal(tile.land_cover, whole[cut])


def smooth_case(n: int, factor: int, side: int, *, seed: int, change: float) -> Any:
    """Landscapes of a few coarse cells: scores that drifted since the map, and small net changes."""
    rng = np.random.default_rng(seed)
    size = factor * side
    field = ndimage.gaussian_filter(rng.standard_normal((n, size, size)), (0, 3, 3)) * 40
    current = field.argmax(0).astype(np.uint8)
    scores = (field + ndimage.gaussian_filter(rng.standard_normal(field.shape), (0, 5, 5)) * 20).astype(np.float32)
    scores -= np.log(np.exp(scores).sum(0))
    have = counts(current, n, factor)
    start = have / factor**2
    wanted = np.clip(start + change * rng.standard_normal(start.shape) * (start > 0), 0, None)
    return scores, current, class_quotas(have, wanted=wanted / wanted.sum(0), start=start)


def best_sum(value: Any, quota: Any) -> float:
    """Greatest sum of the values of one coarse cell, from the assignment of its cells to slots of classes."""
    slots = np.repeat(np.arange(len(quota)), quota)
    rows, cols = linear_sum_assignment(value[slots].T, maximize=True)
    return float(value[slots].T[rows, cols].sum())


@pytest.mark.parametrize("keep", [None, 0.0, 2.0])
def test_the_sum_of_the_scores_is_nearly_the_greatest(keep: float | None) -> None:
    lost = price = 0.0
    for n, factor, change, seed in [(5, 12, 0.05, 0), (8, 16, 0.01, 1), (7, 20, 0.02, 2)]:
        scores, current, quotas = smooth_case(n, factor, 3, seed=seed, change=change)
        got = allocate(scores, current=current, quotas=quotas, factor=factor, keep=keep).land_cover
        for i, j in np.ndindex(3, 3):
            cut = np.s_[i * factor : (i + 1) * factor, j * factor : (j + 1) * factor]
            old, new = current[cut].ravel(), got[cut].ravel()
            here = np.arange(old.size)
            value = scores[(slice(None), *cut)].reshape(n, -1).astype(np.float64)
            if keep is None:
                net = quotas[:, i, j] - np.bincount(old, minlength=n)
                allowed = (net[old] < 0) & (net > 0)[:, None]
                allowed[old, here] = True
                value = np.where(allowed, value, -1e6)
            else:
                value[old, here] += keep
            best = best_sum(value, quotas[:, i, j])
            lost += best - value[new, here].sum()
            price += value.max(0).sum() - best
    assert price > 1
    assert -1e-6 <= lost / price < 0.01


def test_a_chain_through_a_third_class_is_found() -> None:
    # one cell too many of the first class and one too few of the third: the first fits the second class, a second the third
    scores = np.full((3, 1, 2, 2), -50.0)[:, 0]
    scores[0, 0, 0], scores[1, 0, 0] = 0, -1
    scores[1, 0, 1], scores[2, 0, 1] = 0, -1
    scores[0, 1, 0] = scores[1, 1, 1] = 0
    quotas = np.array([1, 2, 1]).reshape(3, 1, 1)
    got = allocate(scores, current=None, mapped=np.ones((2, 2), bool), quotas=quotas, factor=2)
    assert got.land_cover.tolist() == [[1, 2], [0, 1]]


def test_coarse_cells_without_quotas_get_the_best_class_or_stay() -> None:
    rng = np.random.default_rng(3)
    scores = rng.standard_normal((4, 5, 10)).astype(np.float32)
    current = rng.integers(0, 4, (5, 10)).astype(np.uint8)
    quotas = counts(current, 4, 5)
    quotas[:, 0, 1] = -1
    free = allocate(scores, current=current, quotas=quotas, factor=5, keep=0.5)
    bonus = scores + 0.5 * (current == np.arange(4)[:, None, None])
    assert np.array_equal(free.land_cover[:, 5:], bonus.argmax(0)[:, 5:])
    assert not free.unmet.any()
    assert np.array_equal(allocate(scores, current=current, quotas=quotas, factor=5).land_cover, current)


def test_equal_scores_with_a_bonus_change_no_more_than_they_must() -> None:
    rng = np.random.default_rng(4)
    current = rng.integers(0, 3, (30, 30)).astype(np.uint8)
    have = counts(current, 3, 30)
    quotas = have + np.array([-40, 15, 25]).reshape(3, 1, 1)
    got = allocate(np.zeros((3, 30, 30), np.float32), current=current, quotas=quotas, factor=30, keep=1.0).land_cover
    assert (got != current).sum() == 40


def test_scores_that_are_not_numbers_matter_only_in_mapped_cells() -> None:
    rng = np.random.default_rng(8)
    scores = rng.standard_normal((3, 4, 4)).astype(np.float32)
    scores[:, 0, 0], scores[1, 0, 1] = np.nan, -np.inf
    mapped = np.ones((4, 4), bool)
    mapped[0, 0] = False
    got = allocate(scores, current=None, mapped=mapped, quotas=np.full((3, 1, 1), 5), factor=4)
    assert np.array_equal(counts(got.land_cover, 3, 4), np.full((3, 1, 1), 5))
    assert got.land_cover[0, 1] != 1
    mapped[0, 0] = True
    with pytest.raises(DataError, match="not all numbers"):
        allocate(scores, current=None, mapped=mapped, quotas=np.array([6, 5, 5]).reshape(3, 1, 1), factor=4)


@given(st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_level_quotas_sum_to_the_mapped_cells_and_stay_within_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(5, 0.4), (3, 4)).transpose(2, 0, 1)
    mapped = rng.integers(0, 1000, (3, 4))
    shares[2, 0, 0] = np.nan
    got = level_quotas(shares, mapped)
    assert (got[:, 0, 0] == -1).all()
    known = np.isfinite(shares).all(0)
    assert np.array_equal(got.sum(0)[known], mapped[known])
    assert (np.abs(got - shares * mapped)[:, known] < 1).all()


def test_shares_that_are_not_shares_are_refused() -> None:
    with pytest.raises(DataError, match="do not sum to 1"):
        level_quotas(np.array([[0.2], [0.2]]), np.array([10]))


HERE = np.zeros((4, 4), np.uint8)
GOOD: Any = {"current": HERE, "quotas": np.array([8, 8]).reshape(2, 1, 1), "factor": 4}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"factor": 3}, "whole coarse cells"),
        ({"quotas": np.array([8, 9]).reshape(2, 1, 1)}, "sum to 17, expected its 16"),
        ({"quotas": np.zeros((3, 1, 1), int)}, "quotas"),
        ({"current": HERE[:2]}, "map is"),
        ({"current": HERE + 7}, "class index is 7"),
        ({"current": None}, "mapped is None"),
        ({"locked": np.ones((2, 2), bool)}, "locked is"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        allocate(np.zeros((2, 4, 4), np.float32), **{**GOOD, **change})
