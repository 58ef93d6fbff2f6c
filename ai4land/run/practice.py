"""A synthetic store and model: smooth random maps and an untrained network in the shapes of a run.

Calibration and the benchmarks time the package on them while the real ones do not exist yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from scipy import ndimage

from ai4land.grid import COARSE_DIMS, Grid, Window, block_sum, make_grid
from ai4land.legend import MISSING, Legend
from ai4land.model.checkpoint import Card, save_model
from ai4land.model.features import FeatureSpec
from ai4land.model.unet import UNet
from ai4land.store.shard import Layer, of_array
from ai4land.store.write import write_store

CODES = 5
"""Codes of a categorical map."""
_CHANGE = 0.04
"""Yearly drift of the fields behind the classes; about 1 % of the cells change a year."""


def practice_grid(*, factor: int, shard: int, shards: tuple[int, int]) -> Grid:
    """Make a grid of rows and columns of shards, north edge at 48 degrees, coarse cells at most a quarter degree."""
    cell = 2.0 ** min(-2, math.floor(math.log2(40 * factor / (shard * max(shards)))))
    side = cell * shard / factor
    box = 0.0, 48 - shards[0] * side, shards[1] * side, 48.0
    return make_grid(box, coarse_cell=cell, factor=factor, shard=shard, origin=(0.0, 48.0))


def write_practice_store(
    path: Path, *, grid: Grid, legend: Legend, years: tuple[int, ...], numbers: int, zones: int, land: float = 1.0
) -> None:
    """Write a store of smooth random maps; the states of its scenario are the class shares.

    Parameters
    ----------
    numbers, zones
        Number of continuous and of categorical static maps.
    land
        Approximate share of mapped cells.
    """
    rng = np.random.default_rng(0)

    def noise(scale: float) -> NDArray[np.float32]:
        field = ndimage.gaussian_filter(rng.standard_normal(grid.shape), scale)
        return ((field - field.mean()) / field.std()).astype(np.float32)

    # As in real maps, a coarse cell has several classes, in patches of a few cells.
    fields = np.stack([noise(grid.factor) + 0.3 * noise(2) for _ in range(legend.n)])
    trend = np.linspace(-_CHANGE, _CHANGE, legend.n, dtype=np.float32)[:, None, None]
    height = noise(grid.shard / 16)
    mapped = height >= np.quantile(height, 1 - land)
    index = [np.where(mapped, (fields + i * trend).argmax(0), MISSING).astype(np.uint8) for i in range(len(years))]
    shares = np.stack([[block_sum((m == k).astype(np.float32), grid.factor) for k in range(legend.n)] for m in index])
    there = np.maximum(block_sum(mapped.astype(np.float32), grid.factor), 1)
    coords = grid.coords()
    coarse = xr.DataArray(
        shares / there,
        dims=("year", "state", *COARSE_DIMS),
        coords={"year": list(years), "state": [str(c) for c in legend.codes], **{d: coords[d] for d in COARSE_DIMS}},
    )

    def field(scale: float, levels: int = 0) -> Callable[[Window], NDArray[np.float32]]:
        values = noise(scale)
        values = np.digitize(values, np.linspace(-1, 1, levels - 1)).astype(np.float32) + 1 if levels else values
        return of_array(values)

    layers = [Layer(f"field{i}", False, field(2 + i)) for i in range(numbers)]
    layers += [Layer(f"zone{i}", True, field(8, CODES)) for i in range(zones)]
    write_store(
        path,
        grid=grid,
        legend=legend,
        mask=of_array(mapped),
        maps={y: of_array(legend.decode(m)) for y, m in zip(years, index, strict=True)},
        coarse=coarse,
        layers=layers,
        identity={"made": "to practise"},
    )


def practice_network(spec: FeatureSpec, grid: Grid, *, seed: int = 0, **settings: int) -> UNet:
    """Make a network about as confident as a trained one; weights that start at 0 are random, so every part matters."""
    torch.manual_seed(seed)
    sizes = {"static_channels": len(spec.static_names), "coarse_channels": len(spec.coarse_names), "classes": len(spec.codes)}
    model = UNet(**sizes, factor=grid.factor, **settings)
    with torch.no_grad():
        model.coarse[0].weight.normal_(0, 1)  # type: ignore[operator]
        model.head.weight.normal_(0, 0.1)
        model.persistence.weight.add_(0.3 * torch.randn_like(model.persistence.weight))
    return model.eval()


def save_practice_model(folder: Path, models: list[UNet], *, grid: Grid, legend: Legend, spec: FeatureSpec) -> str:
    """Save networks as a model and return the checksum of the weights."""
    size = grid.fine.affine.a, -grid.fine.affine.e
    blank = {"weights": "", "split": "", "store": "", "training": {}}
    card = Card(legend=legend, spec=spec, network=models[0].settings, cell=size, **blank)
    return save_model(folder, [m.state_dict() for m in models], card).weights
