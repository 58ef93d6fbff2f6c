"""The training loop, of one process or of each of a group.

Batches follow from the seed and the step alone and the state is saved every few steps, so that a run that was killed
goes on to the same weights, bit for bit, on the same number of threads and processes. The best weights by validation loss, of an
exponential moving average, are what is kept.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ai4land.batch import Batch, prefetched
from ai4land.checkpoint import load_state, save_state
from ai4land.device import device as device_of_process
from ai4land.errors import DataError, MismatchError, Unfinished
from ai4land.forward import bfloat16_pays
from ai4land.legend import MISSING
from ai4land.losses import cell_weights, change_loss, impose_totals
from ai4land.norm import ALONE, Group, shared_norms
from ai4land.stores import write_atomically
from ai4land.unet import UNet

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """How the network learns; the fields are those of :class:`ai4land.config.TrainConfig`."""

    steps: int
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    warmup: int = 50
    clip: float = 1.0
    ema: float = 0.99
    change_weight: float = 5.0
    totals_share: float = 1.0
    validate_every: int = 100
    patience: int = 10
    checkpoint_every: int = 100
    precision: str = "auto"
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then half a cosine down to 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        part = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))


@dataclass(frozen=True)
class Trained:
    """The best weights by validation loss, their step and loss, and the steps taken; step 0 is the untrained network."""

    weights: dict[str, Tensor]
    best_step: int
    best_loss: float
    steps: int


def fit(
    model: UNet,
    *,
    batches: Callable[[int], Iterator[Batch]],
    validation: list[Batch],
    weights: Tensor,
    schedule: Schedule,
    folder: Path,
    fingerprint: str,
    group: Group = ALONE,
    until: float | None = None,
    device: torch.device | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> Trained:
    """Train a network, from the start or from where it stopped.

    Parameters
    ----------
    model
        The network; trained in place.
    batches
        Makes the batches from a given step on; of a group, the part of each that is this process's.
    validation
        Batches, or parts of them, that are scored every ``validate_every`` steps.
    weights
        Class weights of the loss, ``(class,)``.
    schedule
        How long and how.
    folder
        Where ``metrics.jsonl`` and ``resume.pt`` are kept.
    fingerprint
        Of everything that shapes the result; a state with another one is refused.
    group
        Processes that train together; the first of them keeps the folder.
    until
        Time, in seconds since 1970, from which on training is left: its state is saved at the end of the step.
    device
        Default: that of :func:`ai4land.device.device`.
    progress
        Called after each step with the step and its numbers, by the first process.

    Raises
    ------
    MismatchError
        If ``resume.pt`` is of another configuration.
    DataError
        If a loss is not finite.
    Unfinished
        If training was left; called again, it goes on.
    """
    device = device or device_of_process()
    half = bfloat16_pays(device) if schedule.precision == "auto" else schedule.precision == "bfloat16"
    half = int(group.sum(torch.tensor(int(half), device=device))) == group.world
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights = weights.to(device)
    validation = [b.to(device) for b in validation]
    wholes = _wholes(validation, weights, schedule, group)
    optimiser = torch.optim.AdamW(_groups(model, schedule.weight_decay), lr=schedule.learning_rate)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    best = {k: v.clone() for k, v in average.items()}
    step, best_step, best_loss, waited = 0, 0, math.inf, 0
    resume = folder / "resume.pt"
    if resume.is_file():
        state = load_state(resume)
        if state["fingerprint"] != fingerprint:
            raise MismatchError(
                f"training in {folder} was begun with another configuration ({state['fingerprint']}, expected {fingerprint}); "
                "restore the run file, choose another name, or delete the folder's resume.pt"
            )
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        average, best = ({k: v.to(device) for k, v in state[name].items()} for name in ("average", "best"))
        step, best_step, best_loss, waited = state["step"], state["best_step"], state["best_loss"], state["waited"]
        _log.info("training goes on from step %d", step)
    if int(group.sum(torch.tensor(step, device=device))) != step * group.world:
        raise RuntimeError(f"process {group.rank} read the state of step {step} in {folder}, others that of another one")
    leads = group.rank == 0
    rows = _Rows(folder / "metrics.jsonl" if leads else Path(os.devnull), keep=step)

    def score(parameters: dict[str, Tensor]) -> dict[str, float]:
        return _validate(model, parameters, validation, wholes, weights, schedule, half, group)

    if step == 0:
        first = score(average)
        best_loss = first["validation_loss"]
        rows.add({"step": 0, **first})
    source = prefetched(batches(step), pin=device.type == "cuda")
    with closing(source), closing(rows), shared_norms(model, group):
        while step < schedule.steps and waited < schedule.patience:
            began = time.perf_counter()
            batch = next(source).to(device)
            arrived = time.perf_counter()
            for parameters in optimiser.param_groups:
                parameters["lr"] = schedule.rate(step)
            model.train()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                logits = model(batch.static, batch.reference, batch.coarse, batch.offset)
            loss = _loss(logits, batch, weights, schedule, model.factor, whole=_wholes([batch], weights, schedule, group)[0])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            over = torch.tensor(float(until is not None and time.time() >= until), device=device)
            whole_loss, leave = group.add_gradients(model, loss, over).tolist()
            if not math.isfinite(whole_loss):
                raise DataError(
                    f"training loss is {whole_loss} at step {step}, expected a number; lower train.learning_rate or look for NaN in the inputs"
                )
            norm = nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
            optimiser.step()
            step += 1
            _average(average, model, min(schedule.ema, step / (step + 10)))
            now = time.perf_counter()
            row = {
                "step": step,
                "loss": round(whole_loss, 6),
                "lr": schedule.rate(step - 1),
                "gradient_norm": round(float(norm), 5),
                "seconds": round(now - began, 4),
                "waited": round(arrived - began, 4),
                "workers": group.world,
            }
            if step % schedule.validate_every == 0 or step == schedule.steps:
                row |= score(average)
                waited += 1
                if row["validation_loss"] < best_loss:
                    best_loss, best_step, waited = row["validation_loss"], step, 0
                    best = {k: v.clone() for k, v in average.items()}
            rows.add(row)
            if leads and progress is not None:
                progress(step, row)
            ends = step == schedule.steps or waited >= schedule.patience
            left = leave > 0 and not ends
            if leads and (step % schedule.checkpoint_every == 0 or ends or left):
                state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "average": average, "best": best}
                numbers = {
                    "step": step,
                    "best_step": best_step,
                    "best_loss": best_loss,
                    "waited": waited,
                    "fingerprint": fingerprint,
                }
                save_state(resume, {**state, **numbers})
            if left:
                group.sum(torch.zeros((), device=device))  # nobody leaves before the state is on disk
                raise Unfinished(
                    f"training in {folder} was left at step {step} of {schedule.steps}, as the time of its job is over; run it again to go on"
                )
    _log.info("trained %d steps; best validation loss %.5f at step %d", step, best_loss, best_step)
    if leads and not best_step:
        _log.warning(
            "no step of the training in %s has a lower validation loss than the untrained network (%.5f), expected some; the UNTRAINED weights are "
            "kept: the model copies its reference map. Look at validation_loss in metrics.jsonl, lower train.learning_rate or add steps",
            folder,
            best_loss,
        )
    return Trained({k: v.cpu() for k, v in best.items()}, best_step, best_loss, step)


def _wholes(batches: list[Batch], weights: Tensor, schedule: Schedule, group: Group) -> list[Tensor | None]:
    """Weight of each whole batch, of which this process has a part; None for its own."""
    if group.world == 1 or not batches:
        return [None] * len(batches)
    own = [cell_weights(b.target, b.reference, weights, change_weight=schedule.change_weight).sum() for b in batches]
    return list(group.sum(torch.stack(own)))


def _loss(logits: Tensor, batch: Batch, weights: Tensor, schedule: Schedule, factor: int, *, whole: Tensor | None) -> Tensor:
    """Loss with the totals imposed and without, by their shares; of a group, this process's part of it."""
    change = schedule.change_weight
    part = partial(change_loss, logits, batch.target, batch.reference, weights, change_weight=change, whole=whole)
    total, share = torch.zeros((), device=logits.device), schedule.totals_share
    if share:
        total = total + share * part(offset=batch.offset, factor=factor)
    return total + (1 - share) * part() if share < 1 else total


def _groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weight decay for the kernels of convolutions only, not for biases, normalisation and embeddings."""
    kernels = [p for p in model.parameters() if p.ndim == 4]
    others = [p for p in model.parameters() if p.ndim != 4]
    return [{"params": kernels, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


@torch.no_grad()
def _average(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    for name, value in model.state_dict().items():
        if value.dtype.is_floating_point:
            average[name].lerp_(value, 1 - decay)
        else:
            average[name].copy_(value)


@torch.no_grad()
def _validate(
    model: UNet,
    parameters: dict[str, Tensor],
    batches: list[Batch],
    wholes: list[Tensor | None],
    weights: Tensor,
    schedule: Schedule,
    half: bool,
    group: Group,
) -> dict[str, float]:
    """Score weights on the validation batches: loss, and of the most likely class accuracy and Figure of Merit."""
    own = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(parameters)
    model.eval()
    loss, cells, right, hits, union = 0.0, 0, 0, 0, 0
    for batch, whole in zip(batches, wholes, strict=True):
        with torch.autocast(batch.static.device.type, dtype=torch.bfloat16, enabled=half):
            logits = model(batch.static, batch.reference, batch.coarse, batch.offset)
        loss += float(_loss(logits, batch, weights, schedule, model.factor, whole=whole))
        if schedule.totals_share:
            logits = impose_totals(logits.float(), batch.target, offset=batch.offset, factor=model.factor)
        guess, scored = logits.argmax(1), batch.target != MISSING
        truly, guessed = batch.target != batch.reference, guess != batch.reference
        right += int(((guess == batch.target) & scored).sum())
        cells += int(scored.sum())
        hits += int((truly & guessed & (guess == batch.target) & scored).sum())
        union += int(((truly | guessed) & scored).sum())
    model.load_state_dict(own)
    sums = torch.tensor([loss, cells, right, hits, union], dtype=torch.float64, device=weights.device)
    loss, cells, right, hits, union = group.sum(sums).tolist()
    return {
        "validation_loss": round(loss / max(1, len(batches)), 6),
        "validation_accuracy": round(right / max(1, cells), 6),
        "validation_figure_of_merit": round(hits / max(1, union), 6),
    }


class _Rows:
    """``metrics.jsonl``: a row a step; rows after the step that training resumes from are dropped.

    The file is held open: one that is written anew meanwhile, by a training that goes on elsewhere, is not added to.
    """

    def __init__(self, path: Path, *, keep: int) -> None:
        if str(path) != os.devnull:
            write_atomically(path, "".join(f"{line}\n" for line in _kept(path, keep)).encode())
        self._file = path.open("a", encoding="utf-8")

    def add(self, row: dict[str, float]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _kept(path: Path, keep: int) -> Iterator[str]:
    """Rows up to a step; a torn one and what follows are left out."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() and keep else []:
        try:
            if json.loads(line)["step"] <= keep:
                yield line
        except (json.JSONDecodeError, KeyError):
            return
