"""Reliability, against plain sums over cells and pairs of cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ai4land.errors import DataError
from ai4land.evaluate.reliability import BINS, Reliability

FINE = 4096


def cells() -> st.SearchStrategy[Any]:
    probability = st.floats(0, 1) | st.just(float("nan")) | st.sampled_from([0.0, 1.0, 0.2, 0.4])
    return st.integers(1, 30).flatmap(
        lambda n: st.tuples(
            hnp.arrays(np.float64, n, elements=probability),
            hnp.arrays(np.bool_, n),
            hnp.arrays(np.float64, n, elements=st.floats(0.1, 5)),
        )
    )


def reliability(p: Any, y: Any, w: Any) -> Reliability:
    out = Reliability()
    out.add(np.asarray(p), np.asarray(y, bool), np.asarray(w, np.float64), source="confidence")
    return out


@given(cells())
@settings(max_examples=60, deadline=None)
def test_tables_equal_plain_sums_over_cells(three: Any) -> None:
    p, y, w = three
    got = reliability(p, y, w).event_table()
    given_ = np.isfinite(p)
    if not given_.any():
        assert got["expected_calibration_error"] is got["brier"] is got["auc"] is None
        assert got["covered"] == 0
        return
    assert got["covered"] == pytest.approx(w[given_].sum() / w.sum())
    p, y, w = p[given_], y[given_], w[given_]
    error = 0.0
    for k, row in enumerate(got["bins"]):
        inside = (p > k / BINS if k else p >= 0) & (p <= (k + 1) / BINS)
        assert row["share"] == pytest.approx(w[inside].sum() / w.sum())
        if inside.any():
            assert row["confidence"] == pytest.approx(np.average(p[inside], weights=w[inside]))
            assert row["accuracy"] == pytest.approx(np.average(y[inside], weights=w[inside]))
            error += w[inside].sum() / w.sum() * abs(row["accuracy"] - row["confidence"])
        else:
            assert row["confidence"] is row["accuracy"] is None
    assert got["expected_calibration_error"] == pytest.approx(error, abs=1e-12)
    assert got["brier"] == pytest.approx(np.average((p - y) ** 2, weights=w))
    assert got["rate"] == pytest.approx(np.average(y, weights=w))
    rank = np.minimum(np.floor(np.sqrt(p) * FINE), FINE - 1)
    pairs = [(a, b) for a in range(len(p)) for b in range(len(p)) if y[a] and not y[b]]
    if not pairs:
        assert got["auc"] is got["average_precision"] is None
        return
    won = sum(w[a] * w[b] * (1.0 if rank[a] > rank[b] else 0.5 if rank[a] == rank[b] else 0.0) for a, b in pairs)
    assert got["auc"] == pytest.approx(won / sum(w[a] * w[b] for a, b in pairs))
    precision = sum(w[a] * w[(rank >= rank[a]) & y].sum() / w[rank >= rank[a]].sum() for a in np.flatnonzero(y))
    assert got["average_precision"] == pytest.approx(precision / w[y].sum())


@given(cells(), st.integers(0, 30))
@settings(max_examples=30, deadline=None)
def test_cells_may_come_in_parts(three: Any, cut: int) -> None:
    whole, parts = reliability(*three), Reliability()
    for part in (slice(None, cut), slice(cut, None)):
        parts.add(*(v[part] for v in three), source="confidence")
    np.testing.assert_allclose(parts.bins, whole.bins)
    np.testing.assert_allclose(parts.ranks, whole.ranks)
    assert parts.area == pytest.approx(whole.area)
    assert parts.squares == pytest.approx(whole.squares)


def test_probabilities_that_mean_what_they_say_have_no_error() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(200_000)
    honest = reliability(p, rng.random(p.size) < p, np.ones(p.size)).event_table()
    assert honest["expected_calibration_error"] < 0.01
    assert honest["brier"] == pytest.approx(1 / 6, abs=0.005)
    assert honest["auc"] == pytest.approx(5 / 6, abs=0.005)
    proud = reliability(np.sqrt(p), rng.random(p.size) < p, np.ones(p.size)).event_table()
    assert proud["expected_calibration_error"] == pytest.approx(2 / 3 - 1 / 2, abs=0.01)
    assert proud["auc"] == pytest.approx(honest["auc"], abs=0.01)


def test_probabilities_that_tell_nothing_rank_by_chance() -> None:
    got = reliability(np.full(10, 0.3), np.arange(10) < 3, np.ones(10)).event_table()
    assert got["expected_calibration_error"] == pytest.approx(0)
    assert (got["auc"], got["average_precision"], got["rate"]) == pytest.approx((0.5, 0.3, 0.3))


def test_small_probabilities_are_told_apart() -> None:
    got = reliability([1e-5, 2e-5, 1e-5], [False, True, False], np.ones(3)).event_table()
    assert (got["auc"], got["average_precision"]) == (1.0, 1.0)


@pytest.mark.parametrize("value", [250.0, -0.1])
def test_values_that_are_not_probabilities_are_refused(value: float) -> None:
    with pytest.raises(DataError, match=r"confidence ranges from .*divide scaled values"):
        reliability(np.array([0.5, value]), np.ones(2), np.ones(2))
