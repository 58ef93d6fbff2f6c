from __future__ import annotations

import torch

from ai4land.legend import MISSING
from ai4land.model.ensemble import Ensemble
from ai4land.model.unet import UNet
from ai4land.train.batch import Batch
from ai4land.train.validation import fit_sharpness

CLASSES, FACTOR = 4, 8


def network(seed: int = 0, *, head: float = 2.0) -> UNet:
    """A network whose output is not that of an untrained one."""
    torch.manual_seed(seed)
    net = UNet(static_channels=2, coarse_channels=3, classes=CLASSES, factor=FACTOR, base=2, depth=1, coarse_features=2)
    torch.nn.init.normal_(net.head.weight, std=head)
    return net.eval()


def batch(seed: int = 0, *, n: int = 6, size: int = 16, sharpness: float | None = None) -> Batch:
    """Random inputs; with a sharpness, targets drawn from the tempered output of the untrained network, which keeps classes."""
    g = torch.Generator().manual_seed(seed)
    reference = torch.randint(0, CLASSES, (n, size, size), generator=g).to(torch.uint8)
    logits = (sharpness or 1.0) * 7.0 * torch.nn.functional.one_hot(reference.long(), CLASSES).float()
    target = torch.multinomial(torch.softmax(logits, -1).flatten(0, 2), 1, generator=g).view(n, size, size).to(torch.uint8)
    static, coarse = torch.randn(n, 2, size, size, generator=g), torch.randn(n, 3, 5, 5, generator=g)
    return Batch(static, reference, coarse, torch.full((n, 2), FACTOR), target)


def call(net: torch.nn.Module, b: Batch) -> torch.Tensor:
    with torch.inference_mode():
        return torch.log_softmax(net(b.static, b.reference, b.coarse, b.offset), dim=1)


def test_one_member_is_itself():
    b = batch()
    assert torch.allclose(call(Ensemble([network()]), b), call(network(), b), atol=1e-6)


def test_members_are_averaged_as_log_probabilities_and_made_sharper():
    b = batch()
    parts = [call(network(i), b) for i in range(3)]
    assert (parts[0] - parts[1]).abs().max() > 0.1
    wanted = torch.log_softmax(0.7 * sum(parts) / 3, dim=1)
    both = Ensemble([network(i) for i in range(3)], sharpness=0.7)
    assert torch.allclose(call(both, b), wanted, atol=1e-5)
    assert (both.stride, both.halo, both.classes, both.factor) == (2, network().halo, CLASSES, FACTOR)


def test_sharpness_is_found_again():
    """Of a network that is much surer than it should be."""
    for truth in (0.3, 0.45):
        batches = [batch(seed, sharpness=truth) for seed in range(8)]
        for totals in (False, True):
            found = fit_sharpness(Ensemble([network(head=0.0)]), batches, totals=totals)
            assert abs(found - truth) < 0.07


def test_sharpness_does_not_depend_on_the_one_before():
    batches = [batch(0, sharpness=0.6)]
    found = [fit_sharpness(Ensemble([network(head=0.0)], sharpness=s), batches, totals=False) for s in (1.0, 1.7)]
    assert abs(found[0] - found[1]) < 0.02


def test_nothing_to_score_leaves_the_sharpness_alone():
    b = batch()
    empty = Batch(b.static, b.reference, b.coarse, b.offset, torch.full_like(b.target, MISSING))
    assert fit_sharpness(Ensemble([network()]), [empty], totals=True) == 1.0
    assert fit_sharpness(Ensemble([network()]), [], totals=True) == 1.0
