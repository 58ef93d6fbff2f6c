"""Untrained networks and their cards."""

from __future__ import annotations

import torch
from torch import nn

from ai4land.legend import load_legend
from ai4land.model.checkpoint import Card
from ai4land.model.features import Feature, FeatureSpec
from ai4land.model.unet import UNet

LEGEND = load_legend("hildaplus")
SPEC = FeatureSpec(
    features=(Feature(name="height", mean=3.5, std=0.25), Feature(name="zone", codes=(1, 2))),
    states=("primf", "urban"),
    codes=tuple(LEGEND.codes.tolist()),
    difference_std=(0.1, 0.02),
)


def network(seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    net = UNet(
        static_channels=len(SPEC.static_names),
        coarse_channels=len(SPEC.coarse_names),
        classes=LEGEND.n,
        factor=4,
        base=2,
        depth=1,
        coarse_features=2,
    )
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net.eval()


def card(net: UNet) -> Card:
    return Card(
        legend=LEGEND,
        spec=SPEC,
        network=net.settings,
        cell=(0.25, 0.25),
        weights="",
        split="s",
        store="t",
        training={"steps": 3, "loss": 0.5},
    )


CLASSES, FACTOR = 4, 16


def randomised(depth: int, *, base: int = 2, seed: int = 0) -> UNet:
    """A network in evaluation mode whose every parameter and running statistic is random, in float64.

    Biases of the normalisation are positive, so that few ReLUs are dead and the whole receptive field shows.
    """
    torch.manual_seed(seed)
    net = UNet(static_channels=2, coarse_channels=3, classes=CLASSES, factor=FACTOR, base=base, depth=depth, coarse_features=2)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, 0.5, 2.0)
    return net.double().eval()
