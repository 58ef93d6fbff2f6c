"""Several networks as one, and how sure they are together.

Members are trained alike but for their seed. Their log probabilities are averaged, which cancels much of what each of them
learned by chance, and multiplied by a *sharpness* (an inverse temperature; Guo et al. 2017, arXiv:1706.04599), fitted on
validation data, so that a probability of 0.3 comes true three times in ten.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ai4land.batch import Batch
from ai4land.losses import change_loss
from ai4land.unet import UNet

_RANGE = (0.25, 2.0)
"""Between which the sharpness is sought."""


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
        """Predict class logits, ``(batch, class, rows, columns)``; parameters as in :meth:`ai4land.unet.UNet.forward`."""
        logits: Tensor = torch.log_softmax(self.members[0](static, reference, coarse, offset).float(), dim=1)
        for member in self.members[1:]:
            logits = logits + torch.log_softmax(member(static, reference, coarse, offset).float(), dim=1)
        return logits * (self.sharpness / len(self.members))


@torch.inference_mode()
def fit_sharpness(model: Ensemble, batches: Iterable[Batch], *, totals: bool) -> float:
    """Find the sharpness that makes the targets most likely.

    It is as good as the batches are: those of disturbed maps say how sure the network is of these, not of change that happens.

    Parameters
    ----------
    model
        Its own sharpness does not count.
    batches
        That training has not seen.
    totals
        Whether the coarse totals of the targets are imposed on the probabilities, as in training.

    Returns
    -------
    float
        Between 0.25 and 2; 1 where no cell has a target.
    """
    model.eval()
    seen: list[tuple[Tensor, Batch]] = []
    for batch in batches:
        logits = model(batch.static, batch.reference, batch.coarse, batch.offset) / model.sharpness
        seen.append((logits, batch))
    ones = torch.ones(model.classes)

    def loss(sharpness: float) -> float:
        total = 0.0
        for logits, batch in seen:
            offset = batch.offset if totals else None
            weights = ones.to(logits.device)
            total += float(
                change_loss(
                    sharpness * logits,
                    batch.target,
                    batch.reference,
                    weights,
                    change_weight=1.0,
                    offset=offset,
                    factor=model.factor,
                )
            )
        return total

    if not loss(1.0):
        return 1.0
    from scipy.optimize import minimize_scalar  # here, as SciPy loads slowly

    return float(minimize_scalar(loss, bounds=_RANGE, method="bounded", options={"xatol": 0.01}).x)
