"""The plan of a run: what it will do, what is done, and what the rest costs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ai4land.constrain.totals import STATEMENTS
from ai4land.cube import ledger
from ai4land.reconstruct.plan import plan_blocks
from ai4land.run.config import RunConfig
from ai4land.run.cost import STATIC_BYTES, Rates, count, estimate, network_of, scoring_memory
from ai4land.run.inputs import Inputs, cubes_of


def plan(
    run: RunConfig, *, rates: Rates | None = None, workers: int | None = None, land: float = 1.0, cuda: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield what a run will do, what is done and what the rest costs, as pairs of a label and a text.

    Reads only the run file, the store's mask and the ledgers.

    Parameters
    ----------
    run
        The configuration.
    rates
        Measured or stated (:mod:`ai4land.run.cost`); without them no time is estimated.
    workers
        Default: those of the run file.
    land
        Share of the shards with cells to map, used until the store exists.
    cuda
        Whether the network runs on a CUDA device.
    """
    yield from _plan_inputs(run)
    yield from _plan_results(run)
    yield from _plan_work(run, rates, workers or run.reconstruct.workers, land, cuda)


def _plan_inputs(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Describe the grid, the legend and the store."""
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
    """Describe training, cubes and scores, and how much of each is done."""
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
    """Describe the work and the memory and, given rates, the time."""
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
    """Format a time span.

    >>> _clock(3723), _clock(59.6)
    ('1:02:03', '0:01:00')
    """
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
