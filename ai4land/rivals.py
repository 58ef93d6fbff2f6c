"""What the model is scored against, and what the scenario wants of every coarse cell, for the evaluation of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ai4land.allocate import allocate
from ai4land.baselines import nearest_coarse, persistence, proportional_allocation
from ai4land.checkpoint import load_card
from ai4land.config import RunConfig
from ai4land.grid import COARSE_DIMS, Window, block_sum, coarse_slices
from ai4land.inputs import cubes_of
from ai4land.legend import MISSING, Legend
from ai4land.predict import Source, read_window_data
from ai4land.reconstruct import totals_of
from ai4land.splits import TRAIN, Scored, Split
from ai4land.stages import job_of
from ai4land.suitability import Suitability, fit_suitability
from ai4land.totals import Totals

_log = logging.getLogger(__name__)

RIVALS = ("persistence", "proportional", "gradient_boosting", "nearest")
"""Names of the rivals in ``evaluation.json``."""
_LEAST = 1e-9

Codes = Callable[[int, Window], NDArray[np.uint8]]


class Wanted:
    """Class totals of the whole grid, shard by shard, as :func:`ai4land.reconstruct.reconstruct_block` imposes them.

    Where nothing is imposed it is what would be, so that the error against the scenario can be told.
    """

    def __init__(self, run: RunConfig, source: Source, reference: int | None, windows: list[Window]) -> None:
        job = job_of(run, source, cube_path=cubes_of(run)["cube"][0], reference=reference)
        if job.method == "none":
            job = replace(job, method="level" if reference is None else "change")
        self._source, self._weights = source, job.weights
        self.parts: dict[Window, Totals] = {
            w: totals_of(source, read_window_data(source, w, reference=job.reference), job) for w in windows
        }

    def shares(self, year: int, *, by_cells: bool = False) -> NDArray[np.float64]:
        """Shares of the mapped part, ``(class, coarse rows, coarse columns)`` of the whole grid; NaN where unknown."""
        grid = self._source.grid
        out = np.full((self._source.legend.n, *(int(v) for v in grid.coarse.shape)), np.nan)
        for w, totals in self.parts.items():
            out[(slice(None), *coarse_slices(w, grid.factor))] = totals.shares(year, by_cells=by_cells)
        return out

    def check(self, data: xr.Dataset, place: dict[int, int], years: list[int]) -> dict[str, Any]:
        """Measure on the finished cube how far both products are from the totals.

        Returns
        -------
        dict
            ``cells_off``: largest difference between the cells of a class in a coarse cell and its share of the mapped
            cells; ``fraction_error``: largest error of a class in a coarse cell, as a share of that cell; ``bias``: mean absolute
            difference over coarse cells of the class shares of the reference map and of the scenario in its year, by
            class (None without a reference map).
        """
        grid, legend = self._source.grid, self._source.legend
        off = worst = 0.0
        for w, totals in self.parts.items():
            mask = np.asarray(self._source.mask[w.slices], dtype=bool)
            weight = np.where(mask, 1.0 if totals.areas is None else totals.areas[:, None], 0.0)
            whole = block_sum(weight, grid.factor)
            for year in years:
                cut = (place[year], ..., *w.slices)
                index = legend.encode(data["land_cover"][cut].values)
                cells, shares = totals.shares(year, by_cells=True) * totals.cells, totals.shares(year)
                fraction = np.nan_to_num(data["fraction"][cut].values.astype(np.float64))
                for k in range(legend.n):
                    have = block_sum(((index == k) & mask).astype(np.float64), grid.factor)
                    part = np.divide(
                        block_sum(fraction[k] * weight, grid.factor), whole, out=np.zeros_like(whole), where=whole > 0
                    )
                    off = max(off, float(np.nanmax(np.abs(have - cells[k]), initial=0.0)))
                    worst = max(worst, float(np.nanmax(np.abs(part - shares[k]) * totals.coverage, initial=0.0)))
        return {"cells_off": off, "fraction_error": worst, "bias": self._bias()}

    def _bias(self) -> dict[str, float] | None:
        parts = [np.abs(t.bias).reshape(self._source.legend.n, -1) for t in self.parts.values() if t.reference_shares]
        if not parts:
            return None
        every = np.concatenate(parts, axis=1)
        every = every[:, np.isfinite(every).all(axis=0)]
        return {name: float(v.mean()) if v.size else 0.0 for name, v in zip(self._source.legend.names, every, strict=True)}

    def bias(self) -> xr.Dataset | None:
        """Class shares of the reference map and of the scenario in its year, and their difference; None without one."""
        grid, legend = self._source.grid, self._source.legend
        if not any(t.reference_shares for t in self.parts.values()):
            return None
        values = {n: np.full((legend.n, *(int(v) for v in grid.coarse.shape)), np.nan) for n in ("map", "scenario")}
        for w, t in self.parts.items():
            cut = (slice(None), *coarse_slices(w, grid.factor))
            values["map"][cut], values["scenario"][cut] = t.reference_shares[False], t.start
        dims = ("class", *COARSE_DIMS)
        coords = {"class": legend.codes, **{d: grid.coords()[d] for d in COARSE_DIMS}}
        about = {"units": "1", "long_name": "class share of the coarse cell"}
        arrays = {n: (dims, v, {**about, "comment": f"of the {n}"}) for n, v in values.items()}
        difference = (dims, values["map"] - values["scenario"], {**about, "comment": "map less scenario"})
        return xr.Dataset({**arrays, "difference": difference}, coords=coords)


def rival_maps(run: RunConfig, source: Source, scored: Scored, wanted: Wanted, split: Split, scratch: Path) -> dict[str, Codes]:
    """Make the maps that the model is scored against, each kept in ``scratch`` once it is made.

    With a reference map: its persistence, the scenario's change at random places, and gradient boosting with the same
    whole-cell totals as the model. Without one: the largest class of each coarse cell, and gradient boosting.
    """
    base, legend, f = scored.reference, source.legend, source.grid.factor
    made: dict[str, Codes] = {}
    if base is None:

        def nearest(year: int, w: Window) -> NDArray[np.uint8]:
            return np.asarray(nearest_coarse(wanted.parts[w].scenario(year), factor=f))

        made["nearest"] = nearest
    else:

        def keep(_: int, w: Window) -> NDArray[np.uint8]:
            return persistence(source.map_of(base, w))

        def proportional(year: int, w: Window) -> NDArray[np.uint8]:
            totals = wanted.parts[w]
            return proportional_allocation(
                source.map_of(base, w),
                wanted=totals.shares(year, by_cells=True),
                start=totals.reference_shares[True],
                factor=f,
                seed=run.seed,
                origin=(w.row, w.col),
            )

        made |= {"persistence": keep, "proportional": proportional}
    if run.evaluate.boosting:
        fitted = fit_suitability(
            source,
            cells=split.roles == TRAIN,
            pairs=split.pairs,
            spec=load_card(run.folder).spec,
            with_reference=base is not None and any(a != b for a, b in split.pairs),
            samples=run.evaluate.boosting,
            seed=run.seed,
        )
        made["gradient_boosting"] = partial(_boosted, fitted, source, wanted, base, method_is_none=run.constrain.method == "none")
    return {name: _remembered(function, legend, scratch / name) for name, function in made.items()}


def _boosted(
    fitted: Suitability, source: Source, wanted: Wanted, base: int | None, year: int, w: Window, *, method_is_none: bool
) -> NDArray[np.uint8]:
    """Map of the suitability, with the totals imposed as on the model's map."""
    mapped = np.asarray(source.mask[w.slices], dtype=bool)
    chance = fitted.predict(source, w, reference=base if fitted.with_reference else None, year=year)
    if method_is_none:
        return np.where(mapped, chance.argmax(axis=0), MISSING).astype(np.uint8)
    scores = np.log(np.maximum(chance, _LEAST))
    current = None if base is None else np.where(mapped, source.map_of(base, w), np.uint8(MISSING))
    totals = wanted.parts[w]
    return allocate(scores, current=current, quotas=totals.quotas(year), factor=totals.factor, mapped=mapped).land_cover


def _remembered(function: Codes, legend: Legend, folder: Path) -> Codes:
    """Codes of a map that is made once a year and window, and then read from a file."""
    folder.mkdir()

    def codes(year: int, w: Window) -> NDArray[np.uint8]:
        path = folder / f"{year}_{w.row}_{w.col}.npy"
        if not path.is_file():
            np.save(path, legend.decode(function(year, w)))
        return np.asarray(np.load(path, allow_pickle=False))

    return codes
