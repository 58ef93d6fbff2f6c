from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.nn import functional as F

from ai4land.legend import MISSING
from ai4land.train.losses import change_loss, class_weights, coarse_parts, total_prices

CLASSES = 5


def batch(seed: int, *, holes: float = 0.3):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, CLASSES, 6, 7, generator=rng)
    target = torch.randint(0, CLASSES, (2, 6, 7), generator=rng, dtype=torch.uint8)
    target[torch.rand(target.shape, generator=rng) < holes] = MISSING
    reference = torch.randint(0, CLASSES, (2, 6, 7), generator=rng, dtype=torch.uint8)
    reference[torch.rand(target.shape, generator=rng) < holes] = MISSING
    return logits, target, reference, torch.rand(CLASSES, generator=rng) + 0.1


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_equals_weighted_cross_entropy_of_torch(seed):
    logits, target, reference, weights = batch(seed)
    expected = F.cross_entropy(logits, target.long(), weight=weights, ignore_index=MISSING)
    got = change_loss(logits, target, reference, weights, change_weight=1.0)
    assert torch.allclose(got, expected, rtol=1e-5)


@given(seed=st.integers(0, 10_000), factor=st.floats(1, 20))
@settings(max_examples=25, deadline=None)
def test_change_weight_multiplies_the_cells_that_are_known_to_change(seed, factor):
    logits, target, reference, weights = batch(seed)
    total, norm = 0.0, 0.0
    lifted = logits.double() + np.log(factor)
    for k in range(CLASSES):
        lifted[:, k][(reference == k) | (reference == MISSING)] -= np.log(factor)
    lifted = torch.where((reference == MISSING)[:, None], logits.double(), lifted)
    nll = -F.log_softmax(lifted, dim=1)
    for b, i, j in torch.nonzero(target != MISSING).tolist():
        k, known = int(target[b, i, j]), int(reference[b, i, j])
        weight = float(weights[k]) * (factor if known not in (MISSING, k) else 1.0)
        total, norm = total + weight * float(nll[b, k, i, j]), norm + weight
    got = change_loss(logits, target, reference, weights, change_weight=factor)
    assert float(got) == pytest.approx(total / norm, rel=1e-4)


def test_unscored_cells_have_no_gradient_and_scored_ones_do():
    logits, target, reference, weights = batch(3)
    logits.requires_grad_()
    change_loss(logits, target, reference, weights, change_weight=4.0).backward()
    size = logits.grad.abs().sum(1)
    assert (size[target == MISSING] == 0).all()
    assert (size[target != MISSING] > 0).all()


def test_classes_of_weight_zero_have_no_gradient():
    logits, target, reference, weights = batch(4, holes=0)
    weights[2] = 0
    logits.requires_grad_()
    change_loss(logits, target, reference, weights, change_weight=4.0).backward()
    assert (logits.grad.abs().sum(1)[target == 2] == 0).all()


def test_nothing_to_score_gives_zero():
    logits, target, reference, weights = batch(5)
    logits.requires_grad_()
    loss = change_loss(logits, torch.full_like(target, MISSING), reference, weights, change_weight=2.0)
    loss.backward()
    assert float(loss.detach()) == 0
    assert not logits.grad.any()


def test_half_precision_logits_are_reduced_in_float32():
    logits, target, reference, weights = batch(6)
    half = change_loss(logits.bfloat16(), target, reference, weights, change_weight=2.0)
    full = change_loss(logits.bfloat16().float(), target, reference, weights, change_weight=2.0)
    assert half.dtype == torch.float32
    assert float(half) == float(full)


@given(counts=hnp.arrays(np.int64, st.integers(2, 12), elements=st.integers(0, 10**9)), power=st.floats(0, 1))
def test_class_weights_have_mean_one_and_favour_the_rare(counts, power):
    weights = class_weights(counts, power=power)
    assert weights.dtype == np.float32
    assert np.isfinite(weights).all()
    assert (weights[counts == 0] == 0).all()
    if counts.any():
        assert (weights.astype(float) * counts).sum() / counts.sum() == pytest.approx(1, rel=1e-5)
        kept = counts > 0
        order = np.argsort(counts[kept])
        assert (np.diff(weights[kept][order]) <= 1e-6 * weights.max()).all()


def test_class_weight_powers():
    counts = np.array([900, 90, 10])
    assert np.allclose(class_weights(counts, power=0.0), 1)
    share = class_weights(counts, power=1.0) * counts
    assert np.allclose(share, share[0], rtol=1e-5)
    root = class_weights(counts, power=0.5)
    assert root[2] / root[0] == pytest.approx(np.sqrt(90), rel=1e-5)


@given(seed=st.integers(0, 10_000), factor=st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_prices_give_each_coarse_cell_the_totals_of_the_target(seed, factor):
    rng = torch.Generator().manual_seed(seed)
    logits, target, *_ = batch(seed)
    offset = torch.randint(0, 3 * factor, (2, 2), generator=rng)
    part = coarse_parts(offset, size=(6, 7), factor=factor)
    prices = total_prices(logits, target, part, steps=40, tolerance=1e-6)
    p = torch.softmax(logits + prices[part].permute(0, 3, 1, 2), dim=1)
    for number in part.unique():
        here = (part == number) & (target != MISSING)
        have = p.permute(0, 2, 3, 1)[here].sum(0)
        want = torch.bincount(target[here].long(), minlength=CLASSES)
        assert torch.allclose(have, want.float(), atol=0.02)


def test_parts_follow_the_coarse_cells_and_never_mix_patches():
    part = coarse_parts(torch.tensor([[5, 2], [0, 0]]), size=(4, 6), factor=4)
    rows, cols = (np.arange(4) + 5) // 4, (np.arange(6) + 2) // 4
    key = [tuple(k) for k in np.stack(np.broadcast_arrays(rows[:, None], cols), -1).reshape(-1, 2).tolist()]
    assert len(set(zip(key, part[0].flatten().tolist(), strict=True))) == len(set(key)) == len(set(part[0].flatten().tolist()))
    assert not set(part[0].flatten().tolist()) & set(part[1].flatten().tolist())


def test_imposed_totals_leave_nothing_to_learn_about_how_much_there_is():
    logits, target, reference, weights = batch(8, holes=0)
    bias = torch.randn(CLASSES, generator=torch.Generator().manual_seed(1))[:, None, None]
    one = {"offset": torch.zeros(2, 2, dtype=torch.int64), "factor": 16}
    weights = torch.ones(CLASSES)
    losses = [float(change_loss(x, target, reference, weights, change_weight=1.0, **one)) for x in (logits, logits + bias)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert losses[0] < float(change_loss(logits, target, reference, weights, change_weight=1.0))


def test_gradient_with_imposed_totals_is_that_of_the_whole_function():
    logits, target, reference, _ = batch(9, holes=0)
    logits = logits.double().requires_grad_()
    one = {"offset": torch.zeros(2, 2, dtype=torch.int64), "factor": 16}

    def loss(x):
        return change_loss(x, target, reference, torch.ones(CLASSES), change_weight=1.0, **one)

    loss(logits).backward()
    step = 0.05 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        difference = float(loss(logits + step) - loss(logits - step)) / 2
    assert difference == pytest.approx(float((logits.grad * step).sum()), rel=0.1, abs=2e-4)


def test_weighted_changes_keep_the_minimum_at_the_true_probabilities():
    reference = torch.zeros(1, 20, 50, dtype=torch.uint8)
    target = reference.clone()
    target[:, :2] = 1
    logits = torch.zeros(1, 2, 1, 1, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=60)

    def closure():
        optimiser.zero_grad()
        value = change_loss(logits.expand(1, 2, 20, 50), target, reference, torch.ones(2), change_weight=8.0)
        value.backward()
        return value

    optimiser.step(closure)
    assert float(torch.softmax(logits.detach(), 1)[0, 1, 0, 0]) == pytest.approx(0.1, abs=1e-3)
