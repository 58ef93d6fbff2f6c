"""The network prepared to map many years: batch normalisation folded, one buffer per window, bfloat16 where allowed.

A window's static maps and reference map are written once into a buffer in the layout of the convolutions; each year then
writes only its coarse features, and only the requested cells become probabilities. On processors that multiply bfloat16,
convolutions take less than half the time of float32. :func:`ai4land.train.validation.gate` measures on held-out batches
whether a model tolerates that; its card records the result.
"""

from __future__ import annotations

import copy
import threading
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from ai4land.errors import MismatchError
from ai4land.model.checkpoint import Card, load_model
from ai4land.model.device import device as own_device
from ai4land.model.ensemble import Ensemble
from ai4land.model.unet import UNet, interpolate

Precision = Literal["float32", "bfloat16"]

AGREEMENT, ACCURACY = 0.99, 2e-4
"""bfloat16 needs at least this share of cells with the most likely class of float32, and at most this loss of accuracy."""


def fold(model: UNet, dtype: torch.dtype = torch.float32) -> UNet:
    """Copy a network, with its batch normalisation folded into the preceding convolutions, and these in ``dtype``.

    The perceptron of the coarse states and the embeddings (input and persistence logits) of the reference map stay float32.
    """
    made = copy.deepcopy(model).eval()
    for block in (*made.down, *made.merge):
        for conv, norm in ((0, 1), (3, 4)):
            block[conv] = fuse_conv_bn_eval(block[conv], block[norm])
            block[norm] = nn.Identity()
    for part in (made.down, made.up, made.merge, made.head):
        part.to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return made.requires_grad_(False)


def folded(model: Ensemble, dtype: torch.dtype = torch.float32) -> Ensemble:
    """Copy an ensemble with every member folded."""
    members: list[UNet] = [fold(m, dtype) for m in model.members]  # type: ignore[arg-type]
    return Ensemble(members, sharpness=model.sharpness).eval()


_TURN = threading.Lock()
"""Lets only one thread of a process run the network on a CUDA device; others read, impose totals and write meanwhile."""


class Forward:
    """An ensemble prepared to run in one thread; :meth:`for_another_thread` shares its weights.

    It copies the model, with the convolutions in ``dtype`` (float32 or bfloat16). The default device is
    :func:`ai4land.model.device.device`; threads take turns on a CUDA device.
    """

    def __init__(self, model: Ensemble, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> None:
        self.device = device or own_device()
        self.dtype = dtype
        self.members: list[UNet] = list(folded(model, dtype).to(self.device).members)  # type: ignore[arg-type]
        self.weight = model.sharpness / len(self.members)
        self.stride, self.halo, self.factor, self.classes = model.stride, model.halo, model.factor, model.classes
        self._forget_window()
        # On a CPU, concurrent passes use the cores better than passes in turn.
        self._turn: AbstractContextManager[object] = _TURN if self.device.type == "cuda" else nullcontext()

    def _forget_window(self) -> None:
        self._buffers = [torch.empty(0) for _ in self.members]
        self._priors: list[Tensor] = []

    def for_another_thread(self) -> Forward:
        """Return a copy with the same weights, which never change, and its own buffers."""
        other = copy.copy(self)
        other._forget_window()
        return other

    @torch.inference_mode()
    def begin(self, static: NDArray[np.floating], reference: NDArray[np.uint8], *, offset: tuple[int, int]) -> None:
        """Set the maps of a window, read with the halo on every side.

        ``static`` is ``(channel, rows, columns)``, ``reference`` class indices ``(rows, columns)`` (above the last class:
        unknown), ``offset`` the row and column of the first cell, in fine cells from the corner of the coarse window.
        """
        with self._turn:
            self._begin(static, reference, offset)

    def _begin(self, static: NDArray[np.floating], reference: NDArray[np.uint8], offset: tuple[int, int]) -> None:
        fixed = torch.from_numpy(static).to(self.device)
        known = torch.from_numpy(reference).to(self.device).clamp(max=self.classes).to(torch.int32)
        self._offset = torch.tensor([offset], dtype=torch.int64, device=self.device)
        self._size = rows, cols = reference.shape
        self._inner = slice(self.halo, rows - self.halo), slice(self.halo, cols - self.halo)
        for i, member in enumerate(self.members):
            shape = (1, member.inputs, rows, cols)
            if self._buffers[i].shape != shape:
                self._buffers[i] = torch.empty(shape, dtype=self.dtype, device=self.device).contiguous(
                    memory_format=torch.channels_last
                )
            x = self._buffers[i][0]
            x[: len(fixed)] = fixed
            x[len(x) - member.seen.embedding_dim :] = member.seen(known).permute(2, 0, 1)
        self._priors = [m.persistence(known[self._inner]).permute(2, 0, 1)[None] for m in self.members]

    @torch.inference_mode()
    def probabilities(self, coarse: NDArray[np.float32]) -> NDArray[np.float32]:
        """Predict a year from its coarse channels ``(channel, coarse rows, coarse columns)``.

        Returns float32 ``(class, rows, columns)`` of the window without its halo.
        """
        with self._turn:
            wanted = torch.from_numpy(coarse).to(self.device)[None]
            total = torch.zeros((), device=self.device)
            for member, x, prior in zip(self.members, self._buffers, self._priors, strict=True):
                made = interpolate(member.coarse(wanted), self._offset, self._size, self.factor)
                last = x.shape[1] - member.seen.embedding_dim
                x[:, last - made.shape[1] : last] = made
                logits = member.head(member.trunk(x)[(..., *self._inner)]).float() + prior
                total = total + torch.log_softmax(logits, dim=1)
            probabilities: NDArray[np.float32] = torch.softmax(total[0] * self.weight, dim=0).cpu().numpy()
        return probabilities


def bfloat16_pays(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX; Ampere or later)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported is not None and supported())


def precision_of(card: Card, *, device: torch.device | None = None) -> Precision:
    """Return the precision to run a model in: bfloat16 where the device gains by it and the model tolerates it.

    This takes no device slot (:func:`ai4land.model.device.device`), so a process that only distributes work may call it.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = card.bfloat16
    bears = bool(found) and found["agreement"] >= AGREEMENT and found["accuracy_lost"] <= ACCURACY
    return "bfloat16" if bears and bfloat16_pays(device) else "float32"


_held = threading.local()
_loading = threading.Lock()


def ready(folder: str, checksum: str, precision: Precision) -> tuple[Forward, Card]:
    """Return a model prepared for this thread; threads share its weights, and a new ``checksum`` reloads them."""
    wanted = (folder, checksum, precision)
    if getattr(_held, "of", None) != wanted:
        own_device()  # makes it the calling thread's current device
        with _loading:
            forward, card = _load(*wanted)
        _held.made, _held.of = (forward.for_another_thread(), card), wanted
    made: tuple[Forward, Card] = _held.made
    return made


@lru_cache(maxsize=1)
def _load(folder: str, checksum: str, precision: Precision) -> tuple[Forward, Card]:
    model, card = load_model(Path(folder))
    if card.weights != checksum:
        raise MismatchError(
            f"model in {folder} has weights {card.weights[:16]}, expected {checksum[:16]}; it changed while the job ran"
        )
    return Forward(model, dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32), card
