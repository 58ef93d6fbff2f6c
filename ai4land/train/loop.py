"""The training loop, for one process or for each process of a group.

Batches depend only on the seed and the step, and the state is saved every few steps, so a killed run resumes to the same
weights, bit for bit, given the same number of threads and processes. Validation scores an exponential moving average of the
weights and keeps the best.
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

from ai4land.errors import DataError, MismatchError, Unfinished
from ai4land.legend import MISSING
from ai4land.model.checkpoint import load_state, save_state
from ai4land.model.device import device as device_of_process
from ai4land.model.forward import bfloat16_pays
from ai4land.model.norm import ALONE, Group, shared_norms
from ai4land.model.unet import UNet
from ai4land.places import write_atomically
from ai4land.train.batch import Batch, prefetched
from ai4land.train.losses import cell_weights, change_loss, impose_totals

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """How the network learns: the settings of the same names in a run file."""

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
        """Return the learning rate of a step: linear warm-up, then half a cosine down to 0."""
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
    """Train a network in place, from the start or from its last saved state.

    Parameters
    ----------
    batches
        Returns the batches from a given step on; in a group, this process's part of each.
    validation
        Batches, or parts of them, that are scored every ``validate_every`` steps.
    weights
        Class weights of the loss, ``(class,)``.
    folder, fingerprint
        Folder of ``metrics.jsonl`` and ``resume.pt``, and fingerprint of all settings and data that determine the result.
    group
        Processes that train together; rank 0 writes to the folder.
    until
        Time, in seconds since 1970, after which training finishes its step, saves its state and stops.
    device
        Default: :func:`ai4land.model.device.device`.
    progress
        Called by rank 0 after each step, with the step and its row of metrics.

    Raises
    ------
    MismatchError
        If ``resume.pt`` has another fingerprint.
    DataError
        If a loss is not finite.
    Unfinished
        If training stopped at ``until``; the same call resumes it.
    """
    device = device or device_of_process()
    training = _Training(model, validation, weights, schedule, group, device)
    resume = folder / "resume.pt"
    if resume.is_file():
        training.load(resume, fingerprint)
    if int(group.sum(torch.tensor(training.step, device=device))) != training.step * group.world:
        raise RuntimeError(f"process {group.rank} read the state of step {training.step} in {folder}, others read another step")
    leads = group.rank == 0
    rows = _Rows(folder / "metrics.jsonl" if leads else Path(os.devnull), keep=training.step)
    if training.step == 0:
        rows.add({"step": 0, **training.validate()})
    source = prefetched(batches(training.step), pin=device.type == "cuda")
    with closing(source), closing(rows), shared_norms(model, group):
        while not training.ended:
            row, over = training.advance(source, until)
            rows.add(row)
            if leads and progress is not None:
                progress(training.step, row)
            stops = over and not training.ended
            if leads and (training.step % schedule.checkpoint_every == 0 or training.ended or stops):
                training.save(resume, fingerprint)
            if stops:
                group.sum(torch.zeros((), device=device))  # a barrier: no process stops before the state is on disk
                raise Unfinished(
                    f"training in {folder} stopped at step {training.step} of {schedule.steps} because the time of its job runs out; "
                    "run it again to resume"
                )
    _log.info("trained %d steps; best validation loss %.5f at step %d", training.step, training.best_loss, training.best_step)
    if leads and not training.best_step:
        _log.warning(
            "no step of the training in %s has a lower validation loss than the untrained network (%.5f), expected some; the UNTRAINED weights "
            "are kept: the model copies its reference map. Look at validation_loss in metrics.jsonl, lower train.learning_rate or add steps",
            folder,
            training.best_loss,
        )
    best = {k: v.cpu() for k, v in training.best.items()}
    return Trained(best, training.best_step, training.best_loss, training.step)


class _Training:
    """The state of a training; ``stale`` counts validations without improvement."""

    def __init__(
        self, model: UNet, validation: list[Batch], weights: Tensor, schedule: Schedule, group: Group, device: torch.device
    ) -> None:
        self.model, self.schedule, self.group, self.device = model, schedule, group, device
        half = bfloat16_pays(device) if schedule.precision == "auto" else schedule.precision == "bfloat16"
        self.half = int(group.sum(torch.tensor(int(half), device=device))) == group.world
        model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.weights = weights.to(device)
        self.validation = [b.to(device) for b in validation]
        self.wholes = self._wholes(self.validation)
        self.optimiser = torch.optim.AdamW(_groups(model, schedule.weight_decay), lr=schedule.learning_rate)
        self.average = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.best = {k: v.clone() for k, v in self.average.items()}
        self.step, self.best_step, self.best_loss, self.stale = 0, 0, math.inf, 0

    @property
    def ended(self) -> bool:
        """Whether all steps are taken, or validation no longer improves."""
        return self.step >= self.schedule.steps or self.stale >= self.schedule.patience

    def load(self, path: Path, fingerprint: str) -> None:
        """Load a saved state of the same configuration."""
        state = load_state(path)
        if state["fingerprint"] != fingerprint:
            raise MismatchError(
                f"training in {path.parent} was begun with another configuration ({state['fingerprint']}, expected {fingerprint}); "
                "restore the run file, choose another name, or delete the folder's resume.pt"
            )
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.average, self.best = ({k: v.to(self.device) for k, v in state[name].items()} for name in ("average", "best"))
        self.step, self.best_step, self.best_loss, self.stale = (state[k] for k in ("step", "best_step", "best_loss", "waited"))
        _log.info("training resumes from step %d", self.step)

    def save(self, path: Path, fingerprint: str) -> None:
        """Save the state that training resumes from."""
        tensors = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "average": self.average,
            "best": self.best,
        }
        numbers = {"step": self.step, "best_step": self.best_step, "best_loss": self.best_loss, "waited": self.stale}
        save_state(path, {**tensors, **numbers, "fingerprint": fingerprint})

    def advance(self, source: Iterator[Batch], until: float | None) -> tuple[dict[str, float], bool]:
        """Take one step, and validate when due; return the metrics, and whether any process has reached ``until``."""
        began = time.perf_counter()
        batch = next(source).to(self.device)
        arrived = time.perf_counter()
        rate = self.schedule.rate(self.step)
        loss, norm, over = self._learn(batch, rate, until)
        self.step += 1
        _average(self.average, self.model, min(self.schedule.ema, self.step / (self.step + 10)))
        row = {
            "step": self.step,
            "loss": round(loss, 6),
            "lr": rate,
            "gradient_norm": round(norm, 5),
            "seconds": round(time.perf_counter() - began, 4),
            "waited": round(arrived - began, 4),
            "workers": self.group.world,
        }
        if self.step % self.schedule.validate_every == 0 or self.step == self.schedule.steps:
            row |= self.validate()
        return row, over

    def _learn(self, batch: Batch, rate: float, until: float | None) -> tuple[float, float, bool]:
        """Train on one batch; return loss and gradient norm of the whole batch, and whether any process is out of time."""
        for parameters in self.optimiser.param_groups:
            parameters["lr"] = rate
        self.model.train()
        loss = self._loss(self._logits(batch), batch, self._wholes([batch])[0])
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        over = torch.tensor(float(until is not None and time.time() >= until), device=self.device)
        whole_loss, reached = self.group.add_gradients(self.model, loss, over).tolist()
        if not math.isfinite(whole_loss):
            raise DataError(
                f"training loss is {whole_loss} at step {self.step}, expected a number; lower train.learning_rate or look for NaN in the inputs"
            )
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.schedule.clip)
        self.optimiser.step()
        return whole_loss, float(norm), reached > 0

    def validate(self) -> dict[str, float]:
        """Score the moving average, and keep it if it is the best so far."""
        scores = self._score(self.average)
        self.stale += 1
        if scores["validation_loss"] < self.best_loss:
            self.best_loss, self.best_step, self.stale = scores["validation_loss"], self.step, 0
            self.best = {k: v.clone() for k, v in self.average.items()}
        return scores

    @torch.no_grad()
    def _score(self, parameters: dict[str, Tensor]) -> dict[str, float]:
        """Score weights on the validation batches: loss, accuracy and Figure of Merit of the most likely class."""
        own = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(parameters)
        self.model.eval()
        loss, cells, right, hits, union = 0.0, 0, 0, 0, 0
        for batch, whole in zip(self.validation, self.wholes, strict=True):
            logits = self._logits(batch)
            loss += float(self._loss(logits, batch, whole))
            if self.schedule.totals_share:
                logits = impose_totals(logits.float(), batch.target, offset=batch.offset, factor=self.model.factor)
            guess, scored = logits.argmax(1), batch.target != MISSING
            changed, guessed = batch.target != batch.reference, guess != batch.reference
            right += int(((guess == batch.target) & scored).sum())
            cells += int(scored.sum())
            hits += int((changed & guessed & (guess == batch.target) & scored).sum())
            union += int(((changed | guessed) & scored).sum())
        self.model.load_state_dict(own)
        sums = torch.tensor([loss, cells, right, hits, union], dtype=torch.float64, device=self.device)
        loss, cells, right, hits, union = self.group.sum(sums).tolist()
        return {
            "validation_loss": round(loss / max(1, len(self.validation)), 6),
            "validation_accuracy": round(right / max(1, cells), 6),
            "validation_figure_of_merit": round(hits / max(1, union), 6),
        }

    def _logits(self, batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.half):
            logits: Tensor = self.model(batch.static, batch.reference, batch.coarse, batch.offset)
        return logits

    def _wholes(self, batches: list[Batch]) -> list[Tensor | None]:
        """Return the weight of each whole batch, or None if this process has all of it."""
        if self.group.world == 1 or not batches:
            return [None] * len(batches)
        change = self.schedule.change_weight
        own = [cell_weights(b.target, b.reference, self.weights, change_weight=change).sum() for b in batches]
        return list(self.group.sum(torch.stack(own)))

    def _loss(self, logits: Tensor, batch: Batch, whole: Tensor | None) -> Tensor:
        """Mix the losses with and without the totals imposed, by their shares; in a group, this process's part."""
        change, share = self.schedule.change_weight, self.schedule.totals_share
        part = partial(change_loss, logits, batch.target, batch.reference, self.weights, change_weight=change, whole=whole)
        total = torch.zeros((), device=logits.device)
        if share:
            total = total + share * part(offset=batch.offset, factor=self.model.factor)
        return total + (1 - share) * part() if share < 1 else total


def _groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Apply weight decay to convolution kernels only, not to biases, normalisation and embeddings."""
    kernels = [p for p in model.parameters() if p.ndim == 4]
    others = [p for p in model.parameters() if p.ndim != 4]
    return [{"params": kernels, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


@torch.no_grad()
def _average(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """Move the exponential moving average towards the weights of a model."""
    for name, value in model.state_dict().items():
        if value.dtype.is_floating_point:
            average[name].lerp_(value, 1 - decay)
        else:
            average[name].copy_(value)


class _Rows:
    """``metrics.jsonl``, a row per step; rows after the step that training resumes from are dropped.

    The file stays open: if training resumes elsewhere and replaces the file, rows never end up in the new one.
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
    """Yield the rows up to a step, ending at the first incomplete row."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() and keep else []:
        try:
            if json.loads(line)["step"] <= keep:
                yield line
        except (json.JSONDecodeError, KeyError):
            return
