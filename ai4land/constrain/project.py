"""Class probabilities that meet the coarse totals exactly and stay as close as possible to the network's.

In every coarse cell :func:`project` finds the fractions q of least relative entropy to the probabilities p whose mean is
the scenario's: q_k ∝ p_k exp(λ_k), with one multiplier λ_k a class and coarse cell (Csiszár 1975, Annals of
Probability 3:146-158). The multipliers minimise a convex function of a dozen variables. Many coarse cells are solved at once by
damped Newton steps, and the multipliers of one year are a good start for the next. Whole cells are assigned by
:mod:`ai4land.constrain.allocate`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ai4land.errors import DataError

_log = logging.getLogger(__name__)
A = TypeVar("A", NDArray[Any], Tensor)

FLOOR = 1e-9
"""Least probability of a class whose total is not 0; float32 does not resolve it beside 1."""
_LEAST = -80.0
"""Least logarithm of the factor of a class whose total is not 0."""
_NAN = "probabilities of mapped cells are not all numbers, expected shares of 0 to 1; check the network's output"


@dataclass(frozen=True)
class Projection(Generic[A]):
    """Fractions that meet the totals; tensors or arrays, as the probabilities were.

    Attributes
    ----------
    fractions
        ``(class, rows, columns)``.
    multipliers
        Float64 ``(class, coarse rows, coarse columns)``, to start the next year from; always finite.
    residual
        Largest difference over the classes between a total and what the fractions have of it, as a share of the mapped
        part of the coarse cell, ``(coarse rows, coarse columns)``; 0 where there are no totals.
    steps
        Newton steps of the slowest coarse cell.
    """

    fractions: A
    multipliers: A
    residual: A
    steps: int


@dataclass(frozen=True)
class Solution:
    """Multipliers and factors of the classes, ``(coarse cell, class)`` both, and the Newton steps taken."""

    multipliers: Tensor
    factors: Tensor
    steps: int


def project(
    probabilities: A,
    *,
    totals: NDArray[np.floating] | Tensor,
    factor: int,
    mapped: NDArray[np.bool_] | Tensor,
    areas: NDArray[np.floating] | Tensor | None = None,
    fixed: NDArray[np.bool_] | Tensor | None = None,
    multipliers: NDArray[np.floating] | Tensor | None = None,
    tolerance: float = 1e-7,
    max_steps: int = 80,
) -> Projection[A]:
    """Change probabilities as little as possible so that each coarse cell meets its totals.

    A class with the total 0 is exactly 0. Other classes count with a probability of at least ``FLOOR``, so that a total is met
    even where the network's probabilities underflow. Totals that the fixed cells make impossible are
    replaced by near ones, and the residual says by how much.

    Each coarse cell is solved by itself: the result does not depend on how a map is cut into tiles.

    Parameters
    ----------
    probabilities
        ``(class, rows, columns)`` of whole coarse cells, float32 or float64, an array or a tensor on any device.
    totals
        Shares of the classes in the mapped part of each coarse cell, ``(class, rows / factor, columns / factor)``, with the
        sum 1. A coarse cell with a NaN keeps its probabilities.
    factor
        Fine cells along one side of a coarse cell.
    mapped
        Cells that count, ``(rows, columns)``. Others are returned unchanged, NaN as 0.
    areas
        Area of a cell of each row, ``(rows,)``; by default every cell counts the same.
    fixed
        Cells whose fractions must not change, ``(rows, columns)``.
    multipliers
        Multipliers to start from, such as those of the year before.
    tolerance
        Largest residual to stop at; float32 does not get much below 1e-7.
    max_steps
        Largest number of Newton steps.

    Raises
    ------
    DataError
        If shapes do not fit, totals are negative or do not sum to 1, or a probability of a mapped cell is not a number.
    """
    p = _tensor(probabilities)
    n, rows, cols = p.shape
    device, dtype = p.device, p.dtype
    if rows % factor or cols % factor or dtype not in (torch.float32, torch.float64):
        raise DataError(
            f"probabilities are {dtype} of {tuple(p.shape)}, expected float32 or float64 of whole coarse cells of {factor}; "
            "use windows that are multiples of the factor"
        )
    crows, ccols = rows // factor, cols // factor
    t = _plane(totals, "totals", (n, crows, ccols), device).double()
    asked = t.isfinite().all(0)
    t = t.where(asked, 0.0)
    if bool(((t < -1e-6).any(0) | ((t.sum(0) - 1).abs() > 1e-3))[asked].any()):
        raise DataError("totals are negative or do not sum to 1, expected shares of the mapped part; divide them by their sum")
    weight = _plane(mapped, "mapped", (rows, cols), device).to(dtype)
    if areas is not None:
        weight *= _plane(areas, "areas", (rows,), device).to(dtype)[:, None]
    locks = torch.zeros_like(weight, dtype=torch.bool) if fixed is None else _plane(fixed, "fixed", (rows, cols), device).bool()
    start = torch.zeros_like(t)
    if multipliers is not None:
        start = torch.nan_to_num(_plane(multipliers, "multipliers", tuple(t.shape), device).double())

    fractions, ends, residual = torch.empty_like(p), start.clone(), torch.zeros_like(t[0])
    steps = 0
    height = max(1, (1 << 16 if device.type == "cpu" else 1 << 24) // (factor * cols))
    for row in range(0, crows, height):
        band = slice(row, min(row + height, crows))
        fine = slice(band.start * factor, band.stop * factor)
        count = band.stop - band.start
        x = segments(p[:, fine], factor, fill=1.0)
        w = segments(weight[None, fine], factor, fill=0.0)[:, 0]
        w *= asked[band].flatten()[:, None]
        lock = segments(locks[None, fine], factor, fill=0.0)[:, 0]
        goal, begin = (a[:, band].flatten(1).T.contiguous() for a in (t.clamp(min=0.0), start))
        goal = goal / goal.sum(1, keepdim=True).clamp(min=1e-300)
        done, rest = _project_segments(x, w, goal, begin, lock, size=factor * factor, tolerance=tolerance, max_steps=max_steps)
        steps = max(steps, done.steps)
        place = fractions[:, fine].unflatten(2, (ccols, factor)).unflatten(1, (count, factor))
        place.copy_(x[:, :, : factor * factor].unflatten(2, (factor, factor)).unflatten(0, (count, ccols)).permute(2, 0, 3, 1, 4))
        ends[:, band] = done.multipliers.T.unflatten(1, (count, ccols))
        residual[band] = rest.unflatten(0, (count, ccols))
    if isinstance(probabilities, np.ndarray):
        return Projection(fractions.numpy(), ends.numpy(), residual.numpy(), steps)
    return Projection(fractions, ends, residual, steps)


def segments(planes: Tensor, factor: int, *, fill: float) -> Tensor:
    """Group the fine cells by coarse cell: ``(class, rows, columns)`` to ``(coarse cell, class, cell)``.

    The last dimension is padded to a multiple of 16, so that all coarse cells have one alignment in memory and their sums do not
    depend on where they lie.
    """
    n, rows, cols = planes.shape
    shape = (rows // factor, cols // factor)
    size = factor * factor
    out = planes.new_empty((shape[0] * shape[1], n, -(-size // 16) * 16))
    out[:, :, size:] = fill
    blocks = planes.unflatten(2, (shape[1], factor)).unflatten(1, (shape[0], factor)).permute(1, 3, 0, 2, 4)
    out[:, :, :size].unflatten(2, (factor, factor)).unflatten(0, shape).copy_(blocks)
    return out


def _project_segments(
    x: Tensor,
    weight: Tensor,
    goal: Tensor,
    start: Tensor,
    lock: Tensor,
    *,
    size: int,
    tolerance: float,
    max_steps: int,
) -> tuple[Solution, Tensor]:
    """Project coarse cells in place; returns multipliers and residuals. Coarse cells of weight 0 do not change."""
    held, room, target = torch.zeros_like(goal), torch.ones_like(goal[:, 0]), goal
    free = weight * ~lock
    if bool(lock.any()):
        whole = weight.sum(1, dtype=torch.float64).clamp(min=1e-300)
        held = total(torch.nan_to_num(x), weight * lock)
        held, room = held / whole[:, None], free.sum(1, dtype=torch.float64) / whole
        left = (goal - held).clamp(min=0.0)
        target = left / left.sum(1, keepdim=True).clamp(min=1e-300)
    change = free > 0
    change[:, size:] = True
    mixed = torch.nonzero(~change.all(1))[:, 0]
    before = x[mixed]
    if bool((before.isnan() & change[mixed][:, None]).any()):
        raise DataError(_NAN)
    before = before.nan_to_num_()
    x[mixed] = before
    x.clamp_(min=FLOOR)
    found = solve(x, free, target, start, tolerance=tolerance, max_steps=max_steps)
    x *= found.factors.to(x.dtype)[:, :, None]
    x /= x.sum(1, keepdim=True)
    have = total(x, free) / free.sum(1, dtype=torch.float64).clamp(min=1e-300)[:, None]
    residual = (have * room[:, None] + held - goal).abs().amax(1) * (weight > 0).any(1)
    x[mixed] = torch.where(change[mixed][:, None], x[mixed], before)
    return found, residual


def solve(
    p: Tensor,
    weight: Tensor,
    totals: Tensor,
    start: Tensor,
    *,
    tolerance: float,
    max_steps: int,
) -> Solution:
    """Find the multipliers of coarse cells by damped Newton steps.

    The function minimised is Σ_i w_i log Σ_k p_ik exp(λ_k) − Σ_k t_k λ_k. It is self-concordant in the general
    sense with respect to the spread d of a step over the classes, so that Newton's step scaled by log(1 + d) / d always
    descends (Sun & Tran-Dinh 2019, Mathematical Programming 178:145-213, doi:10.1007/s10107-018-1282-4).

    Parameters
    ----------
    p
        ``(coarse cell, class, cell)``, greater than 0, not normalised.
    weight
        Weight of the cells, ``(coarse cell, cell)``; a coarse cell with the sum 0 is not changed.
    totals, start
        Float64 ``(coarse cell, class)``.
    tolerance, max_steps
        As in :func:`project`.

    Raises
    ------
    DataError
        If a probability is not a number.
    """
    multipliers = start.clone()
    open_ = totals != 0
    open_ |= ~open_.any(1, keepdim=True)  # no total can be met there
    root = weight.sqrt()
    whole = root.double().square().sum(1)
    left = torch.nonzero(root.any(1))[:, 0]
    eps = torch.finfo(p.dtype).eps
    step = 0
    for step in range(max_steps + 1):
        if not len(left):
            break
        rows: Any = slice(None) if len(left) == len(p) else left
        factors = _factors(multipliers[rows], open_[rows]).to(p.dtype)
        have, mixed = _moments(p[rows], root[rows], factors)
        lack = totals[rows] - have / whole[rows, None]
        worst = lack.abs().amax(1)
        if not bool(worst.isfinite().all()):
            raise DataError(_NAN)
        far = worst > tolerance
        left, lack, mixed = left[far], lack[far], mixed[far]
        if not len(left) or step == max_steps:
            break
        change = _newton(lack, mixed / whole[left, None, None], open_[left])
        multipliers[left] += change
        left = left[change.abs().amax(1) > eps]
    if len(left):
        _log.debug("totals of %d coarse cells are not met after %d steps", len(left), step)
    return Solution(multipliers, _factors(multipliers, open_), step)


def total(x: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum over the cells, ``(coarse cell, class)``; sums of 16 in the dtype of the values, their sum in float64."""
    return (x * weight[:, None]).unflatten(2, (-1, 16)).sum(3).sum(2, dtype=torch.float64)


def _moments(p: Tensor, root: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sums over the cells of q and of its products between classes, q being p times the factors, normalised."""
    x = p * factors[:, :, None]
    x *= (root / x.sum(1))[:, None]
    return total(x, root), torch.bmm(x, x.transpose(1, 2)).double()


def _newton(lack: Tensor, mixed: Tensor, open_: Tensor) -> Tensor:
    """Newton step that removes the lack, scaled so that it descends.

    The second derivatives are the Laplacian of a graph whose edges are the mean products between classes, so there is no small
    difference of large numbers. A common shift of all classes changes nothing; its curvature is set to a positive value.
    """
    edges = mixed - torch.diag_embed(mixed.diagonal(dim1=1, dim2=2))
    curve = torch.diag_embed(edges.sum(2)) - edges
    size = curve.diagonal(dim1=1, dim2=2)
    scale = torch.where(size > 1e-250, size.clamp(min=1e-250).rsqrt(), 0.0)
    shift = torch.where(scale > 0, size.clamp(min=0.0).sqrt(), 0.0)
    shift = shift / shift.norm(dim=1, keepdim=True).clamp(min=1e-150)
    unit = torch.eye(lack.shape[1], dtype=torch.float64, device=lack.device)
    curve = curve * scale[:, :, None] * scale[:, None] + shift[:, :, None] * shift[:, None]
    curve = curve + unit * torch.where(scale > 0, 1e-10, 1.0)[:, None]
    step = scale * torch.linalg.solve(curve, (scale * lack)[:, :, None])[:, :, 0]
    spread = step.masked_fill(~open_, -torch.inf).amax(1) - step.masked_fill(~open_, torch.inf).amin(1)
    spread = spread.clamp(min=1e-30, max=1e30)
    cut = torch.where(spread > 0.3, torch.log1p(spread) / spread, 1.0)
    return step * cut[:, None]


def _factors(multipliers: Tensor, open_: Tensor) -> Tensor:
    """Factors of the classes, the largest of them 1; 0 where the total of a class is 0."""
    power = multipliers.masked_fill(~open_, -torch.inf)
    return (power - power.amax(1, keepdim=True)).clamp(min=_LEAST).exp() * open_


def _plane(values: Any, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Check the shape of an input and move it to the device."""
    tensor = _tensor(values)
    if tuple(tensor.shape) != shape:
        raise DataError(f"{name} are {tuple(tensor.shape)}, expected {shape}; cut them from the same window")
    return tensor.to(device)


def _tensor(values: Any) -> Tensor:
    """Make a tensor of an array, copying a read-only one."""
    return values if isinstance(values, Tensor) else torch.from_numpy(np.require(values, requirements=["C", "W"]))
