"""Model input: its channels, their normalisation, and the function that makes it.

Training, reconstruction and coupling all call :func:`features`, so their inputs cannot differ. Its :class:`FeatureSpec` is
fitted on training cells and years only, and stored in the model's card. All data are plain arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from ai4land.legend import MISSING

LEAD_SCALE = 10.0
"""Years of lead per unit of the lead channel."""


class Feature(BaseModel):
    """One static map: standardised with ``mean`` and ``std``, or one channel for each of its ``codes``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    mean: float = 0.0
    std: float = 1.0
    codes: tuple[int, ...] = ()


class FeatureSpec(BaseModel):
    """Channels of the model input, in order, and their normalisation.

    Attributes
    ----------
    features, states, codes
        Static maps and coarse states in the order of the store, and class codes in the order of their indices.
    difference_std
        Root mean square change of each state over the training pairs; divides the differences.
    position
        Wavelengths, in units of the grid, of the sines and cosines that tell the network its position; may be empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    features: tuple[Feature, ...]
    states: tuple[str, ...]
    codes: tuple[int, ...]
    difference_std: tuple[float, ...]
    position: tuple[float, ...] = ()

    @property
    def static_names(self) -> list[str]:
        """Names of the static channels."""
        return [n for f in self.features for n in ([f"{f.name}={c}" for c in f.codes] or [f.name])]

    @property
    def coarse_names(self) -> list[str]:
        """Names of the coarse channels."""
        states = [f"{s}:{what}" for what in ("wanted", "reference", "difference") for s in self.states]
        place = [f"{wave}({axis} / {length:g})" for length in self.position for axis in "yx" for wave in ("sin", "cos")]
        return [*states, "lead", "known", *place]

    def static_channels(self, raw: NDArray[Any]) -> NDArray[np.float16]:
        """Normalise static maps ``(feature, rows, columns)`` to ``(channel, rows, columns)``; missing values become 0."""
        out = torch.empty((len(self.static_names), *raw.shape[1:]), dtype=torch.float16)
        channel = 0
        for feature, values in zip(self.features, raw, strict=True):
            field = torch.from_numpy(np.ascontiguousarray(values))
            if feature.codes:
                for code in feature.codes:
                    out[channel] = field == code
                    channel += 1
            else:
                out[channel] = (field - feature.mean).div_(feature.std).nan_to_num_(nan=0.0).clamp_(-20, 20)
                channel += 1
        return out.numpy()

    def place_channels(self, y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float32]:
        """Make position channels ``(channel, rows, columns)`` from the centres of coarse rows and columns.

        On a global grid they are continuous at the dateline if every wavelength divides 360 degrees.
        """
        made = np.empty((4 * len(self.position), len(y), len(x)), dtype=np.float32)
        for i, length in enumerate(self.position):
            for j, angle in enumerate((y[:, None], x[None])):
                made[4 * i + 2 * j] = np.sin(2 * np.pi / length * angle)
                made[4 * i + 2 * j + 1] = np.cos(2 * np.pi / length * angle)
        return made


@dataclass(frozen=True)
class Inputs:
    """Model input of one window, as :meth:`ai4land.model.unet.UNet.forward` takes it, without the batch dimension.

    ``static`` is float16 ``(channel, rows, columns)``, ``reference`` uint8 class indices ``(rows, columns)`` with
    ``MISSING`` where unknown, ``coarse`` float32 ``(channel, coarse rows, coarse columns)``.
    """

    static: NDArray[np.float16]
    reference: NDArray[np.uint8]
    coarse: NDArray[np.float32]


def features(
    static: NDArray[np.float16],
    *,
    reference: NDArray[np.uint8] | None,
    wanted: NDArray[Any],
    start: NDArray[Any],
    lead: int,
    spec: FeatureSpec,
    place: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> Inputs:
    """Make the model input of one window and year.

    Parameters
    ----------
    static
        Channels from :meth:`FeatureSpec.static_channels`.
    reference
        Class indices ``(rows, columns)``, or None without a reference map: then ``start`` and ``lead`` are ignored.
    wanted, start
        Shares of the coarse states ``(state, coarse rows, coarse columns)`` in the wanted year and in the reference year;
        NaN where the scenario has no data.
    lead
        Wanted year minus reference year.
    place
        Centres of coarse rows and columns, from :meth:`ai4land.grid.Grid.coarse_centres`.
    """
    if reference is None:
        reference = np.full(static.shape[1:], MISSING, dtype=np.uint8)
        start, lead = wanted, 0
    known = np.isfinite(wanted).all(axis=0) & np.isfinite(start).all(axis=0)
    now, then = np.where(known, wanted, 0.0), np.where(known, start, 0.0)
    scale = np.array(spec.difference_std)[:, None, None]
    lead_channel = np.full((1, *known.shape), lead / LEAD_SCALE)
    stack = [now, then, ((now - then) / scale).clip(-20, 20), lead_channel, known[None], spec.place_channels(*place)]
    return Inputs(static, reference, np.concatenate(stack).astype(np.float32))
