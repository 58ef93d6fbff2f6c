"""Make overviews of a class map: each coarser cell has the most frequent class of its fine cells.

Class counts, not codes, pass from level to level, so every level is the majority of the finest. Cells of all levels nest in
the shards of the map: the writer of a shard also writes its part of every level.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray

from ai4land.grid import Grid
from ai4land.legend import MISSING

_STEPS = (4, 3, 2, 5)
_LEAST = 16  # minimum cells along a shard's side at the coarsest level

CONVENTIONS = [
    {
        "uuid": uid,
        "schema_url": f"https://raw.githubusercontent.com/zarr-conventions/{name}/refs/tags/v0.1/schema.json",
        "spec_url": f"https://github.com/zarr-conventions/{name}/blob/v0.1/README.md",
        "name": name,
        "description": about,
    }
    for name, uid, about in (
        ("multiscales", "d35379db-88df-4056-af3a-620245f8e347", "Multiscale layout of zarr datasets"),
        ("spatial", "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4", "Spatial coordinate information"),
        ("proj", "f17cb550-5864-4468-aeb7-f3180cfb622f", "Coordinate reference system information for geospatial data"),
    )
]
"""GeoZarr conventions of a cube, as entries of ``zarr_conventions``."""


def level_factors(shard: int) -> list[int]:
    """Return the number of fine cells along a cell of each level, for a shard of ``shard`` cells a side.

    >>> level_factors(1200), level_factors(3600), level_factors(24)
    ([4, 16, 48], [4, 16, 48, 144], [])
    """
    factors, side, whole = [], shard, 1
    while step := next((s for s in _STEPS if side % s == 0 and side // s >= _LEAST), 0):
        side, whole = side // step, whole * step
        factors.append(whole)
    return factors


def reduce_classes(index: NDArray[np.uint8], *, classes: int, factors: list[int]) -> Iterator[NDArray[np.uint8]]:
    """Yield each level of a map: the most frequent class per cell, or ``MISSING`` if over half of its fine cells have none.

    ``index`` holds class indices ``(rows, columns)`` or ``MISSING``; ``factors`` are the fine cells along a cell of each
    level, each a multiple of the previous one. A tie goes to the first class.

    >>> [a.tolist() for a in reduce_classes(np.array([[0, 1], [1, 255]], np.uint8), classes=2, factors=[2])]
    [[[1]]]
    """
    counts: NDArray[Any] | None = None
    before = 1
    for factor in factors:
        step = factor // before
        if counts is None:
            counts = np.stack([_sums(index == k, step) for k in range(classes)])
        else:
            counts = np.stack([_sums(part, step) for part in counts])
        before = factor
        winner = counts.argmax(axis=0).astype(np.uint8)
        yield np.where(2 * counts.sum(axis=0) >= factor**2, winner, np.uint8(MISSING))


def _sums(values: NDArray[Any], step: int) -> NDArray[np.int32]:
    """Sum over blocks of ``step`` x ``step`` cells."""
    rows, cols = values.shape
    total = np.zeros((rows // step, cols // step), dtype=np.int32)
    for i in range(step):
        for j in range(step):
            total += values[i::step, j::step]
    return total


def multiscales(grid: Grid, factors: list[int], *, variable: str = "land_cover") -> dict[str, Any]:
    """Describe the position and levels of a map as GeoZarr attributes."""
    crs = grid.fine.crs
    code = None if crs is None else crs.epsg
    west, south, east, north = grid.bounds

    def level(asset: str, factor: int) -> dict[str, Any]:
        affine = grid.fine.affine * Affine.scale(factor)
        return {
            "asset": asset,
            "spatial:shape": [n // factor for n in grid.shape],
            "spatial:transform": [float(v) for v in tuple(affine)[:6]],
        }

    layout: list[dict[str, Any]] = [level(variable, 1) | {"transform": {"scale": [1.0, 1.0], "translation": [0.0, 0.0]}}]
    for before, factor in zip([1, *factors], factors, strict=False):
        step = factor / before
        made = level(f"overviews/{factors.index(factor) + 1}/{variable}", factor)
        # Distance between the centres of the two levels' first cells, in cells of the previous level.
        moved = {"scale": [step, step], "translation": [(step - 1) / 2] * 2}
        layout.append({**made, "derived_from": layout[-1]["asset"], "transform": moved})
    return {
        "zarr_conventions": CONVENTIONS,
        "multiscales": {"layout": layout, "resampling_method": "mode"},
        "spatial:dimensions": ["latitude", "longitude"],
        "spatial:bbox": [west, south, east, north],
        "spatial:transform": layout[0]["spatial:transform"],
        "spatial:shape": layout[0]["spatial:shape"],
        **({"proj:wkt2": crs.to_wkt()} if code is None and crs is not None else {"proj:code": f"EPSG:{code}"}),
    }
