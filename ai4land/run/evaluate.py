"""Scores and figures of a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ai4land.cube import cube, ledger
from ai4land.errors import DataError, MismatchError
from ai4land.evaluate import plot
from ai4land.evaluate.evaluate import evaluate_years
from ai4land.evaluate.tally import Classes, Maps, Probabilities
from ai4land.grid import Window, coarse_slices
from ai4land.legend import Legend
from ai4land.model.checkpoint import load_card
from ai4land.places import Place, write_atomically
from ai4land.run.align import align
from ai4land.run.config import RunConfig
from ai4land.run.hold import hold
from ai4land.run.inputs import Inputs, cubes_of
from ai4land.run.reconstruct import method_of
from ai4land.run.rivals import RIVALS, Wanted, mean_bias, rival_maps
from ai4land.store.contents import held_of
from ai4land.store.read import Source
from ai4land.train.splits import TEST, VALIDATION, Scored, Split, load_split

_log = logging.getLogger(__name__)


def evaluate(run: RunConfig, *, tell: Callable[[str], None] = _log.info) -> dict[str, Any]:
    """Score the cubes of a run on the validation and the test years, write ``evaluation.json`` and draw the figures.

    Returns
    -------
    dict
        By split (``validation``, ``test``): the result of :func:`~ai4land.evaluate.evaluate.evaluate_years` for ``model``,
        ``most_likely`` and the rivals, and ``totals``.

    Raises
    ------
    DataError
        If a cube does not exist or is not finished.
    MismatchError
        If the store or the model was made with another configuration, or a cube from other inputs than the store holds.
    """
    for path, *_ in cubes_of(run).values():
        cube.open_cube(path)
    with hold(run.folder):
        return _evaluate(run, tell)


def _evaluate(run: RunConfig, tell: Callable[[str], None]) -> dict[str, Any]:
    source = Source(align(run, tell=tell))
    split = Inputs.of(run).split
    saved, trained = load_split(run.folder / "splits.json").hash, load_card(run.folder).split
    if not split.hash == saved == trained:
        raise MismatchError(
            f"model in {run.folder} was trained with split {trained}, expected {split.hash} as in the run file (splits.json has {saved}); "
            "restore the run file, or train again under another name"
        )
    result: dict[str, Any] = {}
    for name, scored, role in (("validation", split.validation, VALIDATION), ("test", split.test, TEST)):
        if scored is None:
            continue
        tell(f"scoring {name}: {scored.years[0]}-{scored.years[-1]}, reference map {scored.reference or 'none'}")
        result[name] = _score(run, source, split, name, scored, split.cells(role))
    write_atomically(run.folder / "evaluation.json", (json.dumps(result, indent=1) + "\n").encode())
    figures(run, result, tell=tell)
    return result


class _Cube:
    """Reads the arrays of a finished cube by year and window, classes as indices."""

    def __init__(self, place: Place, legend: Legend) -> None:
        self.data = cube.open_cube(place)
        self.years = [int(year) for year in self.data["year"].values]
        self._place, self._legend, self._done = place, legend, ledger.recorded(place)

    def _read(self, variable: str, year: int, w: Window, *at: int) -> NDArray[Any]:
        if year not in self.years or (w.row, w.col, year) not in self._done:
            raise DataError(f"cube {self._place} lacks {year} of shard {w}; finish it with: ai4land reconstruct RUN.yaml")
        return np.asarray(self.data[variable][(self.years.index(year), *at, *w.slices)].values)

    def classes(self, variable: str) -> Classes:
        """Read the class indices of a map of codes."""
        return lambda year, w: self._legend.encode(self._read(variable, year, w), source=f"{variable} of {year}")

    def probabilities(self, variable: str) -> Probabilities:
        """Read probabilities, NaN where not mapped."""
        return lambda year, w: self._read(variable, year, w)

    def fraction(self, year: int, k: int, w: Window) -> NDArray[np.floating]:
        """Read the fraction of a class, NaN where not mapped."""
        return self._read("fraction", year, w, k)


def _score(run: RunConfig, source: Source, split: Split, name: str, scored: Scored, cells: NDArray[np.bool_]) -> dict[str, Any]:
    grid, base, years = source.grid, scored.reference, list(scored.years)
    windows, wanted = _land(source), Wanted(run, source, base)
    cubes = cubes_of(run)
    path = cubes.get(name, cubes["cube"])[0]
    made = _Cube(path, source.legend)
    _check_contents(run, path, made, *next(v[1:] for v in cubes.values() if v[0] == path))

    def where(w: Window) -> NDArray[np.bool_]:
        inside = np.kron(cells[coarse_slices(w, grid.factor)], np.ones((grid.factor, grid.factor), dtype=bool))
        return np.asarray(source.mask[w.slices], dtype=bool) & inside

    maps = Maps(
        grid=grid,
        classes=tuple(source.legend.names),
        observed=source.map_of,
        predictions={
            "model": made.classes("land_cover"),
            "most_likely": made.classes("most_likely"),
            **rival_maps(run, source, scored, wanted, split),
        },
        where=where,
        reference=base,
        wanted=wanted.shares,
        weights=run.scenario.weights,
        confidence={"model": made.probabilities("confidence")},
        change_probability={} if base is None else {"model": made.probabilities("change_probability")},
    )
    result = evaluate_years(maps, windows=windows, years=years, block=run.evaluate.block, seed=run.seed)
    totals = wanted.check(made.classes("land_cover"), made.fraction, years, windows)
    bias = None
    if base is not None:
        difference = wanted.bias(windows)
        difference.to_netcdf(run.folder / f"{name}_bias.nc")
        bias = mean_bias(difference, source.legend.names)
    return {**result, "totals": {"method": method_of(run, base), **totals, "bias": bias}}


def _land(source: Source) -> list[Window]:
    """List the shards with cells to map."""
    return [w for w in source.grid.shards() if np.asarray(source.mask[w.slices]).any()]


def _check_contents(run: RunConfig, path: Place, made: _Cube, reference: int | None, years: list[int]) -> None:
    """Refuse a cube made from other inputs than the store holds now."""
    contents = made.data.attrs.get("ai4land_identity", {}).get("contents")
    if contents is not None and contents != held_of(run.folder / "store.zarr", reference=reference, years=years):
        raise MismatchError(
            f"cube {path} was made from other inputs than store {run.folder / 'store.zarr'} holds now; restore the inputs and make the "
            "store anew, or delete the cube and its ledger and reconstruct again"
        )


def figures(run: RunConfig, scores: dict[str, Any], *, tell: Callable[[str], None] = _log.info) -> None:
    """Draw the map, the change map, the training curves and the scores by year into ``figures/``."""
    folder = run.folder / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    _draw_maps(run, folder)
    for metrics in (run.folder / "metrics.jsonl", *sorted(run.folder.glob("member_*/metrics.jsonl"))):
        if metrics.is_file():
            member = "" if metrics.parent == run.folder else f"_{metrics.parent.name}"
            history = [json.loads(line) for line in metrics.read_text().splitlines()]
            plot.curves_figure(history, path=folder / f"curves{member}.png")
    for name, part in scores.items():
        methods = [m for m in ("model", "most_likely", *RIVALS) if m in part]
        if len(part["years"]) > 1:
            plot.lead_figure({m: part[m]["per_year"] for m in methods}, path=folder / f"{name}_by_year.png")
        calibration = part["model"]["calibration"]
        if calibration is not None:
            plot.reliability_figure({"model": calibration}, folder / f"{name}_reliability.png")
    tell(f"figures: {folder}")


def _draw_maps(run: RunConfig, folder: Path) -> None:
    """Draw the map of the last year, and the change of the test years if the published cube starts from their reference map."""
    last, change, extent = thin_maps(run)
    legend = Inputs.of(run).legend
    title = f"{run.title or run.name}: {last[0]}"
    plot.map_figure(legend.decode(last[1]), legend=legend, extent=extent, title=title, path=folder / "map.png")
    test = run.split.test
    if change is not None and test is not None:
        title = f"Change {test.reference}-{test.years[-1]}"
        plot.hits_figure(*change, extent=extent, title=title, path=folder / "change.png")


Thin = NDArray[np.uint8]


def thin_maps(run: RunConfig) -> tuple[tuple[int, Thin], tuple[Thin, Thin, Thin] | None, plot.Extent]:
    """Read the maps to draw, thinned and cut to the mapped cells; reading by shard bounds the memory.

    Returns
    -------
    last
        Last year of the published cube, and its class indices ``(rows, columns)``.
    change
        Class indices of the reference map, of the last test year, and of the cube in it; None if the published cube does not
        start from the reference map of the test years.
    extent
        West, south, east and north edge.
    """
    source = Source(run.folder / "store.zarr")
    made = _Cube(cubes_of(run)["cube"][0], source.legend)
    mapped, (height, width) = made.classes("land_cover"), source.grid.shape
    step = plot.step_of((height, width))
    thin = partial(plot.thin, windows=_land(source), shape=(height, width), step=step)
    mask = thin(lambda w: np.asarray(source.mask[w.slices], dtype=np.uint8), fill=0)
    rows, cols = (_span(np.flatnonzero(mask.any(axis=axis)), mask.shape[1 - axis]) for axis in (1, 0))
    a = source.grid.fine.affine
    west, east = (a.c + a.a * step * v for v in (cols.start, cols.stop))
    north, south = (a.f + a.e * step * v for v in (rows.start, rows.stop))

    def read(classes: Classes, year: int) -> Thin:
        return thin(lambda w: classes(year, w))[rows, cols]

    test, change = run.split.test, None
    if test is not None and test.reference is not None and test.reference == run.reconstruct.reference:
        year = test.years[-1]
        change = (read(source.map_of, test.reference), read(source.map_of, year), read(mapped, year))
    return (made.years[-1], read(mapped, made.years[-1])), change, (west, south, east, north)


def _span(used: NDArray[np.intp], size: int) -> slice:
    """Slice from the first to the last index, or all of ``size`` without any."""
    return slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, size)
