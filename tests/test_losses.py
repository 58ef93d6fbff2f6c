from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.nn import functional as F

from ai4land.legend import MISSING
from ai4land.losses import class_weights, weighted_cross_entropy

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
    got = weighted_cross_entropy(logits, target, reference, weights, change_weight=1.0)
    assert torch.allclose(got, expected, rtol=1e-5)


@given(seed=st.integers(0, 10_000), factor=st.floats(1, 20))
@settings(max_examples=25, deadline=None)
def test_change_weight_multiplies_the_cells_that_are_known_to_change(seed, factor):
    logits, target, reference, weights = batch(seed)
    total, norm = 0.0, 0.0
    nll = -F.log_softmax(logits.double(), dim=1)
    for b, i, j in torch.nonzero(target != MISSING).tolist():
        k, known = int(target[b, i, j]), int(reference[b, i, j])
        weight = float(weights[k]) * (factor if known not in (MISSING, k) else 1.0)
        total, norm = total + weight * float(nll[b, k, i, j]), norm + weight
    got = weighted_cross_entropy(logits, target, reference, weights, change_weight=factor)
    assert float(got) == pytest.approx(total / norm, rel=1e-4)


def test_unscored_cells_have_no_gradient_and_scored_ones_do():
    logits, target, reference, weights = batch(3)
    logits.requires_grad_()
    weighted_cross_entropy(logits, target, reference, weights, change_weight=4.0).backward()
    size = logits.grad.abs().sum(1)
    assert (size[target == MISSING] == 0).all()
    assert (size[target != MISSING] > 0).all()


def test_classes_of_weight_zero_have_no_gradient():
    logits, target, reference, weights = batch(4, holes=0)
    weights[2] = 0
    logits.requires_grad_()
    weighted_cross_entropy(logits, target, reference, weights, change_weight=4.0).backward()
    assert (logits.grad.abs().sum(1)[target == 2] == 0).all()


def test_nothing_to_score_gives_zero():
    logits, target, reference, weights = batch(5)
    logits.requires_grad_()
    loss = weighted_cross_entropy(logits, torch.full_like(target, MISSING), reference, weights, change_weight=2.0)
    loss.backward()
    assert float(loss.detach()) == 0
    assert not logits.grad.any()


def test_half_precision_logits_are_reduced_in_float32():
    logits, target, reference, weights = batch(6)
    half = weighted_cross_entropy(logits.bfloat16(), target, reference, weights, change_weight=2.0)
    full = weighted_cross_entropy(logits.bfloat16().float(), target, reference, weights, change_weight=2.0)
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
