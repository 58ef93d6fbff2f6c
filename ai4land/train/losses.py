"""What the network minimises: cross-entropy of the cells, with and without the coarse totals imposed.

With the totals imposed, the logits of each coarse cell get one *price* a class, so that the expected class totals are those
of the target. The prices are the ones that minimise the cross-entropy of the coarse cell, so its gradient with respect to
them is 0, and they may be taken as constants when differentiating (envelope theorem). What the network then learns is where
in a coarse cell a class lies, which is what the constraint needs, and not how much there is of it, which the scenario says.

Cells that change are rare. They weigh more, and the logits of a change are raised by the logarithm of that weight while
training: the minimum is then at the true probabilities, whatever the weight (logit adjustment, Menon et al. 2021,
arXiv:2007.07314).
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
"""Largest price: a class that a coarse cell does not have is e^-15 times as likely."""


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
    offset, factor
        Row and column of the first cell in fine cells from the corner of a coarse cell ``(batch, 2)``, and fine cells along
        one side of a coarse cell: given the offset, the totals of the target are imposed on each coarse cell, or on the part
        of it that the patch holds.
    whole
        What to divide by: the sum of :func:`cell_weights` over the whole batch, of which these may be a part; default: their own.

    Returns
    -------
    Tensor
        Scalar; 0 where no cell has a target.
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
    """Weight of each cell in :func:`change_loss`, ``(batch, rows, columns)``; 0 where there is no target."""
    scored = target != MISSING
    weight = weights[torch.where(scored, target, 0).long()] * scored
    return torch.where((reference != MISSING) & (reference != target), weight * change_weight, weight)


def coarse_parts(offset: Tensor, *, size: tuple[int, int], factor: int) -> Tensor:
    """Number the coarse cells of a batch, ``(batch, rows, columns)``: cells of one coarse cell have one number.

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
    """Add the prices of :func:`total_prices` to the logits, ``(batch, class, rows, columns)``; parameters as of :func:`change_loss`.

    The prices count as constants when differentiating.
    """
    part = coarse_parts(offset, size=(target.shape[1], target.shape[2]), factor=factor)
    prices = total_prices(logits.detach(), target, part)
    return logits + prices.T[:, part].transpose(0, 1)


@torch.no_grad()
def total_prices(logits: Tensor, target: Tensor, part: Tensor, *, steps: int = 10, tolerance: float = 2e-4) -> Tensor:
    """Find what to add to the logits of each class and part so that the expected totals are those of the target.

    By the Newton steps of :func:`ai4land.constrain.project.solve`, parts of like size side by side; a few steps suffice, as the gradient
    of the loss tolerates an error.

    Parameters
    ----------
    logits
        ``(batch, class, rows, columns)``.
    target
        Class indices ``(batch, rows, columns)``; cells of ``MISSING`` do not count.
    part
        From :func:`coarse_parts`.
    steps, tolerance
        Newton steps at most, and the largest error of a class that is let pass, as a share of the part.

    Returns
    -------
    Tensor
        ``(part, class)``, between -15 and 15.
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
    """Group parts so that the largest of a group has at most half as many cells again as the smallest; empty parts are in none."""
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
