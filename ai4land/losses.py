"""What the network minimises: cross-entropy balanced over classes, with more weight on the cells that change."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ai4land.legend import MISSING


def class_weights(counts: NDArray[np.int64], *, power: float) -> NDArray[np.float32]:
    """Weight classes by their frequency to the minus ``power``, scaled so that the mean weight of a cell is 1.

    Parameters
    ----------
    counts
        Training cells of each class, ``(class,)``. A class without cells gets weight 0.
    power
        0 weights every cell alike, 1 every class alike.

    >>> class_weights(np.array([3, 1, 0]), power=1.0).tolist()
    [0.6666666865348816, 2.0, 0.0]
    """
    share = counts / max(int(counts.sum()), 1)
    weights = np.where(counts > 0, np.where(counts > 0, share, 1.0) ** -power, 0.0)
    mean = float((weights * share).sum())
    return (weights / (mean or 1.0)).astype(np.float32)


def weighted_cross_entropy(logits: Tensor, target: Tensor, reference: Tensor, weights: Tensor, *, change_weight: float) -> Tensor:
    """Cross-entropy over the cells that have a target, as a weighted mean.

    Parameters
    ----------
    logits
        ``(batch, class, rows, columns)``.
    target, reference
        Class indices ``(batch, rows, columns)``; a target of ``MISSING`` is not scored.
    weights
        Weight of each class, ``(class,)``.
    change_weight
        Factor for cells whose reference is known and differs from the target.

    Returns
    -------
    Tensor
        Scalar; 0 where no cell has a target.
    """
    scored = target != MISSING
    wanted = torch.where(scored, target, 0).long()
    weight = weights[wanted] * scored
    changed = (reference != MISSING) & (reference != target)
    weight = torch.where(changed, weight * change_weight, weight)
    loss = F.cross_entropy(logits.float(), wanted, reduction="none")
    return (loss * weight).sum() / weight.sum().clamp(min=1e-6)
