"""Several networks as one, and how sure they are together.

Members are trained alike but for their seed. Their log probabilities are averaged, which cancels much of what each of them
learned by chance, and multiplied by a *sharpness* (an inverse temperature; Guo et al. 2017, arXiv:1706.04599), fitted on
validation data, so that a probability of 0.3 comes true three times in ten.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ai4land.model.unet import UNet


class Ensemble(nn.Module):
    """Members that share inputs and classes; called as one of them is.

    Parameters
    ----------
    members
        Networks of one size.
    sharpness
        Factor of the mean log probabilities.
    """

    def __init__(self, members: Iterable[UNet], *, sharpness: float = 1.0) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.sharpness = sharpness
        first: UNet = self.members[0]  # type: ignore[assignment]
        self.settings, self.classes, self.factor = first.settings, first.classes, first.factor
        self.stride, self.receptive_radius, self.halo = first.stride, first.receptive_radius, first.halo

    def forward(self, static: Tensor, reference: Tensor, coarse: Tensor, offset: Tensor) -> Tensor:
        """Predict class logits, ``(batch, class, rows, columns)``; parameters as in :meth:`ai4land.model.unet.UNet.forward`."""
        logits: Tensor = torch.log_softmax(self.members[0](static, reference, coarse, offset).float(), dim=1)
        for member in self.members[1:]:
            logits = logits + torch.log_softmax(member(static, reference, coarse, offset).float(), dim=1)
        return logits * (self.sharpness / len(self.members))
