"""Batch normalisation over the batches of several processes.

A :class:`Group` sums tensors over its processes (gloo on CPUs, NCCL on CUDA devices). :class:`Norm` takes its statistics
from the whole batch, split over the processes. Both need only PyTorch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ai4land.errors import WorkerError

_LONG = timedelta(days=2)
"""How long processes wait for the first one; a global store takes many hours. If it dies, a launcher ends them."""
_MADE = "made"


@dataclass(frozen=True)
class Group:
    """Processes that train together, seen from one of them; by default it is alone.

    ``rank`` is the number of this process, of ``world`` processes; ``rank`` 0 writes. ``store`` is the key-value store of
    the group, None for a single process.
    """

    rank: int = 0
    world: int = 1
    store: Any = None
    _calls: Iterator[int] = field(default_factory=itertools.count, compare=False, repr=False)

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over the processes, in place; all get the same bits."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def first(self, make: Callable[[], object]) -> None:
        """Let the first process make something for all; the others wait until it exists.

        Every process must call this equally often, because calls are matched by number. Raises WorkerError in the other
        processes, at once, if the first one fails.
        """
        key = f"first {next(self._calls)}"
        if self.rank:
            self.store.wait([key], _LONG)
            if (found := self.store.get(key).decode()) != _MADE:
                raise WorkerError(
                    f"process 0 failed with {found}, expected its result; mend what it says in its own log and run again"
                )
            return
        try:
            make()
        except BaseException as error:
            if self.store is not None:
                self.store.set(key, repr(error)[:300])
            raise
        if self.store is not None:
            self.store.set(key, _MADE)

    def add_gradients(self, model: nn.Module, *numbers: Tensor) -> Tensor:
        """Sum a model's gradients over the processes, in place, together with some numbers; return the sums of the numbers.

        One buffer in the order of the parameters makes the order of the additions fixed, unlike buckets filled as gradients
        become ready.
        """
        extra = torch.stack([n.detach().float() for n in numbers])
        if self.world == 1:
            return extra
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = self.sum(torch.cat([*(g.flatten() for g in grads), extra.to(grads[0].device)]))
        for grad, part in zip(grads, flat[: -len(numbers)].split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view(grad.shape))
        return flat[-len(numbers) :]


ALONE = Group()


class Norm(nn.BatchNorm2d):
    """Batch normalisation with statistics over the batches of all processes of a group.

    Each process sums its cells in float32 around its own mean, and the sums are combined in float64, so the result hardly
    depends on how the batch is divided or how far its mean is from 0. ``torch.nn.SyncBatchNorm`` does not run on CPUs.
    """

    group: Group = ALONE

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(batch, channel, rows, columns)``; when not training, use the running statistics."""
        if not self.training:
            return super().forward(x)
        out, mean, variance, count = _Normalised.apply(x, self.weight, self.bias, self.eps, self.group)
        with torch.no_grad():
            part = 0.0 if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, part)  # type: ignore[union-attr]
            self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), part)  # type: ignore[union-attr]
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        return out


class _Normalised(torch.autograd.Function):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias over all processes (Ioffe & Szegedy 2015, arXiv:1502.03167)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: Group) -> tuple[Tensor, ...]:
        cells = _cells(x)
        near = cells.mean(0)
        around = cells - near  # in float32, squares of large numbers would lose the variance
        n, near, rest = len(cells), near.double(), around.sum(0).double()
        squares = around.square_().sum(0).double()
        sums = group.sum(torch.stack([rest + n * near, squares + near * (2 * rest + n * near), torch.full_like(near, n)]))
        count = sums[2, 0]
        mean = sums[0] / count
        variance = (sums[1] / count - mean.square()).clamp(min=0.0)
        scale = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.group = group
        mean, variance, count = (v.to(cells.dtype) for v in (mean, variance, count))
        ctx.mark_non_differentiable(mean, variance, count)
        return nn.functional.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps), mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        dy, cells = _cells(grad), _cells(x)
        near = mean.to(cells.dtype)
        own = torch.stack([dy.sum(0), (cells - near).mul_(dy).sum(0)]).double()
        own[1] = (own[1] - (mean - near) * own[0]) * scale  # dy times normalised x
        whole = ctx.group.sum(own.clone()) / count
        factor = weight * scale
        slope = -whole[1] * scale * factor
        shift = -whole[0] * factor - slope * mean
        factor, slope, shift = (v.to(dy.dtype).view(1, -1, 1, 1) for v in (factor, slope, shift))
        dx = torch.addcmul(shift, x.to(dy.dtype), slope).addcmul_(grad.to(dy.dtype), factor)
        return dx.to(x.dtype), own[1].to(weight.dtype), own[0].to(weight.dtype), None, None


def _cells(x: Tensor) -> Tensor:
    """Reshape ``(batch, channel, rows, columns)`` to ``(cell, channel)``, at least float32; a view if channels-last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def shared_norms(model: nn.Module, group: Group) -> Iterator[None]:
    """Share a model's normalisation statistics over a group for the length of a ``with`` block."""
    norms = [m for m in model.modules() if isinstance(m, Norm)]
    for norm in norms:
        norm.group = group
    try:
        yield
    finally:
        for norm in norms:
            norm.group = ALONE
