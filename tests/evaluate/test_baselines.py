"""The baselines: quotas met exactly, the right classes lose, and nothing depends on the tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ai4land.constrain.quotas import class_quotas, integer_quotas
from ai4land.errors import DataError
from ai4land.evaluate.baselines import nearest_coarse, persistence, proportional_allocation
from ai4land.grid import block_sum
from ai4land.legend import MISSING

N, FACTOR = 4, 5
SHAPE = (10, 15)
COARSE = (2, 3)

reference_maps = hnp.arrays(np.uint8, SHAPE, elements=st.sampled_from([*range(N), MISSING]))


@st.composite
def shares(draw: st.DrawFn) -> Any:
    raw = draw(hnp.arrays(np.float64, (N, *COARSE), elements=st.floats(0, 1))) + 1e-6
    return raw / raw.sum(axis=0)


def class_counts(index: Any) -> Any:
    return np.stack([block_sum((index == k).astype(np.int64), FACTOR) for k in range(N)])


def allocate(reference: Any, wanted: Any, start: Any, **more: Any) -> Any:
    return proportional_allocation(reference, wanted=wanted, start=start, factor=FACTOR, **{"seed": 3, **more})


def test_persistence_is_the_map_but_not_the_same_array() -> None:
    reference = np.array([[0, MISSING]], np.uint8)
    got = persistence(reference)
    assert np.array_equal(got, reference)
    assert not np.shares_memory(got, reference)


@given(shares(), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_nearest_coarse_gives_whole_coarse_cells_their_largest_class(raw: Any, factor: int) -> None:
    got = nearest_coarse(raw, factor=factor)
    assert got.dtype == np.uint8 and got.shape == (COARSE[0] * factor, COARSE[1] * factor)
    for row, col in np.ndindex(*got.shape):
        here = raw[:, row // factor, col // factor]
        assert here[got[row, col]] == here.max()


def test_nearest_coarse_leaves_out_cells_without_shares() -> None:
    raw = np.array([[[0.5, 0.2, np.nan, 0.0]], [[0.5, 0.8, 1.0, 0.0]]])
    assert nearest_coarse(raw, factor=1).tolist() == [[0, 1, MISSING, MISSING]]


@pytest.mark.parametrize(("shape", "factor"), [((2, 3), 2), ((2, 3, 4), 0)])
def test_nearest_coarse_refuses_shapes_that_do_not_fit(shape: Any, factor: int) -> None:
    with pytest.raises(DataError, match="shares are"):
        nearest_coarse(np.ones(shape), factor=factor)


@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 4)), elements=st.floats(0, 1000)))
@settings(deadline=None)
def test_integer_quotas_keep_sums_and_stay_within_one(counts: Any) -> None:
    got = integer_quotas(counts)
    assert got.dtype == np.int64
    assert ((got == np.floor(counts)) | (got == np.ceil(counts))).all()
    assert (np.abs(got.sum(axis=0) - counts.sum(axis=0)) <= 0.5 + 1e-9).all()


@given(hnp.arrays(np.int64, (5, 3), elements=st.integers(0, 10**6)))
@settings(max_examples=30, deadline=None)
def test_integer_quotas_leave_whole_numbers(counts: Any) -> None:
    assert np.array_equal(integer_quotas(counts.astype(np.float64)), counts)


def test_integer_quotas_of_a_worked_example() -> None:
    # remainders .6, .3, .1 sum to 1: the first gets it; of two equal ones the first comes first
    assert integer_quotas(np.array([[1.6, 0.5], [2.3, 0.5], [5.1, 3.0]])).tolist() == [[2, 1], [2, 0], [5, 3]]


@pytest.mark.parametrize("bad", [-0.1, np.nan, np.inf])
def test_integer_quotas_refuse_bad_numbers(bad: float) -> None:
    with pytest.raises(DataError, match="expected finite"):
        integer_quotas(np.array([1.0, bad]))


def test_class_quotas_of_a_worked_example() -> None:
    counts = np.array([[50], [30], [20]])
    # the scenario takes 10 % from the first class and gives 6 % and 4 %: of 100 cells
    start, wanted = np.array([[0.7], [0.2], [0.1]]), np.array([[0.6], [0.26], [0.14]])
    assert class_quotas(counts, wanted=wanted, start=start)[:, 0].tolist() == [40, 36, 24]


def test_class_quotas_take_no_more_than_there_is() -> None:
    counts = np.array([[5], [95], [0], [0]])
    # the first class is to lose 20 of its 5 cells; the gains of 12 and 8 shrink to 3 and 2, the second class stays
    start, wanted = np.array([[0.3], [0.7], [0.0], [0.0]]), np.array([[0.1], [0.7], [0.12], [0.08]])
    assert class_quotas(counts, wanted=wanted, start=start)[:, 0].tolist() == [0, 95, 3, 2]


@given(reference_maps, shares(), shares(), st.integers(0, 2**63))
@settings(max_examples=60, deadline=None)
def test_quotas_are_met_and_only_losing_classes_lose(reference: Any, wanted: Any, start: Any, seed: int) -> None:
    before = reference.copy()
    got = allocate(reference, wanted, start, seed=seed)
    counts, after = class_counts(reference), class_counts(got)
    assert np.array_equal(reference, before)
    assert np.array_equal(after, class_quotas(counts, wanted=wanted, start=start))
    assert np.array_equal(got == MISSING, reference == MISSING)
    change = wanted - start
    assert (change[after < counts] < 0).all()
    assert (change[after > counts] > 0).all()
    cell = np.arange(SHAPE[0])[:, None] // FACTOR, np.arange(SHAPE[1])[None, :] // FACTOR
    moved = got != reference
    assert (change[reference[moved], *(np.broadcast_to(c, SHAPE)[moved] for c in cell)] < 0).all()
    assert (change[got[moved], *(np.broadcast_to(c, SHAPE)[moved] for c in cell)] > 0).all()


@given(reference_maps, shares(), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_nothing_changes_where_the_scenario_does_not(reference: Any, wanted: Any, seed: int) -> None:
    assert np.array_equal(allocate(reference, wanted, wanted, seed=seed), reference)


def test_nothing_changes_where_the_scenario_is_missing() -> None:
    rng = np.random.default_rng(0)
    reference = rng.integers(0, N, SHAPE).astype(np.uint8)
    start = class_counts(reference) / FACTOR**2
    wanted = np.roll(start, 1, axis=0)
    wanted[2, 0, 1] = np.nan
    got = allocate(reference, wanted, start)
    assert np.array_equal(got[:5, 5:10], reference[:5, 5:10])
    assert (got[5:] != reference[5:]).any()


@given(reference_maps, shares(), shares(), st.integers(0, 10))
@settings(max_examples=40, deadline=None)
def test_tiles_give_the_map_of_the_whole(reference: Any, wanted: Any, start: Any, seed: int) -> None:
    whole = allocate(reference, wanted, start, seed=seed, origin=(40, 100))
    for i in range(COARSE[0]):
        for j in range(COARSE[1]):
            cut = np.s_[i * FACTOR : (i + 1) * FACTOR, j * FACTOR : (j + 1) * FACTOR]
            part = np.s_[:, i : i + 1, j : j + 1]
            tile = allocate(reference[cut], wanted[part], start[part], seed=seed, origin=(40 + i * FACTOR, 100 + j * FACTOR))
            assert np.array_equal(tile, whole[cut])


def test_seed_and_place_make_the_draw() -> None:
    reference = np.zeros((50, 50), np.uint8)
    start, wanted = np.array([1.0, 0.0]).reshape(2, 1, 1), np.array([0.5, 0.5]).reshape(2, 1, 1)
    draws = [
        proportional_allocation(reference, wanted=wanted, start=start, factor=50, seed=seed, origin=origin)
        for seed, origin in [(1, (0, 0)), (1, (0, 0)), (2, (0, 0)), (1, (0, 50))]
    ]
    assert np.array_equal(draws[0], draws[1])
    for other in draws[2:]:
        assert 0.4 < (draws[0] == other).mean() < 0.6


def test_the_draw_is_even_over_the_coarse_cell_and_over_the_classes() -> None:
    rng = np.random.default_rng(1)
    reference = rng.integers(0, 2, (200, 200)).astype(np.uint8)
    start = np.array([0.5, 0.5, 0.0, 0.0]).reshape(4, 1, 1)
    wanted = np.array([0.25, 0.25, 0.25, 0.25]).reshape(4, 1, 1)
    got = proportional_allocation(reference, wanted=wanted, start=start, factor=200, seed=0)
    moved = got != reference
    assert np.abs(block_sum(moved.astype(int), 50) / 2500 - 0.5).max() < 0.06
    for old in (0, 1):
        assert abs((got[moved & (reference == old)] == 2).mean() - 0.5) < 0.03


@pytest.mark.parametrize(
    ("shape", "coarse", "origin", "text"),
    [
        ((9, 15), COARSE, (0, 0), "whole coarse cells"),
        (SHAPE, COARSE, (3, 0), "whole coarse cells"),
        (SHAPE, (2, 2), (0, 0), "shares are"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape: Any, coarse: Any, origin: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        allocate(np.zeros(shape, np.uint8), np.zeros((N, *coarse)), np.zeros((N, *coarse)), origin=origin)


def test_codes_instead_of_indices_are_refused() -> None:
    with pytest.raises(DataError, match="class index is 77"):
        allocate(np.full(SHAPE, 77, np.uint8), np.zeros((N, *COARSE)), np.zeros((N, *COARSE)))
