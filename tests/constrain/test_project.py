"""The projection: totals met whatever the logits, nothing moved that must not be, and nothing that depends on tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from ai4land.constrain.project import project
from ai4land.errors import DataError
from ai4land.grid import block_sum

CLOSE = 1e-6


@st.composite
def problems(draw: st.DrawFn, *, sure: float = 80.0) -> Any:
    """Probabilities, totals (some 0, some a single class) and a mask, of a few coarse cells."""
    n, factor = draw(st.integers(2, 6)), draw(st.integers(1, 5))
    crows, ccols = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (n, crows * factor, ccols * factor)
    logits = rng.uniform(-1, 1, shape) * draw(st.sampled_from([0.0, 1.0, 10.0, sure]))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    p = torch.softmax(torch.from_numpy(logits.astype(dtype)), 0).numpy()
    totals = rng.dirichlet(np.full(n, draw(st.sampled_from([0.05, 1.0]))), (crows, ccols)).transpose(2, 0, 1)
    totals[rng.random(totals.shape) < draw(st.sampled_from([0.0, 0.5]))] = 0
    totals[rng.integers(n), totals.sum(0) == 0] = 1
    mapped = rng.random(shape[1:]) < draw(st.sampled_from([0.3, 1.0]))
    return p, totals / totals.sum(0), mapped, factor, rng


def shares(fractions: Any, mapped: Any, factor: int, areas: Any = None) -> Any:
    weight = mapped * (1.0 if areas is None else areas[:, None])
    part = np.stack([block_sum(np.where(mapped, f, 0).astype(float) * weight, factor) for f in fractions])
    whole = block_sum(weight, factor)
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)


@given(problems(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_totals_are_met_by_area_or_count_whatever_the_logits(problem: Any, by_area: bool) -> None:
    p, totals, mapped, factor, rng = problem
    areas = rng.uniform(1e6, 2e6, p.shape[1]) if by_area else None
    got = project(p, totals=totals, factor=factor, mapped=mapped, areas=areas)
    assert got.fractions.dtype == p.dtype
    assert all(np.isfinite(a).all() for a in (got.fractions, got.multipliers, got.residual))
    assert got.residual.max() <= CLOSE
    have = shares(got.fractions, mapped, factor, areas)
    there = np.isfinite(have).all(0)
    assert np.abs(have - totals)[:, there].max(initial=0) <= CLOSE
    assert (have[:, there][totals[:, there] == 0] == 0).all()
    assert np.abs(got.fractions.sum(0)[mapped] - 1).max(initial=0) < 1e-6
    assert (got.fractions >= 0).all()
    assert np.array_equal(got.fractions[:, ~mapped], p[:, ~mapped])


@given(problems(sure=20.0))
@settings(max_examples=40, deadline=None)
def test_starting_from_the_answer_takes_no_step_and_gives_the_same(problem: Any) -> None:
    p, totals, mapped, factor, _ = problem
    cold = project(p, totals=totals, factor=factor, mapped=mapped)
    assume(cold.steps < 80)  # in float32 some wander about 1.7e-7 to the last step: that is no answer to start from
    warm = project(p, totals=totals, factor=factor, mapped=mapped, multipliers=cold.multipliers)
    assert warm.steps == 0
    assert np.abs(warm.fractions - cold.fractions).max() < 1e-6


@given(problems(sure=10.0))
@settings(max_examples=40, deadline=None)
def test_the_start_does_not_matter(problem: Any) -> None:
    p, totals, mapped, factor, rng = problem
    p = p.astype(np.float64)
    ends = [
        project(p, totals=totals, factor=factor, mapped=mapped, multipliers=start, tolerance=1e-11, max_steps=300).fractions
        for start in (None, rng.normal(0, 3, totals.shape))
    ]
    assert np.abs(ends[0] - ends[1])[:, mapped].max(initial=0) < 1e-6


@given(problems())
@settings(max_examples=30, deadline=None)
def test_tiles_give_the_fractions_of_the_whole(problem: Any) -> None:
    p, totals, mapped, factor, _ = problem
    whole = project(p, totals=totals, factor=factor, mapped=mapped).fractions
    for i, j in np.ndindex(totals.shape[1:]):
        cut = np.s_[i * factor : (i + 1) * factor, j * factor : (j + 1) * factor]
        part = totals[:, i : i + 1, j : j + 1]
        tile = project(p[(slice(None), *cut)], totals=part, factor=factor, mapped=mapped[cut]).fractions
        assert np.array_equal(tile, whole[(slice(None), *cut)])


@given(problems(sure=20.0))
@settings(max_examples=80, deadline=None)
def test_fixed_cells_stay_and_the_others_make_up_for_them_or_come_near(problem: Any) -> None:
    p, totals, mapped, factor, rng = problem
    fixed = rng.random(mapped.shape) < 0.4
    got = project(p, totals=totals, factor=factor, mapped=mapped, fixed=fixed)
    assert np.array_equal(got.fractions[:, fixed], p[:, fixed])
    assert np.isfinite(got.fractions).all()
    have, held = shares(got.fractions, mapped, factor), shares(p * fixed, mapped, factor)
    there = np.isfinite(have).all(0)
    assert np.allclose(got.residual[there], np.abs(have - totals).max(0)[there], atol=1e-7)
    # what the fixed cells hold in excess is what nobody can take away
    excess = np.maximum(held - totals, 0).sum(0)
    free = block_sum((mapped & ~fixed).astype(int), factor) > 0
    least = np.where(free, excess, np.abs(held - totals).sum(0) / 2)
    assert np.abs(np.abs(have - totals).sum(0) / 2 - least)[there].max(initial=0) < 1e-5


def test_the_fractions_are_those_of_least_relative_entropy() -> None:
    rng = np.random.default_rng(5)
    p = rng.dirichlet(np.ones(3), (2, 2)).transpose(2, 0, 1)
    totals = np.array([0.55, 0.25, 0.2]).reshape(3, 1, 1)
    got = project(p, totals=totals, factor=2, mapped=np.ones((2, 2), bool), tolerance=1e-10).fractions
    flat = p.reshape(3, 4)
    rules = [
        {"type": "eq", "fun": lambda q: q.reshape(3, 4).sum(0) - 1},
        {"type": "eq", "fun": lambda q: (q.reshape(3, 4).mean(1) - totals[:, 0, 0])[:2]},
    ]
    best = minimize(
        lambda q: (q * np.log(q / flat.ravel())).sum(), flat.ravel(), bounds=[(1e-9, 1)] * 12, constraints=rules, tol=1e-14
    )
    assert np.abs(got.reshape(3, 4) - best.x.reshape(3, 4)).max() < 1e-4


def test_coarse_cells_with_nan_or_nothing_mapped_keep_what_they_have() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(3), (4, 8)).transpose(2, 0, 1).astype(np.float32)
    mapped = np.ones((4, 8), bool)
    mapped[:, 4:] = False
    p[:, 0, 4:] = np.nan
    totals = np.full((3, 1, 2), 1 / 3)
    totals[1, 0, 0] = np.nan
    got = project(p, totals=totals, factor=4, mapped=mapped)
    assert np.array_equal(got.fractions, np.nan_to_num(p))
    assert not got.residual.any()
    assert not got.multipliers.any()


def test_a_class_that_underflowed_everywhere_gets_its_total() -> None:
    p = np.zeros((3, 6, 6), np.float32)
    p[0] = 1
    totals = np.array([0.5, 0.3, 0.2]).reshape(3, 1, 1)
    got = project(p, totals=totals, factor=6, mapped=np.ones((6, 6), bool))
    assert np.abs(got.fractions - totals).max() < 1e-6


def test_probabilities_that_meet_the_totals_stay() -> None:
    p = np.random.default_rng(2).dirichlet(np.ones(4), (10, 10)).transpose(2, 0, 1)
    mapped = np.ones((10, 10), bool)
    got = project(p, totals=shares(p, mapped, 5), factor=5, mapped=mapped)
    assert got.steps == 0
    assert np.abs(got.fractions - p).max() < 1e-8


def test_tensors_give_tensors_and_read_only_arrays_are_read() -> None:
    p = np.random.default_rng(2).dirichlet(np.ones(3), (4, 4)).transpose(2, 0, 1).astype(np.float32)
    totals, mapped = np.full((3, 1, 1), 1 / 3), np.ones((4, 4), bool)
    for a in (p, totals, mapped):
        a.flags.writeable = False
    arrays = project(p, totals=totals, factor=4, mapped=mapped)
    tensors = project(torch.from_numpy(p.copy()), totals=totals, factor=4, mapped=mapped)
    assert isinstance(tensors.fractions, torch.Tensor)
    assert np.array_equal(tensors.fractions.numpy(), arrays.fractions)
    assert np.array_equal(tensors.multipliers.numpy(), arrays.multipliers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_gives_what_the_processor_gives() -> None:
    rng = np.random.default_rng(2)
    p = torch.from_numpy(rng.dirichlet(np.ones(5), (60, 90)).transpose(2, 0, 1).astype(np.float32))
    totals, mapped = rng.dirichlet(np.ones(5), (2, 3)).transpose(2, 0, 1), np.ones((60, 90), bool)
    here = project(p, totals=totals, factor=30, mapped=mapped)
    there = project(p.cuda(), totals=totals, factor=30, mapped=mapped)
    assert there.fractions.is_cuda
    assert (there.fractions.cpu() - here.fractions).abs().max() < 1e-5
    assert there.residual.max() <= CLOSE


GOOD = {"totals": np.full((2, 1, 1), 0.5), "factor": 4, "mapped": np.ones((4, 4), bool)}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"factor": 3}, "whole coarse cells"),
        ({"totals": np.full((3, 1, 1), 1 / 3)}, "totals are"),
        ({"totals": np.full((2, 1, 1), 0.3)}, "do not sum to 1"),
        ({"totals": np.array([1.5, -0.5]).reshape(2, 1, 1)}, "negative"),
        ({"mapped": np.ones((4, 5), bool)}, "mapped are"),
        ({"areas": np.ones(5)}, "areas are"),
        ({"fixed": np.ones((2, 2), bool)}, "fixed are"),
        ({"multipliers": np.ones((2, 2))}, "multipliers are"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        project(np.full((2, 4, 4), 0.5, np.float32), **{**GOOD, **change})


@pytest.mark.parametrize("mapped", [np.ones((4, 4), bool), np.arange(16).reshape(4, 4) < 12])
def test_mapped_cells_that_are_not_numbers_are_refused(mapped: Any) -> None:
    p = np.full((2, 4, 4), 0.5, np.float32)
    p[1, 1, 1] = np.nan
    with pytest.raises(DataError, match="not all numbers"):
        project(p, **{**GOOD, "mapped": mapped})
