"""The training loss: cross-entropy per cell, with and without the coarse totals imposed.

To impose totals, each coarse cell adds one *price* per class to its logits, so that the expected class totals match those of
the target. These prices minimise the coarse cell's cross-entropy, so its gradient with respect to them is 0 and they count
as constants when differentiating (envelope theorem). The network thus learns where in a coarse cell a class lies; how much
of it there is, the scenario says.

Changed cells are rare. They weigh more, and in training the logits of a change are raised by the logarithm of that weight,
so the minimum stays at the true probabilities (logit adjustment, Menon et al. 2021, arXiv:2007.07314).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ai4land.constrain.project import FLOOR, solve
from ai4land.legend import MISSING

_LIMIT = 15.0
"""Largest absolute price; a class absent from a coarse cell gets the price -15."""


def class_weights(counts: NDArray[np.int64], *, power: float) -> NDArray[np.float32]:
    """Weight classes by frequency to the power of minus ``power``, scaled so that the mean weight of a cell is 1.

    ``counts`` holds the training cells of each class, ``(class,)``; a class without cells gets weight 0. A ``power`` of 0
    gives cells equal weights, 1 gives classes equal weights.

    >>> class_weights(np.array([3, 1, 0]), power=1.0).tolist()
    [0.6666666865348816, 2.0, 0.0]
    """
    share = counts / max(int(counts.sum()), 1)
    weights = np.where(counts > 0, np.where(counts > 0, share, 1.0) ** -power, 0.0)
    mean = float((weights * share).sum())
    return (weights / (mean or 1.0)).astype(np.float32)


def change_loss(
    logits: Tensor,
    target: Tensor,
    reference: Tensor,
    weights: Tensor,
    *,
    change_weight: float,
    offset: Tensor | None = None,
    factor: int = 1,
    whole: Tensor | None = None,
) -> Tensor:
    """Compute the weighted mean cross-entropy of the cells that have a target; a scalar, 0 if there are none.

    Parameters
    ----------
    logits, weights
        ``(batch, class, rows, columns)``, and class weights ``(class,)``.
    target, reference
        Class indices ``(batch, rows, columns)``; a target of ``MISSING`` is not scored.
    change_weight
        Factor for cells whose reference is known and differs from the target.
    offset, factor
        Row and column of the first cell, in fine cells from the corner of a coarse cell ``(batch, 2)``, and fine cells along
        one side of a coarse cell. With an offset, the totals of the target are imposed on each coarse cell, or on the part
        of it inside the patch.
    whole
        Divisor: the sum of :func:`cell_weights` over the whole batch, if this is a part of it; default: over this batch.
    """
    wanted = torch.where(target != MISSING, target, 0).long()
    known = reference != MISSING
    weight = cell_weights(target, reference, weights, change_weight=change_weight)
    logits = logits.float()
    if offset is not None:
        logits = impose_totals(logits, target, offset=offset, factor=factor)
    lift = math.log(change_weight) * known[:, None]
    classes = torch.arange(logits.shape[1], device=logits.device)[:, None, None]
    adjusted = logits + torch.where(classes == reference[:, None], 0.0, lift)
    loss = F.cross_entropy(adjusted, wanted, reduction="none")
    return (loss * weight).sum() / (weight.sum() if whole is None else whole).clamp(min=1e-6)


def cell_weights(target: Tensor, reference: Tensor, weights: Tensor, *, change_weight: float) -> Tensor:
    """Return the weight of each cell in :func:`change_loss`, ``(batch, rows, columns)``; 0 where there is no target."""
    scored = target != MISSING
    weight = weights[torch.where(scored, target, 0).long()] * scored
    return torch.where((reference != MISSING) & (reference != target), weight * change_weight, weight)


def coarse_parts(offset: Tensor, *, size: tuple[int, int], factor: int) -> Tensor:
    """Number the coarse cells of a batch, ``(batch, rows, columns)``; fine cells in the same coarse cell share a number.

    >>> coarse_parts(torch.tensor([[1, 0]]), size=(3, 2), factor=2).tolist()
    [[[0, 0], [2, 2], [2, 2]]]
    """
    rows, cols = (
        torch.div(offset[:, i, None] % factor + torch.arange(size[i], device=offset.device), factor, rounding_mode="floor")
        for i in (0, 1)
    )
    side = -(-(max(size) + factor - 1) // factor)
    batch = torch.arange(offset.shape[0], device=offset.device)[:, None, None]
    return (batch * side + rows[:, :, None]) * side + cols[:, None, :]


def impose_totals(logits: Tensor, target: Tensor, *, offset: Tensor, factor: int) -> Tensor:
    """Add :func:`total_prices`, as constants, to logits ``(batch, class, rows, columns)``; see :func:`change_loss`."""
    part = coarse_parts(offset, size=(target.shape[1], target.shape[2]), factor=factor)
    prices = total_prices(logits.detach(), target, part)
    return logits + prices.T[:, part].transpose(0, 1)


@torch.no_grad()
def total_prices(logits: Tensor, target: Tensor, part: Tensor, *, steps: int = 10, tolerance: float = 2e-4) -> Tensor:
    """Find what to add to the logits of each class and part so that expected totals match those of the target.

    Uses the Newton steps of :func:`ai4land.constrain.project.solve` on groups of parts of similar size. A few steps suffice,
    because the gradient of the loss tolerates an error. Returns ``(part, class)``, between -15 and 15.

    Parameters
    ----------
    logits, target
        ``(batch, class, rows, columns)``, and class indices ``(batch, rows, columns)``, where ``MISSING`` cells do not
        count.
    part
        Numbers from :func:`coarse_parts`.
    steps, tolerance
        Maximum number of Newton steps, and largest accepted error of a class, as a share of the part.
    """
    n = logits.shape[1]
    flat, wanted = part.flatten(), target.flatten()
    use = wanted != MISSING
    parts = int(flat.max()) + 1
    totals = torch.bincount((flat * n + wanted)[use], minlength=parts * n).view(parts, n)
    sizes = totals.sum(1)
    cells = logits.transpose(0, 1).reshape(n, -1)
    inside = torch.argsort(torch.where(use, flat, parts), stable=True)
    first = sizes.cumsum(0) - sizes
    prices = torch.zeros(parts, n, dtype=torch.float64, device=logits.device)
    for which in _alike(sizes):
        place = torch.arange(-(-int(sizes[which].max()) // 16) * 16, device=logits.device)
        there = place < sizes[which, None]
        p = cells[:, inside[torch.where(there, first[which, None] + place, 0)]].transpose(0, 1).contiguous()
        p -= p.amax(1, keepdim=True)
        p.exp_().clamp_(min=FLOOR).nan_to_num_(1.0)
        share = totals[which] / sizes[which, None].double()
        found = solve(p, there.to(p.dtype), share, torch.zeros_like(share), tolerance=tolerance, max_steps=steps)
        prices[which] = found.multipliers
    return torch.where(totals > 0, prices, -_LIMIT).clamp(-_LIMIT, _LIMIT).to(logits.dtype)


def _alike(sizes: Tensor) -> list[Tensor]:
    """Group parts whose largest size is at most 1.5 times the smallest; omit empty parts."""
    order = torch.argsort(sizes, descending=True)
    groups: list[list[int]] = []
    largest = math.inf
    for index, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        if not size:
            break
        if 3 * size < 2 * largest:
            groups.append([])
            largest = size
        groups[-1].append(index)
    return [torch.tensor(g, device=sizes.device) for g in groups]
