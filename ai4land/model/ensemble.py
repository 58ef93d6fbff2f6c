"""Several networks as one, with calibrated probabilities.

Members differ only in the seed of their training. Averaging their log probabilities cancels much of what each learned by
chance. A *sharpness* (inverse temperature; Guo et al. 2017, arXiv:1706.04599), fitted on validation data, multiplies the
average, so that a probability of 0.3 comes true three times in ten.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ai4land.model.unet import UNet


class Ensemble(nn.Module):
    """Networks of one size with the same inputs, called like one; ``sharpness`` multiplies the mean log probabilities."""

    def __init__(self, members: Iterable[UNet], *, sharpness: float = 1.0) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.sharpness = sharpness
        first: UNet = self.members[0]  # type: ignore[assignment]
        self.settings, self.classes, self.factor = first.settings, first.classes, first.factor
        self.stride, self.receptive_radius, self.halo = first.stride, first.receptive_radius, first.halo

    def forward(self, static: Tensor, reference: Tensor, coarse: Tensor, offset: Tensor) -> Tensor:
        """Predict logits ``(batch, class, rows, columns)``; arguments as in :meth:`ai4land.model.unet.UNet.forward`."""
        logits: Tensor = torch.log_softmax(self.members[0](static, reference, coarse, offset).float(), dim=1)
        for member in self.members[1:]:
            logits = logits + torch.log_softmax(member(static, reference, coarse, offset).float(), dim=1)
        return logits * (self.sharpness / len(self.members))
