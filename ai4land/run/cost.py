"""The cost of a run before it starts: counted work times measured or stated rates.

The work follows from the run file and, once the store exists, from its mask. The rates come from
:func:`ai4land.run.timing.calibrate` on this machine, or are data-sheet estimates for a stated device (:data:`DEVICES`).
Training and reconstruction count; reading the inputs and scoring do not.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from distributed.system import MEMORY_LIMIT
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from ai4land.cube.overviews import level_factors
from ai4land.cube.template import VARIABLES, depths
from ai4land.errors import ConfigError
from ai4land.evaluate.plot import step_of
from ai4land.grid import Window
from ai4land.model.checkpoint import load_card
from ai4land.model.unet import UNet
from ai4land.places import folder_of
from ai4land.reconstruct.block import sides, years_between
from ai4land.reconstruct.plan import plan_blocks, sides_of
from ai4land.run.config import RunConfig
from ai4land.run.inputs import Inputs, cubes_of, needed_years
from ai4land.run.practice import CODES
from ai4land.store.read import Source, mapped_part

CELL_BYTES = {True: 10.1, False: 18.0}
"""Bytes of a mapped cell and year in a finished cube, all variables, with a reference map (Bavaria 9.9, United Kingdom 10.3) and without."""
STATIC_BYTES, MAP_BYTES = 1.3, 0.15
"""Bytes of a cell of a static map and of a cell and year of land cover in the store (Bavaria, United Kingdom, globe at 0.05 degrees: 1.1 to 1.6)."""
PROCESS_BYTES = 0.5e9
"""Bytes of Python and the libraries in a worker."""
START = 6.0
"""Seconds to start Dask and the libraries of its workers."""


@dataclass(frozen=True)
class Memory:
    """Peak bytes of the process, and of the network, which are on the device if there is one."""

    host: float
    device: float

    @property
    def both(self) -> float:
        """Bytes of a process without a device."""
        return self.host + self.device


@dataclass(frozen=True)
class Work:
    """The counted work of a run.

    Attributes
    ----------
    passes
        Fine cells that the networks see, halo included, for each block: over the years, times the members.
    walked, years
        Mapped fine cells times years walked, and these years, for each block.
    read
        Fine cells times static maps that are read, for each block.
    mapped
        Mapped fine cells times years kept, of all cubes.
    steps, scored
        Training steps of all members, and batches that validation scores.
    objects
        Shards that the cubes hold: files or objects of a store.
    store, cubes
        Bytes on disk.
    worker, training
        Memory of a worker and of the training.
    """

    passes: NDArray[np.float64]
    walked: NDArray[np.float64]
    years: NDArray[np.float64]
    read: NDArray[np.float64]
    mapped: float
    steps: int
    scored: int
    objects: int
    store: float
    cubes: float
    worker: Memory
    training: Memory

    @property
    def blocks(self) -> int:
        """Blocks, each a task of Dask."""
        return len(self.passes)


@dataclass(frozen=True)
class Rates:
    """Seconds for a unit of :class:`Work`.

    Attributes
    ----------
    step, scored
        Of one training step and of one scored batch.
    forward
        Of a fine cell through the network.
    host, shard
        Outside the network (totals, encoding, writing): of a mapped cell and year, and of a shard and year whatever is mapped.
    read
        Of a fine cell of a static map.
    hands
        Blocks that a worker works on at the same time.
    turns
        Whether they use the network one at a time, as on a CUDA device.
    about
        Origin of the rates.
    cell
        Bytes of a mapped cell and year in a finished cube, if they were measured.
    """

    step: float
    scored: float
    forward: float
    host: float
    shard: float
    read: float
    hands: int
    turns: bool
    about: str
    cell: float | None = None


@dataclass(frozen=True)
class Device:
    """A stated device.

    Attributes
    ----------
    predicts, trains
        Operations a second that convolutions reach in bfloat16.
    memory
        Its own and its share of the node's.
    cores
        Its share of the node's.
    """

    predicts: float
    trains: float
    memory: Memory
    cores: int


DEVICES = {
    "h100": Device(200e12, 150e12, Memory(128e9, 64e9), 20),
    "a100": Device(120e12, 90e12, Memory(120e9, 40e9), 16),
}
"""Estimates: a fifth to two fifths of the matrix peak. Not measured; ``benchmarks/gpu.py`` measures."""
_LAUNCH = 0.02
"""Minimum seconds of a training step on a stated device, which launches some hundred kernels."""
HOST, READ = 0.1e-6, 0.15e-6
"""Seconds of one CPU core for a cell, year and class outside the network, and for a static cell read, with a stated device: of the benchmark and of Bavaria here."""


def static_channels(run: RunConfig) -> int:
    """Count the static channels: those of the model if it exists; else a categorical map counts as ``CODES``."""
    if (run.folder / "model.json").is_file():
        return len(load_card(run.folder).spec.static_names)
    return sum(CODES if layer.categorical else 1 for layer in run.static)


def network_of(run: RunConfig) -> UNet:
    """Make the network of a run on the meta device, with one coarse channel, as coarse states cost next to nothing."""
    settings = run.model.model_dump()
    with torch.device("meta"):
        return UNet(
            static_channels=static_channels(run),
            coarse_channels=1,
            classes=Inputs.of(run).legend.n,
            factor=run.grid.factor,
            **settings,
        )


def operations(run: RunConfig) -> float:
    """Count the operations per fine cell of one network's convolutions."""
    net = network_of(run)
    side = 8 * net.stride
    with FlopCounterMode(display=False) as counter:
        net.head(net.trunk(torch.empty(1, net.inputs, side, side, device="meta")))
    return float(counter.get_total_flops()) / side**2


def count(run: RunConfig, *, land: float = 1.0, cuda: bool = False) -> Work:
    """Count the whole work of a run, done or not.

    Parameters
    ----------
    run
        The configuration.
    land
        Share of the shards with cells to map; used until a store with a mask exists.
    cuda
        Whether the network is on a CUDA device.
    """
    grid, net = Inputs.of(run).grid, network_of(run)
    store = run.folder / "store.zarr"
    source = Source(store) if (store / "zarr.json").is_file() else None
    passes: list[float] = []
    walked: list[float] = []
    walks: list[float] = []
    read: list[float] = []
    mapped, size, objects = 0.0, 0.0, 0
    for _, reference, years in cubes_of(run).values():
        every: list[tuple[float, float, tuple[int, ...]]] = []
        if source is None:
            shards = max(1, round(land * len(grid.shards())))
            parts = sides_of(years, reference=reference, years_a_shard=run.reconstruct.years_a_shard)
            every = [(float(grid.shard**2), 1.0, tuple(y for g in part for y in g)) for part in parts] * shards
        else:
            blocks = plan_blocks(store, years=years, reference=reference, years_a_shard=run.reconstruct.years_a_shard)
            every = [(*_extent(source, b.window, net.stride), b.years) for b in blocks]
        for cells, share, kept in every:
            steps = len(kept)
            if reference is not None and run.constrain.method != "none":
                ends = [side[-1] for side in sides(kept, reference)]
                held = range(min(reference, *ends), max(reference, *ends) + 1) if source is None else source.years
                steps = sum(len(years_between(held, reference, last)) for last in ends)
            seen = (math.sqrt(cells) + 2 * net.halo) ** 2
            passes.append(run.train.members * steps * seen)
            walked.append(steps * share * grid.shard**2)
            walks.append(steps)
            read.append(len(run.static) * seen)
            mapped += len(kept) * share * grid.shard**2
            size += CELL_BYTES[reference is not None] * len(kept) * share * grid.shard**2
            objects += objects_of(grid.shard, kept, years, run.reconstruct.years_a_shard)
    t = run.train
    observed = len(needed_years(run)[0])
    return Work(
        passes=np.array(passes),
        walked=np.array(walked),
        years=np.array(walks, dtype=np.float64),
        read=np.array(read),
        mapped=mapped,
        steps=t.members * t.steps,
        scored=t.members * (1 + -(-t.steps // t.validate_every)) * t.validation_batches,
        objects=objects,
        store=grid.shape[0] * grid.shape[1] * (STATIC_BYTES * len(run.static) + MAP_BYTES * observed),
        cubes=size,
        worker=worker_memory(run, net, cuda=cuda),
        training=training_memory(run, net, observed),
    )


def objects_of(shard: int, kept: Iterable[int], years: list[int], years_a_shard: int) -> int:
    """Count the objects of a shard of a cube over some of its years, overviews included."""
    (deep, flat), times = depths(len(years), years_a_shard), [years.index(y) for y in kept]
    return (len(VARIABLES) - 1 + len(level_factors(shard))) * len({t // deep for t in times}) + len({t // flat for t in times})


def _extent(source: Source, window: Window, stride: int) -> tuple[float, float]:
    """Fine cells of the part of a shard that is predicted, and the share of its cells that is mapped."""
    mask = np.asarray(source.mask[window.slices], dtype=bool)
    part = mapped_part(mask, window, stride)
    return float(part.height * part.width), float(mask.mean())


def worker_memory(run: RunConfig, net: UNet, *, cuda: bool = False) -> Memory:
    """Estimate a worker's peak memory; on CUDA in bfloat16, one block at a time in the network (docs/performance.md)."""
    r, shard, k, channels = run.reconstruct, run.grid.shard, net.classes, static_channels(run)
    window = (shard + 2 * net.halo) ** 2
    hands = (r.at_once or 2) if cuda else r.hands
    years = min(r.years_a_shard, len(r.years))  # that wait for the others of their shard
    held = hands * (window * (4 * len(run.static) + 2 * channels) + shard**2 * (28 * k + 16 + 4 * years))
    inputs = window * run.train.members * net.inputs
    passing = window * (4.5 * run.model.base + run.model.coarse_features + 2 * k)
    device = 2 * (hands * inputs + passing) if cuda else 4 * hands * (inputs + passing)
    return Memory(PROCESS_BYTES + held, device)


def training_memory(run: RunConfig, net: UNet, years: int) -> Memory:
    """Estimate the peak memory of training: queued shards and batches, activations and gradients."""
    t, shard, channels = run.train, run.grid.shard, static_channels(run)
    tiles = min(max(16, t.mix) + t.mix, len(Inputs.of(run).grid.shards())) * shard**2 * (2 * channels + years + 2)
    reading, cells = 2 * shard**2 * 16 * len(run.static), t.batch * t.patch**2
    host = PROCESS_BYTES + tiles + reading + 6 * cells * (2 * channels + 2)
    return Memory(host, 4 * cells * (2 * net.inputs + 26 * run.model.base + 4 * net.classes))


def figures_memory(run: RunConfig) -> float:
    """Estimate the bytes for drawing: the libraries and the canvas of the thinned map (docs/performance.md, Memory)."""
    shape = Inputs.of(run).grid.shape
    return PROCESS_BYTES + 1e8 + 75.0 * math.prod(size / step_of(shape) for size in shape)


def scoring_memory(run: RunConfig) -> float:
    """Bytes that scoring one shard at a time, half of it mapped, and then drawing hold (docs/performance.md, Memory)."""
    return max(PROCESS_BYTES + 1e8 + 50.0 * run.grid.shard**2, figures_memory(run))


def rates_of(run: RunConfig, device: str) -> Rates:
    """Return the rates of one stated device with its share of the cores.

    Raises
    ------
    ConfigError
        If the device is not known.
    """
    if device not in DEVICES:
        raise ConfigError(f"device is {device!r}, expected one of {sorted(DEVICES)}; or measure this machine with --calibrate")
    d, t, each, hands = DEVICES[device], run.train, operations(run), run.reconstruct.at_once or 2
    forward = each * t.batch * t.patch**2 / d.predicts
    return Rates(
        step=max(_LAUNCH, 3 * each * t.batch * t.patch**2 / d.trains),
        scored=forward,
        forward=each / d.predicts,
        host=HOST * Inputs.of(run).legend.n,
        shard=0.0,
        read=READ,
        hands=min(d.cores, hands),
        turns=True,
        about=f"estimates for {device}: {d.predicts / 1e12:.0f} TFLOP/s, {d.cores} cores each, {hands} blocks in hand",
    )


@dataclass(frozen=True)
class Cost:
    """Seconds of the stages, and the share of the workers' time in which the network runs."""

    train: float
    reconstruct: float
    network: float
    workers: int
    trainers: int = 1

    @property
    def device_hours(self) -> float:
        """Hours of all devices."""
        return (self.train * self.trainers + self.reconstruct * self.workers) / 3600


def estimate(work: Work, rates: Rates, *, workers: int, trainers: int = 1) -> Cost:
    """Estimate the time of the stages; training is assumed to scale perfectly with ``trainers``.

    A block takes the time of the network plus host work, divided by the blocks in flight per worker; if blocks take turns in the
    network, the longer of the network time and host work per block in flight. A run lasts at least as long as its longest block.
    """
    network = work.passes * rates.forward
    host = work.walked * rates.host + work.years * rates.shard + work.read * rates.read
    each = np.maximum(network, host / rates.hands) if rates.turns else (network + host) / rates.hands
    longest = float((network + host).max(initial=0.0))
    total = max(float(each.sum()) / workers, longest)
    return Cost(
        train=(work.steps * rates.step + work.scored * rates.scored) / trainers,
        reconstruct=START + total,
        network=float(network.sum()) / max(total * workers, 1e-9),
        workers=workers,
        trainers=trainers,
    )


def _too_much(what: str, needs: float, has: float, who: str, remedy: str) -> list[str]:
    if needs <= has:
        return []
    return [f"{what} needs {needs / 1e9:.1f} GB of memory, {who} has {has / 1e9:.1f} GB; {remedy}"]


def refusals(work: Work, *, workers: int, memory: float | Memory, who: str = "the machine", trainers: int = 1) -> list[str]:
    """List what does not fit into the memory, each with what would help.

    Parameters
    ----------
    workers, trainers
        Processes that share the memory in reconstruction and in training; each trainer holds its own shards and part of the batch.
    memory
        Bytes of the machine, or of a device and its share of a node; ``who`` names it.
    """
    found: list[str] = []
    training = Memory(work.training.host, work.training.device / max(1, trainers))
    for what, needs, count, remedy in (
        ("reconstruct", work.worker, workers, "lower reconstruct.workers, reconstruct.at_once or grid.shard"),
        (
            "train",
            training,
            trainers,
            "lower train.batch, train.patch, train.mix, model.base or grid.shard, or the number of workers",
        ),
    ):
        name = f"{what} with {count} workers" if count > 1 else what
        if isinstance(memory, Memory):
            found += _too_much(f"{name} on the host", needs.host * count, memory.host, who, remedy)
            found += _too_much(f"{name} on the device", needs.device * count, memory.device, who, remedy)
        else:
            found += _too_much(name, needs.both * count, memory, who, remedy)
    return found


def _lacking(run: RunConfig, work: Work) -> list[str]:
    """Report whether the disk is too small; files that the run has already written count as free."""
    folder = run.folder.absolute()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(there).free
    elsewhere = run.reconstruct.cube is not None and folder_of(run.reconstruct.cube) is None
    need = work.store + (0 if elsewhere else work.cubes)
    # A large cube has hundreds of thousands of files: they are looked at only where it matters.
    held = 0 if need <= free else _size_of(folder)
    if need <= free + held:
        return []
    return [
        f"store and cubes need {need / 1e9:.1f} GB of disk, {there} has {(free + held) / 1e9:.1f} GB; "
        "map fewer years, or set runs to another disk"
    ]


def _size_of(folder: Path) -> int:
    """Add up the sizes of the files below a folder; files that vanish meanwhile count as nothing."""
    size = 0
    for inner, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += Path(inner, name).stat().st_size
    return size


def refuse(run: RunConfig, *, workers: int | None = None, land: float = 1.0, device: str | None = None) -> None:
    """Refuse a run that cannot fit on this machine, or on a stated device, before it begins.

    Raises
    ------
    ConfigError
        With every reason.
    """
    work = count(run, land=land, cuda=device is not None)
    if device is None:
        # Workers of another cluster do not share this machine's memory.
        here, trainers = (workers or run.reconstruct.workers, run.train.workers) if run.cluster == "local" else (0, 0)
        found = refusals(work, workers=here, memory=MEMORY_LIMIT, trainers=trainers) + _lacking(run, work)
    else:
        found = refusals(work, workers=1, memory=DEVICES[device].memory, who=device)
    if found:
        raise ConfigError("run cannot fit: " + "; ".join(found))
