"""Scores and figures of a run, and its plan before it begins."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ai4land import cube, ledger, plot
from ai4land.alignment import align
from ai4land.checkpoint import load_card
from ai4land.config import RunConfig
from ai4land.contents import held_of
from ai4land.cost import STATIC_BYTES, Rates, count, estimate, network_of, scoring_memory
from ai4land.errors import DataError, MismatchError
from ai4land.evaluate import evaluate_years
from ai4land.grid import Window, coarse_slices
from ai4land.hold import hold
from ai4land.inputs import Inputs, cubes_of
from ai4land.legend import Legend
from ai4land.predict import Source
from ai4land.reconstruct import plan_blocks
from ai4land.rivals import RIVALS, Wanted, mean_bias, rival_maps
from ai4land.splits import TEST, VALIDATION, Scored, Split, load_split
from ai4land.stages import method_of
from ai4land.stores import Place, write_atomically
from ai4land.tally import Classes, Maps, Probabilities
from ai4land.totals import STATEMENTS

_log = logging.getLogger(__name__)


def evaluate(run: RunConfig, *, tell: Callable[[str], None] = _log.info) -> dict[str, Any]:
    """Score the cubes of a run on the validation and the test years, write ``evaluation.json`` and draw the figures.

    Returns
    -------
    dict
        By split (``validation``, ``test``): what :func:`~ai4land.evaluate.evaluate_years` gives for ``model``, ``most_likely`` and
        the rivals, and ``totals``.

    Raises
    ------
    DataError
        If a cube does not exist or is not finished.
    MismatchError
        If the store was made, or the model trained, with another configuration.
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
    """The arrays of a finished cube by year and window; its classes as indices."""

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
        """Read numbers from 0 to 1, NaN where not mapped."""
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
    """Shards with cells to map."""
    return [w for w in source.grid.shards() if np.asarray(source.mask[w.slices]).any()]


def _check_contents(run: RunConfig, path: Place, made: _Cube, reference: int | None, years: list[int]) -> None:
    """Refuse a cube that was made from other inputs than the store holds now."""
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
    """Read the maps to draw, thinned and cut to the mapped cells, shard by shard, so that memory does not grow with the map.

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
    """From the first to the last index; all of ``size`` if there is none."""
    return slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, size)


def plan(
    run: RunConfig, *, rates: Rates | None = None, workers: int | None = None, land: float = 1.0, cuda: bool = False
) -> Iterator[tuple[str, str]]:
    """Say what a run will do, what is done already and what the rest takes, as pairs of a label and a text.

    Reads no more than the run file, the store's mask and the ledgers.

    Parameters
    ----------
    run
        The configuration.
    rates
        Measured or stated (:mod:`ai4land.cost`); without them no time is estimated.
    workers
        Default: those of the run file.
    land
        Share of the shards that have cells to map, used while there is no store.
    cuda
        Whether the network runs on a CUDA device.
    """
    yield from _plan_inputs(run)
    yield from _plan_results(run)
    yield from _plan_work(run, rates, workers or run.reconstruct.workers, land, cuda)


def _plan_inputs(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Grid, legend and store."""
    grid, legend = Inputs.of(run).grid, Inputs.of(run).legend
    (rows, cols), (crows, ccols) = grid.shape, grid.coarse.shape
    yield (
        "grid",
        f"{rows} x {cols} fine cells of {grid.fine.affine.a:.6g}, {crows} x {ccols} coarse cells, {len(grid.shards())} shards of {grid.shard}",
    )
    yield "legend", f"{legend.name}: {legend.n} classes; scenario: {run.scenario.kind}; {len(run.static)} static maps"
    to_do = f"to do: {4 * len(run.static) * rows * cols / 1e9:.2f} GB of static maps before compression"
    yield "align", "done" if _aligned(run) else to_do


def _plan_results(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Training, cubes and scores, each with what is done of it."""
    grid, legend, t = Inputs.of(run).grid, Inputs.of(run).legend, run.train
    split, net = Inputs.of(run).split, network_of(run)
    yield "totals", STATEMENTS[run.constrain.method]
    cells = t.members * t.steps * t.batch * t.patch**2
    done = "; done" if (run.folder / "model.json").is_file() else ""
    yield "train", f"{len(split.pairs)} pairs of years, {t.members} x {t.steps} steps, {cells / 1e6:.0f} million cells{done}"
    padded = ((grid.shard + 2 * net.halo) / grid.shard) ** 2
    yield "network", f"halo {net.halo} cells: each shard is read {padded:.2f} times its size"
    for path, reference, years in cubes_of(run).values():
        raw = len(years) * grid.shape[0] * grid.shape[1] * (2 * legend.n + 4) / 1e9
        text = f"{len(years)} years {_origin(reference)}, at most {raw:.2f} GB before compression"
        if _aligned(run):
            blocks = partial(
                plan_blocks,
                run.folder / "store.zarr",
                years=years,
                reference=reference,
                years_a_shard=run.reconstruct.years_a_shard,
            )
            every, remaining = blocks(), blocks(done=ledger.recorded(path))
            text += f"; {len(every) - len(remaining)} of {len(every)} blocks done"
        yield str(path).rpartition("/")[2], text
    for name, scored in (("validation", split.validation), ("test", split.test)):
        if scored is not None:
            yield f"score {name}", f"{len(scored.years)} years {_origin(scored.reference)}"


def _plan_work(run: RunConfig, rates: Rates | None, workers: int, land: float, cuda: bool) -> Iterator[tuple[str, str]]:
    """Work, memory, and with rates the time."""
    work = count(run, land=land, cuda=cuda)
    size = work.cubes if rates is None or rates.cell is None else work.mapped * rates.cell
    yield (
        "work",
        f"{work.blocks} blocks, a task each; {work.store / 1e9:.2f} GB of store, {size / 1e9:.2f} GB of cubes in {work.objects:,} shards",
    )
    read = float(work.read.sum()) * STATIC_BYTES + work.blocks * 1e4
    yield "reads", f"{read / 1e9:.2f} GB by reconstruction, halos included"
    per_worker = work.worker.both / 1e9
    yield (
        "memory",
        f"{per_worker:.2f} GB a worker, {per_worker * workers:.2f} GB for {workers}; {work.training.both / 1e9:.2f} GB to train, "
        f"{scoring_memory(run) / 1e9:.2f} GB to score and draw",
    )
    if rates is None:
        return
    # The workers of one machine share the cores that a single process was timed on.
    trainers = run.train.workers if cuda or run.cluster != "local" else 1
    cost = estimate(work, rates, workers=workers, trainers=trainers)
    yield "rates", rates.about
    yield "time to train", f"{_clock(cost.train)} on {trainers} device{'s' * (trainers > 1)}"
    yield "time to reconstruct", f"{_clock(cost.reconstruct)} on {workers} workers, {cost.network:.0%} of it in the network"
    yield "device hours", f"{cost.device_hours:.3g}, reading the inputs and scoring not counted"


def _aligned(run: RunConfig) -> bool:
    return (run.folder / "store.zarr" / "zarr.json").is_file()


def _origin(reference: int | None) -> str:
    return "without a reference map" if reference is None else f"from the map of {reference}"


def _clock(seconds: float) -> str:
    """Write a time span.

    >>> _clock(3723), _clock(59.6)
    ('1:02:03', '0:01:00')
    """
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
