"""The baseline maps that a run's model is scored against, and the scenario's class totals per coarse cell."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ai4land.constrain.allocate import allocate
from ai4land.constrain.totals import Totals
from ai4land.evaluate.baselines import nearest_coarse, persistence, proportional_allocation
from ai4land.evaluate.boosting import Suitability, fit_suitability
from ai4land.evaluate.tally import Classes
from ai4land.grid import COARSE_DIMS, Window, block_sum, coarse_slices
from ai4land.legend import MISSING
from ai4land.model.checkpoint import load_card
from ai4land.reconstruct.block import totals_of
from ai4land.run.config import RunConfig
from ai4land.run.inputs import cubes_of
from ai4land.run.reconstruct import job_of
from ai4land.store.read import Source, read_window_data
from ai4land.train.splits import TRAIN, Scored, Split

RIVALS = ("persistence", "proportional", "gradient_boosting", "nearest")
"""Names of the rivals in ``evaluation.json``."""
_LEAST = 1e-9
"""Smallest probability before taking the logarithm."""


class Wanted:
    """Class totals of each window, as :func:`ai4land.reconstruct.block.reconstruct_block` imposes them.

    If the run imposes none, these are the totals it would impose, so that the error against the scenario can be measured.

    Attributes
    ----------
    of
        Returns the totals of a window; the last window is cached.
    """

    def __init__(self, run: RunConfig, source: Source, reference: int | None) -> None:
        job = job_of(run, source, cube_path=cubes_of(run)["cube"][0], reference=reference)
        if job.method == "none":
            job = replace(job, method="level" if reference is None else "change")
        self._source = source
        self.of: Callable[[Window], Totals] = lru_cache(maxsize=1)(
            lambda w: totals_of(source, read_window_data(source, w, reference=job.reference), job)
        )

    def shares(self, year: int, w: Window) -> NDArray[np.float64]:
        """Class shares of the mapped part, ``(class, coarse rows, coarse columns)`` of the window; NaN where unknown."""
        return self.of(w).shares(year)

    def check(
        self,
        classes: Classes,
        fraction: Callable[[int, int, Window], NDArray[np.floating]],
        years: list[int],
        windows: Iterable[Window],
    ) -> dict[str, float]:
        """Measure the deviation of both products of a finished cube from the totals.

        Parameters
        ----------
        classes
            Reads the class indices of the cube.
        fraction
            Reads the fraction of a class for a year, a class index and a window, NaN where not mapped.

        Returns
        -------
        dict
            ``cells_off``: largest difference between the cells of a class in a coarse cell and its share of the mapped cells;
            ``fraction_error``: largest error of a class in a coarse cell, as a share of that cell.
        """
        f = self._source.grid.factor
        off = worst = 0.0
        for w in windows:
            totals, mask = self.of(w), np.asarray(self._source.mask[w.slices], dtype=bool)
            weight = np.where(mask, 1.0 if totals.areas is None else totals.areas[:, None], 0.0)
            whole = block_sum(weight, f)
            for year in years:
                index = classes(year, w)
                cells, shares = totals.shares(year, by_cells=True) * totals.cells, totals.shares(year)
                for k in range(self._source.legend.n):
                    have = block_sum(((index == k) & mask).astype(np.float64), f)
                    held = block_sum(np.nan_to_num(fraction(year, k, w).astype(np.float64)) * weight, f)
                    part = np.divide(held, whole, out=np.zeros_like(whole), where=whole > 0)
                    off = max(off, float(np.nanmax(np.abs(have - cells[k]), initial=0.0)))
                    worst = max(worst, float(np.nanmax(np.abs(part - shares[k]) * totals.coverage, initial=0.0)))
        return {"cells_off": off, "fraction_error": worst}

    def bias(self, windows: Iterable[Window]) -> xr.Dataset:
        """Class shares of the reference map and of the scenario in its year, and their difference, on the whole coarse grid."""
        grid, legend = self._source.grid, self._source.legend
        values = {n: np.full((legend.n, *(int(v) for v in grid.coarse.shape)), np.nan) for n in ("map", "scenario")}
        for w in windows:
            cut, totals = (slice(None), *coarse_slices(w, grid.factor)), self.of(w)
            values["map"][cut], values["scenario"][cut] = totals.reference_shares[False], totals.start
        dims = ("class", *COARSE_DIMS)
        coords = {"class": legend.codes, **{d: grid.coords()[d] for d in COARSE_DIMS}}
        about = {"units": "1", "long_name": "class share of the coarse cell"}
        arrays = {n: (dims, v, {**about, "comment": f"of the {n}"}) for n, v in values.items()}
        difference = (dims, values["map"] - values["scenario"], {**about, "comment": "map less scenario"})
        return xr.Dataset({**arrays, "difference": difference}, coords=coords)


def mean_bias(bias: xr.Dataset, names: Iterable[str]) -> dict[str, float]:
    """Mean absolute difference of :meth:`Wanted.bias` over coarse cells, by names of the classes; 0 without coarse cells."""
    every = np.abs(bias["difference"].values).reshape(bias.sizes["class"], -1)
    every = every[:, np.isfinite(every).all(axis=0)]
    return {name: float(v.mean()) if v.size else 0.0 for name, v in zip(names, every, strict=True)}


def rival_maps(run: RunConfig, source: Source, scored: Scored, wanted: Wanted, split: Split) -> dict[str, Classes]:
    """Make readers of the baseline maps; each map is computed when it is read.

    With a reference map: its persistence, the scenario's change at random places, and gradient boosting with the same
    whole-cell totals as the model. Without one: the largest class of each coarse cell, and gradient boosting.
    """
    base, f = scored.reference, source.grid.factor
    made: dict[str, Classes] = {}
    if base is None:
        made["nearest"] = lambda year, w: nearest_coarse(wanted.of(w).scenario(year), factor=f)
    else:
        reference = lru_cache(maxsize=1)(lambda w: source.map_of(base, w))
        made["persistence"] = lambda _, w: persistence(reference(w))
        made["proportional"] = lambda year, w: proportional_allocation(
            reference(w),
            wanted=wanted.of(w).shares(year, by_cells=True),
            start=wanted.of(w).reference_shares[True],
            factor=f,
            seed=run.seed,
            origin=(w.row, w.col),
        )
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
        made["gradient_boosting"] = _boosted(fitted, source, wanted, base, impose=run.constrain.method != "none")
    return made


def _boosted(fitted: Suitability, source: Source, wanted: Wanted, base: int | None, *, impose: bool) -> Classes:
    """Read suitability maps with the totals imposed as on the model's map."""

    def read(year: int, w: Window) -> NDArray[np.uint8]:
        mapped = np.asarray(source.mask[w.slices], dtype=bool)
        chance = fitted.predict(source, w, reference=base if fitted.with_reference else None, year=year)
        if not impose:
            return np.where(mapped, chance.argmax(axis=0), MISSING).astype(np.uint8)
        scores = np.log(np.maximum(chance, _LEAST))
        current = None if base is None else np.where(mapped, source.map_of(base, w), np.uint8(MISSING))
        totals = wanted.of(w)
        return allocate(scores, current=current, quotas=totals.quotas(year), factor=totals.factor, mapped=mapped).land_cover

    return read
