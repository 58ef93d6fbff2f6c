"""Analysis-ready stores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
from scipy import ndimage

from ai4land.grid import COARSE_DIMS, Grid, block_sum, make_grid
from ai4land.legend import Legend, load_legend
from ai4land.store.shard import Layer, of_array
from ai4land.store.write import write_store


@dataclass(frozen=True)
class TinyStore:
    """A global analysis-ready store small enough to train and map in a second."""

    path: Path
    grid: Grid
    legend: Legend
    years: tuple[int, ...]


def write_tiny_store(
    path: Path, *, shard: int = 32, years: tuple[int, ...] = (2000, 2001, 2002, 2003), seed: int = 0
) -> TinyStore:
    """Write a store of 64 x 128 fine cells (factor 8): smooth random land cover that drifts, two static maps, 7 states."""
    rng = np.random.default_rng(seed)
    grid = make_grid((-180, -90, 180, 90), coarse_cell=22.5, factor=8, shard=shard)
    legend = load_legend("hildaplus")
    noise = rng.standard_normal((legend.n, *grid.shape))
    noise = ndimage.gaussian_filter(noise, (0, 3, 3), mode=("nearest", "nearest", "wrap"))
    noise /= noise.std()
    trend = np.linspace(-1, 1, legend.n)[:, None, None] * 0.3
    land = ndimage.gaussian_filter(rng.standard_normal(grid.shape), 5, mode=("nearest", "wrap")) > -0.02
    land[:, 32:64] &= np.arange(64)[:, None] < 32
    maps = {y: legend.decode(np.where(land, (noise + i * trend).argmax(0), 255).astype(np.uint8)) for i, y in enumerate(years)}
    index = {y: legend.encode(m) for y, m in maps.items()}
    shares = (
        np.stack([[block_sum((index[y] == k).astype(float), grid.factor) for k in range(legend.n)] for y in years])
        / grid.factor**2
    )
    coords = grid.coords()
    coarse = xr.DataArray(
        shares.astype(np.float32),
        dims=("year", "state", *COARSE_DIMS),
        coords={"year": list(years), "state": [str(c) for c in legend.codes], **{d: coords[d] for d in COARSE_DIMS}},
    )
    layers = [
        Layer("height", False, of_array(noise[0].astype(np.float32) * 100)),
        Layer("zone", True, of_array((noise[1] > 0).astype(np.float32) + 1)),
    ]
    write_store(
        path,
        grid=grid,
        legend=legend,
        mask=of_array(land),
        maps={year: of_array(codes) for year, codes in maps.items()},
        coarse=coarse,
        layers=layers,
        identity={"made": "by the tests"},
    )
    return TinyStore(path, grid, legend, years)
