"""Fit the normalisation of the model input to the training cells and years of a store, shard by shard."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ai4land.errors import DataError
from ai4land.grid import Window, coarse_slices, tiles
from ai4land.model.features import Feature, FeatureSpec


@dataclass
class _Sums:
    """Running mean, sum of squared deviations (Chan, Golub & LeVeque 1983) and, if categorical, codes."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    codes: set[float] = field(default_factory=set)

    def add(self, values: NDArray[np.float32], *, categorical: bool) -> None:
        if not values.size:
            return
        if categorical:
            self.codes |= set(np.unique(values).tolist())
        mean = float(values.mean(dtype=np.float64))
        off, count = mean - self.mean, self.count + values.size
        self.squares += float(np.square(values - mean, dtype=np.float64).sum()) + off**2 * self.count * values.size / count
        self.mean += off * values.size / count
        self.count = count


def training_tiles(store: xr.Dataset, cells: NDArray[np.bool_], factor: int) -> Iterator[Window]:
    """Yield shard-sized windows, made of whole coarse cells, that contain training cells."""
    shape = store["mask"].shape
    shards = store["mask"].encoding.get("shards")
    side = int(shards[0]) if shards else factor * max(1, 1024 // factor)
    for w in tiles((int(shape[0]), int(shape[1])), side):
        if cells[coarse_slices(w, factor)].any():
            yield w


def trained(store: xr.Dataset, w: Window, cells: NDArray[np.bool_], factor: int) -> NDArray[np.bool_]:
    """Return the mask of a window's mapped fine cells in coarse training cells."""
    inside = np.kron(cells[coarse_slices(w, factor)], np.ones((factor, factor), dtype=bool))
    return np.asarray(store["mask"][w.slices].values.astype(bool) & inside)


def fit_spec(
    store: xr.Dataset,
    *,
    cells: NDArray[np.bool_],
    pairs: Iterable[tuple[int, int]],
    codes: Iterable[int],
    factor: int,
    position: tuple[float, ...] = (),
) -> FeatureSpec:
    """Fit the normalisation on the training cells and training years only.

    Parameters
    ----------
    store, cells
        The analysis-ready store, opened lazily, and the mask of its coarse training cells ``(coarse rows, coarse columns)``.
    pairs, codes
        (reference year, year) of training; class codes in the order of their indices.
    factor, position
        Fine cells along one side of a coarse cell; wavelengths of :class:`ai4land.model.features.FeatureSpec`.

    Raises
    ------
    DataError
        If a static map has no value on the training cells.
    """
    names, kinds = (list(store[n].values) for n in ("feature", "categorical"))
    sums = [_Sums() for _ in names]
    for w in training_tiles(store, cells, factor):
        inside = trained(store, w, cells, factor)
        for values, categorical, known in zip(store["static"][:, *w.slices].values, kinds, sums, strict=True):
            seen = values[inside]
            known.add(seen[np.isfinite(seen)], categorical=bool(categorical))
    made = []
    for name, categorical, known in zip(names, kinds, sums, strict=True):
        if not known.count:
            raise DataError(f"static map {name} has no value on the training cells, expected some; drop it or widen the split")
        if categorical:
            made.append(Feature(name=str(name), codes=tuple(sorted(int(c) for c in known.codes))))
        else:
            std = math.sqrt(known.squares / known.count)
            made.append(Feature(name=str(name), mean=known.mean, std=std if std > 1e-6 else 1.0))
    pairs = tuple(pairs)
    chosen = {y: store["coarse"].sel(year=y).values[:, cells] for y in sorted({y for p in pairs for y in p})}
    squares, count = np.zeros(store.sizes["state"]), 0
    for start, year in pairs:
        change = chosen[year].astype(np.float64) - chosen[start]
        change = change[:, np.isfinite(change).all(axis=0)]
        squares += (change**2).sum(axis=1)
        count += change.shape[1]
    spread = np.sqrt(squares / max(count, 1)).clip(1e-3)
    return FeatureSpec(
        features=tuple(made),
        states=tuple(str(s) for s in store["state"].values),
        codes=tuple(int(c) for c in codes),
        difference_std=tuple(float(v) for v in spread),
        position=tuple(position),
    )
