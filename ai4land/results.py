"""What came of a run: its plan before, its scores and pictures after."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ai4land import cube, ledger, plot
from ai4land.alignment import align
from ai4land.checkpoint import load_card
from ai4land.config import RunConfig
from ai4land.contents import held_of
from ai4land.cost import STATIC_BYTES, Rates, Work, count, estimate, network_of
from ai4land.errors import DataError, MismatchError
from ai4land.evaluate import evaluate_years
from ai4land.grid import Window, coarse_slices
from ai4land.hold import hold
from ai4land.inputs import cubes_of, grid_of, legend_of, split_of
from ai4land.predict import Source
from ai4land.reconstruct import plan_blocks
from ai4land.rivals import RIVALS, Wanted, rival_maps
from ai4land.splits import TEST, VALIDATION, Scored, Split, load_split
from ai4land.stages import method_of
from ai4land.stores import Place, write_atomically
from ai4land.totals import STATEMENTS

_log = logging.getLogger(__name__)


def evaluate(run: RunConfig, *, tell: Callable[[str], None] = _log.info) -> dict[str, Any]:
    """Score the cubes of a run on the validation and the test years, write ``evaluation.json`` and draw the figures.

    Returns
    -------
    dict
        By split (``validation``, ``test``): ``years``, and the scores of ``model``, ``persistence`` and ``proportional``.

    Raises
    ------
    DataError
        If a cube is not there or not finished.
    MismatchError
        If the store was made, or the model trained, with another configuration.
    """
    for path, *_ in cubes_of(run).values():
        cube.open_cube(path)
    with hold(run.folder):
        return _evaluate(run, tell)


def _evaluate(run: RunConfig, tell: Callable[[str], None]) -> dict[str, Any]:
    source = Source(align(run, tell=tell))
    split = split_of(run, source.grid)
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
        tell(f"scoring {name}: {scored.years[0]}-{scored.years[-1]} {_origin(scored.reference)}")
        result[name] = _score(run, source, split, name, scored, split.cells(role))
    write_atomically(run.folder / "evaluation.json", (json.dumps(result, indent=1) + "\n").encode())
    figures(run, result, tell=tell)
    return result


def _origin(reference: int | None) -> str:
    return "without a reference map" if reference is None else f"from the map of {reference}"


def _score(run: RunConfig, source: Source, split: Split, name: str, scored: Scored, cells: NDArray[np.bool_]) -> dict[str, Any]:
    grid, legend, base = source.grid, source.legend, scored.reference
    windows = [w for w in grid.shards() if np.asarray(source.mask[w.slices]).any()]
    wanted = Wanted(run, source, base, windows)
    cubes = cubes_of(run)
    path = cubes.get(name, cubes["cube"])[0]
    data = cube.open_cube(path)
    _check_contents(run, path, data, *next(v[1:] for v in cubes.values() if v[0] == path))
    place = {int(year): i for i, year in enumerate(data["year"].values)}
    done = ledger.recorded(path)

    def read(variable: str) -> Callable[[int, Window], NDArray[Any]]:
        def cut(year: int, w: Window) -> NDArray[Any]:
            if year not in place or (w.row, w.col, year) not in done:
                raise DataError(f"cube {path} lacks {year} of shard {w}; finish it with: ai4land reconstruct RUN.yaml")
            return np.asarray(data[variable][(place[year], ..., *w.slices)].values)

        return cut

    def where(w: Window) -> NDArray[np.bool_]:
        inside = np.kron(cells[coarse_slices(w, grid.factor)], np.ones((grid.factor, grid.factor), dtype=bool))
        return np.asarray(source.mask[w.slices], dtype=bool) & inside

    with tempfile.TemporaryDirectory() as scratch:
        rivals = rival_maps(run, source, scored, wanted, split, Path(scratch))
        result = evaluate_years(
            {"model": read("land_cover"), "most_likely": read("most_likely"), **rivals},
            truth=lambda year, w: legend.decode(source.map_of(year, w)),
            reference=None if base is None else lambda w: legend.decode(source.map_of(base, w)),
            reference_year=base,
            where=where,
            wanted=wanted.shares,
            grid=grid,
            legend=legend,
            windows=windows,
            years=list(scored.years),
            weights_kind=run.scenario.weights,
            confidence={"model": read("confidence")},
            change_probability=None if base is None else {"model": read("change_probability")},
            block=run.evaluate.block,
            seed=run.seed,
        )
    bias = wanted.bias()
    if bias is not None:
        bias.to_netcdf(run.folder / f"{name}_bias.nc")
    result["totals"] = {"method": method_of(run, base), **wanted.check(data, place, list(scored.years))}
    return result


def _check_contents(run: RunConfig, path: Place, data: xr.Dataset, reference: int | None, years: list[int]) -> None:
    """Refuse a cube that was made from other inputs than the store holds by now."""
    said = data.attrs.get("ai4land_identity", {}).get("contents")
    if said is not None and said != held_of(run.folder / "store.zarr", reference=reference, years=years):
        raise MismatchError(
            f"cube {path} was made from other inputs than store {run.folder / 'store.zarr'} holds by now; restore the inputs and make the "
            "store anew, or delete the cube and its ledger and reconstruct again"
        )


def figures(run: RunConfig, scores: dict[str, Any], *, tell: Callable[[str], None] = _log.info) -> None:
    """Draw the map, the change map, the training curves and the scores by year into ``figures/``."""
    folder = run.folder / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    source = Source(run.folder / "store.zarr")
    data = cube.open_cube(cubes_of(run)["cube"][0])
    step = max(1, -(-max(source.grid.shape) // 1600))
    rows, cols = _mapped(np.asarray(source.mask[::step, ::step], dtype=bool))
    extent = _extent(source, rows, cols, step)
    years = [int(y) for y in data["year"].values]

    def thin(values: Any) -> NDArray[np.uint8]:
        return np.asarray(values[::step, ::step])[rows, cols]

    plot.map_figure(
        thin(data["land_cover"][-1].values),
        legend=source.legend,
        extent=extent,
        title=f"{run.title or run.name}: {years[-1]}",
        path=folder / "map.png",
    )
    test = run.split.test
    if test is not None and test.reference is not None and test.reference == run.reconstruct.reference:
        year = test.years[-1]
        whole = Window(0, 0, *source.grid.shape)
        plot.hits_figure(
            thin(source.map_of(test.reference, whole)),
            thin(source.map_of(year, whole)),
            thin(source.legend.encode(data["land_cover"][years.index(year)].values)),
            extent=extent,
            title=f"Change {test.reference}-{year}",
            path=folder / "change.png",
        )
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


def _mapped(mask: NDArray[np.bool_]) -> tuple[slice, slice]:
    """Rows and columns that hold mapped cells."""
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(cols[0]), int(cols[-1]) + 1)


def _extent(source: Source, rows: slice, cols: slice, step: int) -> tuple[float, float, float, float]:
    a = source.grid.fine.affine
    west, east = (a.c + a.a * step * v for v in (cols.start, cols.stop))
    north, south = (a.f + a.e * step * v for v in (rows.start, rows.stop))
    return west, south, east, north


def plan(
    run: RunConfig, *, rates: Rates | None = None, workers: int | None = None, land: float = 1.0, cuda: bool = False
) -> Iterator[tuple[str, str]]:
    """Say what a run will do, what of it is done and what it takes, as pairs of a label and a text.

    Reads no more than the run file, the store's mask and the ledgers.

    Parameters
    ----------
    run
        The configuration.
    rates
        Measured or stated (:mod:`ai4land.cost`); without them no time is told.
    workers
        Default: those of the run file.
    land
        Share of the shards that have cells to map, while there is no store.
    cuda
        Whether the network is on a CUDA device.
    """
    grid, legend = grid_of(run), legend_of(run)
    split = split_of(run, grid)
    rows, cols = grid.shape
    crows, ccols = grid.coarse.shape
    yield (
        "grid",
        f"{rows} x {cols} fine cells of {grid.fine.affine.a:.6g}, {crows} x {ccols} coarse cells, {len(grid.shards())} shards of {grid.shard}",
    )
    yield "legend", f"{legend.name}: {legend.n} classes; scenario: {run.scenario.kind}; {len(run.static)} static maps"
    store = run.folder / "store.zarr"
    aligned = (store / "zarr.json").is_file()
    yield (
        "align",
        "done" if aligned else f"to do: {4 * len(run.static) * rows * cols / 1e9:.2f} GB of static maps before compression",
    )
    yield "totals", STATEMENTS[run.constrain.method]
    net = network_of(run)
    t = run.train
    cells = t.members * t.steps * t.batch * t.patch**2
    yield (
        "train",
        f"{len(split.pairs)} pairs of years, {t.members} x {t.steps} steps, {cells / 1e6:.0f} million cells"
        + _done(run.folder / "model.json"),
    )
    yield (
        "network",
        f"halo {net.halo} cells: each shard is read {((grid.shard + 2 * net.halo) / grid.shard) ** 2:.2f} times its size",
    )
    for path, reference, years in cubes_of(run).values():
        raw = len(years) * rows * cols * (2 * legend.n + 4) / 1e9
        text = f"{len(years)} years {_origin(reference)}, at most {raw:.2f} GB before compression"
        if aligned:
            blocks = partial(plan_blocks, store, years=years, reference=reference, years_a_shard=run.reconstruct.years_a_shard)
            every, left = blocks(), blocks(done=ledger.recorded(path))
            text += f"; {len(every) - len(left)} of {len(every)} blocks done"
        yield str(path).rpartition("/")[2], text
    for name, scored in (("validation", split.validation), ("test", split.test)):
        if scored is not None:
            yield f"score {name}", f"{len(scored.years)} years {_origin(scored.reference)}"
    work, workers = count(run, land=land, cuda=cuda), workers or run.reconstruct.workers
    size = work.cubes if rates is None or rates.cell is None else work.mapped * rates.cell
    yield (
        "work",
        f"{work.blocks} blocks, a task each; {work.store / 1e9:.2f} GB of store, {size / 1e9:.2f} GB of cubes in {work.objects:,} shards",
    )
    yield "reads", f"{_read_bytes(work) / 1e9:.2f} GB by reconstruction, halos included"
    each = work.worker.both / 1e9
    yield "memory", f"{each:.2f} GB a worker, {each * workers:.2f} GB for {workers}; {work.training.both / 1e9:.2f} GB to train"
    if rates is not None:
        # On this machine the workers share the cores that one was timed on.
        trainers = run.train.workers if cuda or run.cluster != "local" else 1
        cost = estimate(work, rates, workers=workers, trainers=trainers)
        yield "rates", rates.about
        yield "time to train", f"{_clock(cost.train)} on {trainers} device{'s' * (trainers > 1)}"
        yield (
            "time to reconstruct",
            f"{_clock(cost.reconstruct)} on {workers} workers, {cost.network:.0%} of it in the network",
        )
        yield "device hours", f"{cost.device_hours:.3g}, reading the inputs and scoring not counted"


def _read_bytes(work: Work) -> float:
    return float(work.read.sum()) * STATIC_BYTES + work.blocks * 1e4


def _clock(seconds: float) -> str:
    """Write a time span.

    >>> _clock(3723), _clock(59.6)
    ('1:02:03', '0:01:00')
    """
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _done(path: Path) -> str:
    return "; done" if path.is_file() else ""
