"""The network: coarse states, static maps and a reference map in, class logits out.

A small perceptron turns the states of each coarse cell into features, which are interpolated to the fine grid on the device.
Where the reference map is known, its class adds a learned row of logits to the output, so an untrained network copies the
map. Normalisation uses training statistics, never those of a window, so the output of a cell does not depend on tiling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ai4land.model.norm import Norm


def interpolate(coarse: Tensor, offset: Tensor, size: tuple[int, int], factor: int) -> Tensor:
    """Interpolate coarse cells ``(batch, channel, coarse rows, coarse columns)`` bilinearly to ``(batch, channel, *size)``.

    ``offset``, int64 ``(batch, 2)``, is the row and column of the first fine cell, in fine cells from the corner of the
    coarse window; ``factor`` is the number of fine cells along one side of a coarse cell. Positions are integers, so a fine
    cell gets the same weights in every window.
    """
    rows = _weights(offset[:, 0], size[0], coarse.shape[2], factor, coarse.dtype)
    cols = _weights(offset[:, 1], size[1], coarse.shape[3], factor, coarse.dtype)
    return torch.einsum("bih,bkhw,bjw->bkij", rows, coarse, cols)


def _weights(offset: Tensor, size: int, cells: int, factor: int, dtype: torch.dtype) -> Tensor:
    """Return the weights of the coarse rows for each fine row, ``(batch, size, cells)``: two neighbours each."""
    place = 2 * (offset[:, None] + torch.arange(size, device=offset.device)) + 1 - factor
    low = torch.div(place, 2 * factor, rounding_mode="floor")
    upper = (place - 2 * factor * low).to(dtype) / (2 * factor)
    cell = torch.arange(cells, device=offset.device)
    is_low, is_high = (cell == low[..., None]), (cell == low[..., None] + 1)
    return is_low.to(dtype) * (1 - upper)[..., None] + is_high.to(dtype) * upper[..., None]


class _Double(nn.Sequential):
    """Two 3 × 3 convolutions, each with batch normalisation and ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            Norm(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            Norm(outputs),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    """A U-Net after Ronneberger et al. (2015, arXiv:1505.04597), padded so that output and input have the same size.

    Parameters
    ----------
    static_channels, coarse_channels, classes
        Numbers of static channels, of coarse channels, and of classes to predict.
    factor
        Fine cells along one side of a coarse cell.
    base, depth
        Width of the first level, which doubles with each level down, and how often the resolution is halved.
    coarse_features
        Channels that the coarse states become before interpolation.
    """

    def __init__(
        self,
        *,
        static_channels: int,
        coarse_channels: int,
        classes: int,
        factor: int,
        base: int = 16,
        depth: int = 3,
        coarse_features: int = 16,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "static_channels": static_channels,
            "coarse_channels": coarse_channels,
            "classes": classes,
            "factor": factor,
            "base": base,
            "depth": depth,
            "coarse_features": coarse_features,
        }
        self.classes, self.factor, self.depth = classes, factor, depth
        self.coarse = nn.Sequential(
            nn.Conv2d(coarse_channels, 2 * coarse_features, 1), nn.GELU(), nn.Conv2d(2 * coarse_features, coarse_features, 1)
        )
        self.seen = nn.Embedding(classes + 1, 8)
        widths = [base * 2**level for level in range(depth + 1)]
        self.inputs = static_channels + coarse_features + self.seen.embedding_dim
        self.down = nn.ModuleList(_Double(a, b) for a, b in zip([self.inputs, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths[:-1]))
        self.merge = nn.ModuleList(_Double(2 * w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(base, classes, 1)
        self.persistence = nn.Embedding(classes + 1, classes)
        # Coarse channels that are always 0 in training (such as differences without change) then keep having no effect.
        nn.init.zeros_(self.coarse[0].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            self.persistence.weight.zero_()
            self.persistence.weight[:classes].fill_diagonal_(7.0)

    @property
    def stride(self) -> int:
        """Window sizes and origins must be multiples of this."""
        return int(2**self.depth)

    @property
    def receptive_radius(self) -> int:
        """Distance in fine cells beyond which nothing affects a cell's output.

        Two 3 × 3 convolutions reach 2 · 2^l cells at level *l*, once on the way down and once up for every level but the
        deepest; pooling blurs the place of a cell by up to 2^depth − 1.
        """
        return 4 * (self.stride - 1) + 2 * self.stride + self.stride - 1

    @property
    def halo(self) -> int:
        """Receptive radius rounded up to whole strides: the margin to read around a tile."""
        return -(-self.receptive_radius // self.stride) * self.stride

    def forward(self, static: Tensor, reference: Tensor, coarse: Tensor, offset: Tensor) -> Tensor:
        """Predict class logits ``(batch, class, rows, columns)``.

        Parameters
        ----------
        static
            ``(batch, static channel, rows, columns)``; rows and columns are multiples of ``stride``.
        reference
            Class indices, integer ``(batch, rows, columns)``; anything above the last class is unknown.
        coarse
            ``(batch, coarse channel, coarse rows, coarse columns)``.
        offset
            As in :func:`interpolate`.
        """
        size = (static.shape[2], static.shape[3])
        known = reference.clamp(max=self.classes).to(torch.int32)
        features = interpolate(self.coarse(coarse), offset, size, self.factor)
        parts = static, features, self.seen(known).permute(0, 3, 1, 2)
        x = torch.cat([p.to(features.dtype) for p in parts], dim=1)
        x = x.contiguous(memory_format=torch.channels_last)
        x = x.to(self.head.weight.dtype)
        logits: Tensor = self.head(self.trunk(x)) + self.persistence(known).permute(0, 3, 1, 2)
        return logits

    def trunk(self, x: Tensor) -> Tensor:
        """Turn the stacked input ``(batch, inputs, rows, columns)`` into features ``(batch, base, rows, columns)``."""
        levels: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            levels.append(x)
        levels.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([levels.pop(), up(x)], dim=1))
        return x
