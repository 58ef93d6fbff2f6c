"""Tune an ensemble on held-out batches: how sharp its probabilities should be, and whether it can run in bfloat16."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ai4land.legend import MISSING
from ai4land.model.ensemble import Ensemble
from ai4land.model.forward import folded
from ai4land.train.batch import Batch
from ai4land.train.losses import change_loss, impose_totals

_RANGE = (0.25, 2.0)
"""Bounds of the sharpness."""


@torch.inference_mode()
def fit_sharpness(model: Ensemble, batches: Iterable[Batch], *, totals: bool) -> float:
    """Find the sharpness, between 0.25 and 2, that makes the targets most likely; 1 if no cell has a target.

    The batches must be new to the ensemble, whose own sharpness is ignored. If ``totals``, the coarse totals of the targets
    are imposed, as in training. Batches of disturbed maps calibrate for disturbances, not for real change.
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
    from scipy.optimize import minimize_scalar  # here because SciPy loads slowly

    return float(minimize_scalar(loss, bounds=_RANGE, method="bounded", options={"xatol": 0.01}).x)


@torch.inference_mode()
def gate(model: Ensemble, batches: Iterable[Batch], *, totals: bool) -> dict[str, float]:
    """Measure what bfloat16 costs on held-out batches, for an ensemble in evaluation mode.

    If ``totals``, the coarse totals of the targets are imposed first. The result holds ``agreement``, the share of cells
    whose most likely class is that of float32, and ``accuracy_lost``, the accuracy of float32 minus that of bfloat16.
    """
    arms = [folded(model, dtype) for dtype in (torch.float32, torch.bfloat16)]
    cells, same, right = 0, 0, [0, 0]
    for batch in batches:
        scored = batch.target != MISSING
        guesses = []
        for i, arm in enumerate(arms):
            logits = arm(batch.static, batch.reference, batch.coarse, batch.offset)
            if totals:
                logits = impose_totals(logits, batch.target, offset=batch.offset, factor=model.factor)
            guesses.append(logits.argmax(1))
            right[i] += int(((guesses[i] == batch.target) & scored).sum())
        same += int(((guesses[0] == guesses[1]) & scored).sum())
        cells += int(scored.sum())
    share = 1 / max(cells, 1)
    return {"agreement": same * share, "accuracy_lost": (right[0] - right[1]) * share}
