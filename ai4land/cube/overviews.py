"""Coarser views of a class map, for looking at it from afar: in each cell the class that most of its fine cells have.

Shares of classes are carried from level to level, never codes, so that every level is the majority of the finest one. A level's cells
nest in the shards of the map: what writes a shard writes its part of all levels.
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
_LEAST = 16
"""Cells along the side of a shard's part of the coarsest level, at least."""

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
"""The GeoZarr conventions that a cube keeps, as an entry each of ``zarr_conventions``."""


def level_factors(shard: int) -> list[int]:
    """Say how many fine cells lie along a cell of each level.

    >>> level_factors(1200), level_factors(3600), level_factors(24)
    ([4, 16, 48], [4, 16, 48, 144], [])
    """
    factors, side, whole = [], shard, 1
    while step := next((s for s in _STEPS if side % s == 0 and side // s >= _LEAST), 0):
        side, whole = side // step, whole * step
        factors.append(whole)
    return factors


def reduce_classes(index: NDArray[np.uint8], *, classes: int, factors: list[int]) -> Iterator[NDArray[np.uint8]]:
    """Make the levels of a map: in each cell the class of most fine cells, ``MISSING`` where more than half have none.

    Parameters
    ----------
    index
        Class indices ``(rows, columns)``, ``MISSING`` where there is no class.
    classes
        Their number. Of classes that are alike the first one is taken.
    factors
        Fine cells along a cell of each level, each a multiple of the one before.

    Yields
    ------
    ndarray
        Class indices of each level.

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
    """Sums over blocks of cells."""
    rows, cols = values.shape
    total = np.zeros((rows // step, cols // step), dtype=np.int32)
    for i in range(step):
        for j in range(step):
            total += values[i::step, j::step]
    return total


def multiscales(grid: Grid, factors: list[int], *, variable: str = "land_cover") -> dict[str, Any]:
    """Describe place and levels of a map in the attributes that GeoZarr's conventions ask for."""
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
        # In cells of the level before, the centre of the first cell lies so far from that of its first cell.
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
