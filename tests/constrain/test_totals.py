from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ai4land.constrain.quotas import add_change
from ai4land.constrain.totals import Totals
from ai4land.crosswalk import Crosswalk

ONE = Crosswalk(name="one", states=("a", "b", "c"), weights=((1, 0, 0), (0, 1, 0), (0, 0, 1)))
SEA = Crosswalk(name="sea", states=("a", "b", "icwtr"), weights=((1, 0, 0), (0, 1, 0), (0, 0, 1)))


def shares(n: int, seed: int) -> np.ndarray:
    raw = np.random.default_rng(seed).random((n, 3, 4)) ** 3
    return raw / raw.sum(0)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_a_change_between_two_valid_states_is_met_in_full(seed):
    held, then = shares(4, seed), shares(4, seed + 1)
    assert np.allclose(add_change(held, then - held), then)


@given(hnp.arrays(np.float64, (4, 5), elements=st.floats(-1, 1)), st.integers(0, 999))
def test_whatever_the_change_the_result_is_shares_and_no_class_goes_the_wrong_way(change, seed):
    held = shares(4, seed).reshape(4, -1)[:, :5]
    out = add_change(held, change)
    assert np.allclose(out.sum(0), 1) and (out >= -1e-12).all()
    assert ((out - held) * change >= -1e-12).all()
    assert np.array_equal(add_change(held, np.zeros_like(held)), held)


def test_unknown_stays_unknown():
    change = np.zeros((2, 2))
    change[1, 0] = np.nan
    out = add_change(np.array([[0.5, 0.5], [0.5, 0.5]]), change)
    assert np.isnan(out[:, 0]).all() and out[:, 1].tolist() == [0.5, 0.5]


def totals(scenario, *, crosswalk=ONE, names=("a", "b", "c"), reference=None, mapped=None, areas=None, level=False) -> Totals:
    shape = next(iter(scenario.values())).shape[1:]
    mapped = np.ones((shape[0] * 2, shape[1] * 2), bool) if mapped is None else mapped
    year = None if reference is None else 2000
    return Totals(
        scenario.__getitem__,
        names=list(names),
        crosswalk=crosswalk,
        mapped=mapped,
        factor=2,
        areas=areas,
        reference=reference,
        reference_year=year,
        level=level,
    )


def test_without_a_reference_map_the_level_counts():
    scenario = {2000: shares(3, 1), 2001: shares(3, 2)}
    t = totals(scenario)
    assert np.allclose(t.shares(2001), scenario[2001])
    assert (t.quotas(2001).sum(0) == 4).all()


def test_the_change_is_put_on_top_of_the_map_and_the_level_is_not():
    reference = np.array([[0, 0, 1, 1], [0, 1, 1, 1]], np.uint8)
    scenario = {
        2000: np.array([[[0.1, 0.5]], [[0.9, 0.5]], [[0.0, 0.0]]]),
        2001: np.array([[[0.1, 0.5]], [[0.4, 0.25]], [[0.5, 0.25]]]),
    }
    change = totals(scenario, reference=reference)
    assert np.allclose(change.shares(2000)[:, 0], [[0.75, 0.0], [0.25, 1.0], [0, 0]])
    assert np.allclose(change.shares(2001)[:, 0], [[0.75, 0.0], [0.0, 0.75], [0.25, 0.25]])
    assert change.quotas(2001)[:, 0].tolist() == [[3, 0], [0, 3], [1, 1]]
    assert np.allclose(change.bias[:, 0], [[0.65, -0.5], [-0.65, 0.5], [0, 0]])
    assert np.allclose(totals(scenario, reference=reference, level=True).shares(2001), scenario[2001])


def test_area_weights_count_for_fractions_and_cells_for_the_map():
    reference = np.array([[0, 0], [1, 1]], np.uint8)
    scenario = {2000: np.array([[[0.5]], [[0.5]], [[0.0]]])}
    t = totals(scenario, reference=reference, areas=np.array([3.0, 1.0]))
    assert t.shares(2000)[:, 0, 0].tolist() == [0.75, 0.25, 0.0]
    assert t.quotas(2000)[:, 0, 0].tolist() == [2, 2, 0]


@pytest.mark.parametrize("level", [True, False])
def test_a_coast_follows_the_scenario_of_its_land(level):
    reference = np.array([[0, 255], [1, 255]], np.uint8)
    scenario = {2000: np.array([[[0.25]], [[0.25]]]), 2001: np.array([[[0.5]], [[0.0]]])}
    t = totals(scenario, crosswalk=SEA, names=("a", "b"), reference=reference, mapped=reference != 255, level=level)
    assert np.allclose(t.shares(2000)[:, 0, 0], [0.5, 0.5, 0]) and np.allclose(t.shares(2001)[:, 0, 0], [1, 0, 0])


def test_a_scenario_without_data_asks_for_nothing():
    scenario = {2000: np.full((3, 1, 1), np.nan)}
    t = totals(scenario, reference=np.zeros((2, 2), np.uint8))
    assert np.isnan(t.shares(2000)).all() and (t.quotas(2000) == -1).all()


def test_a_year_of_the_scenario_is_read_once_for_all_that_is_asked_of_it():
    scenario, asked = {2000: shares(3, 1), 2001: shares(3, 2)}, []
    t = Totals(
        lambda year: asked.append(year) or scenario[year],
        names=list("abc"),
        crosswalk=ONE,
        mapped=np.ones((6, 8), bool),
        factor=2,
        areas=None,
        reference=np.zeros((6, 8), np.uint8),
        reference_year=2000,
    )
    for year in (2000, 2001):
        assert (t.quotas(year).sum(0) == 4).all()
        assert np.allclose(t.shares(year).sum(0), 1) and np.allclose(t.shares(year, by_cells=True).sum(0), 1)
    assert asked == [2000, 2001]
