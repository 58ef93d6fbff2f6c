"""The training of a run: in this process, in a process group that torchrun started, or on the workers of a Dask cluster.

It looks whether the model is there and is that of this configuration, and goes on where a training was stopped. What is the same for all
processes is made once (:class:`Lesson`); :func:`learn` is what each of them does.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
import yaml
from dask.system import CPU_COUNT
from numpy.typing import NDArray

from ai4land.digests import digest
from ai4land.errors import ConfigError, MismatchError
from ai4land.grid import Grid
from ai4land.legend import Legend
from ai4land.model import device
from ai4land.model.checkpoint import Card, load_card, load_state, save_model
from ai4land.model.ensemble import Ensemble
from ai4land.model.features import FeatureSpec
from ai4land.model.norm import ALONE, Group
from ai4land.model.unet import UNet
from ai4land.run.align import align
from ai4land.run.config import HOW_TRAINED, RunConfig
from ai4land.run.hold import hold
from ai4land.run.inputs import Inputs, Tell
from ai4land.store.contents import contents_of
from ai4land.store.read import open_store
from ai4land.train.batch import PatchLoader
from ai4land.train.gang import Member, gang
from ai4land.train.group import TORCHRUN, torchrun_group
from ai4land.train.loop import Schedule, Trained, fit
from ai4land.train.losses import class_weights
from ai4land.train.normalise import fit_spec, trained, training_tiles
from ai4land.train.splits import TRAIN, VALIDATION, Split
from ai4land.train.validation import fit_sharpness, gate
from ai4land.workers.slurm import job_end

_log = logging.getLogger(__name__)

Progress = Callable[[int, dict[str, float]], None]

_SEEDS_APART = 1000
"""Difference between the seeds of consecutive members."""


@dataclass(frozen=True)
class Lesson:
    """What all processes of a training share: fingerprint, identity of the store, grid, legend, split, normalisation and class weights."""

    fingerprint: str
    store: str
    grid: Grid
    legend: Legend
    split: Split
    spec: FeatureSpec
    weights: NDArray[np.float32]


def train(run: RunConfig, *, tell: Tell = _log.info, progress: Progress | None = None) -> Path:
    """Train the model of a run unless it exists, resuming a training that stopped.

    Raises
    ------
    MismatchError
        If the folder holds a training of another configuration, or another process is using it.
    Unfinished
        If the SLURM job of this process is about to end; call again to resume.
    """
    with hold(run.folder):
        _train(run, tell, progress)
    return run.folder


def _train(run: RunConfig, tell: Tell, progress: Progress | None) -> None:
    inputs = Inputs.of(run)
    if TORCHRUN in os.environ:
        with torchrun_group(timeout=run.train.timeout) as group:
            leads = group.rank == 0
            group.first(partial(_prepare, inputs, tell))
            if not _trained(run, fingerprint_of(inputs, inputs.split.hash)):
                beside = int(os.environ["LOCAL_WORLD_SIZE"])
                learn(run, _lesson(inputs, tell if leads else _log.info), group=group, beside=beside, progress=progress)
    elif not _prepare(inputs, tell):
        lesson = _lesson(inputs, tell)
        if run.cluster == "local" and run.train.workers == 1:
            learn(run, lesson, progress=progress)
            device.release()  # leave the device to the workers of the reconstruction
        else:
            _on_workers(run, lesson, tell=tell, progress=progress)
        tell(f"trained; sharpness {load_card(run.folder).sharpness:.3f} on validation")


def _prepare(inputs: Inputs, tell: Tell) -> bool:
    """Prepare the inputs of training and return whether the model exists already."""
    run, split = inputs.run, inputs.split
    align(run, tell=tell)
    if _trained(run, fingerprint_of(inputs, split.hash)):
        return True
    run.save(run.folder / "config.yaml")
    split.save(run.folder / "splits.json")
    return False


def _lesson(inputs: Inputs, tell: Tell) -> Lesson:
    """Derive normalisation and class weights from the training data."""
    run, grid, split = inputs.run, inputs.grid, inputs.split
    store = open_store(run.folder / "store.zarr")
    legend = Legend(**store.attrs["legend"])
    spec = fit_spec(
        store,
        cells=split.roles == TRAIN,
        pairs=split.pairs,
        codes=legend.codes.tolist(),
        factor=grid.factor,
        position=run.train.position,
    )
    weights = class_weights(_class_counts(store, split, legend, grid), power=run.train.class_balance)
    lesson = Lesson(fingerprint_of(inputs, split.hash), digest(inputs.identity), grid, legend, split, spec, weights)
    size, t = sum(p.numel() for p in _network(run, lesson).parameters()), run.train
    tell(
        f"training: {t.members} network{'s' * (t.members > 1)} of {size:,} parameters, {len(split.pairs)} pairs of years, {t.steps} steps each"
    )
    return lesson


def _network(run: RunConfig, lesson: Lesson) -> UNet:
    """Make an untrained network."""
    channels = {"static_channels": len(lesson.spec.static_names), "coarse_channels": len(lesson.spec.coarse_names)}
    return UNet(**channels, classes=lesson.legend.n, factor=lesson.grid.factor, **run.model.model_dump())


def _on_workers(run: RunConfig, lesson: Lesson, *, tell: Tell, progress: Progress | None) -> None:
    """Train on the workers of a cluster."""
    from ai4land.run.cost import network_of, training_memory
    from ai4land.workers.cluster import connect
    from ai4land.workers.slurm import cores_of_worker

    t = run.train
    memory = training_memory(run, network_of(run), len(lesson.split.training_years)).both
    cores = t.threads or max(1, CPU_COUNT // t.workers)
    where: dict[str, Any] = {"runs": str(Path(run.runs).absolute())}
    if run.cluster == "slurm" and t.threads is None:
        cores = cores_of_worker(cores)
        where["train"] = t.model_copy(update={"threads": cores})
    here = run.model_copy(update=where)

    def look() -> None:
        if progress is not None and (seen := _steps(run)) is not None:
            progress(*seen)

    shape: dict[str, Any] = {"workers": t.workers, "threads": 1, "cores": cores, "memory": memory, "lasting": True}
    with connect(run.cluster, **shape, folder=run.folder, tell=tell) as client:
        gang(
            client,
            partial(_take_part, run=here, lesson=lesson),
            workers=t.workers,
            timeout=t.timeout,
            patience=t.wait,
            state=partial(_states, run.folder),
            tell=tell,
            look=look,
        )


def _take_part(member: Member, *, run: RunConfig, lesson: Lesson) -> None:
    """Train as one member of a generation; the task of a worker."""
    with member.joined() as group:
        learn(run, lesson, group=group, beside=member.beside)


def _states(folder: Path) -> list[tuple[str, int]]:
    """List the saved states of a training with their modification times."""
    files = [folder / "resume.pt", *sorted(folder.glob("member_*/resume.pt"))]
    return [(str(f), f.stat().st_mtime_ns) for f in files if f.is_file()]


def _steps(run: RunConfig) -> tuple[int, dict[str, float]] | None:
    """Read the steps taken by all members and the latest row of metrics."""
    taken, row = 0, None
    for number in range(run.train.members):
        path = _member_folder(run, number) / "metrics.jsonl"
        lines = path.read_bytes().splitlines()[-2:] if path.is_file() else []
        for line in reversed(lines):
            try:
                found = json.loads(line)
            except json.JSONDecodeError:  # still being written
                continue
            taken += found["step"]
            row = found if "loss" in found else row
            break
    return None if row is None else (taken, row)


def _member_folder(run: RunConfig, number: int) -> Path:
    return run.folder / f"member_{number + 1}" if number else run.folder


def learn(run: RunConfig, lesson: Lesson, *, group: Group = ALONE, beside: int = 1, progress: Progress | None = None) -> None:
    """Train all members as one process of a group, ``beside`` of which run on this machine; the first saves the model."""
    t, grid, legend, spec, split = run.train, lesson.grid, lesson.legend, lesson.spec, lesson.split
    if group.world > t.batch:
        raise ConfigError(
            f"{group.world} processes train, expected at most train.batch={t.batch}: each takes a part of every batch"
        )
    torch.set_num_threads(t.threads or max(1, CPU_COUNT // beside))
    ends = job_end()
    load = partial(
        PatchLoader,
        partial(open_store, run.folder / "store.zarr"),
        grid=grid,
        legend=legend,
        spec=spec,
        patch=t.patch,
        batch=t.batch,
        mix=t.mix,
    )
    own = partial(load, rank=group.rank, world=group.world)
    seen: dict[str, Any] = {"mask_all": t.mask_all, "mask_some": t.mask_some, "disturb": t.disturb, "focus": t.focus}
    held = _validation_batches(own, split, t.validation_batches, seen)
    members: list[UNet] = []
    fits: list[Trained] = []
    for number in range(t.members):
        seed = t.seed + run.seed + _SEEDS_APART * number
        torch.manual_seed(seed)
        model = _network(run, lesson)
        done = fit(
            model,
            batches=own(cells=split.roles == TRAIN, pairs=split.pairs, seed=seed, turn=t.turn, **seen).batches,
            validation=held,
            weights=torch.from_numpy(lesson.weights),
            schedule=Schedule(**{k: v for k, v in t.model_dump().items() if k in Schedule.__dataclass_fields__}),
            folder=_member_folder(run, number),
            fingerprint=lesson.fingerprint,
            group=group,
            until=None if ends is None else ends - t.leave,
            progress=None if progress is None else partial(_onward, progress, number * t.steps),
        )
        model.load_state_dict(done.weights)
        members.append(model.cpu())
        fits.append(done)
    if group.rank:
        return
    ensemble = Ensemble(members)
    even = _validation_batches(load, split, t.validation_batches, {**seen, "focus": 0.0})
    sharpness = fit_sharpness(ensemble, even, totals=t.totals_share > 0)
    save_model(
        run.folder,
        [f.weights for f in fits],
        Card(
            legend=legend,
            spec=spec,
            network=ensemble.settings,
            sharpness=sharpness,
            bfloat16=gate(ensemble, even, totals=t.totals_share > 0),
            cell=(float(grid.fine.affine.a), float(-grid.fine.affine.e)),
            weights="",
            split=split.hash,
            store=lesson.store,
            training={
                "fingerprint": lesson.fingerprint,
                "steps": [f.steps for f in fits],
                "best_step": [f.best_step for f in fits],
                "untrained_members": [number for number, f in enumerate(fits) if not f.best_step],
                "validation_loss": [f.best_loss for f in fits],
                "years": split.training_years,
                "class_weights": [round(float(w), 5) for w in lesson.weights],
                "receptive_radius": ensemble.receptive_radius,
            },
        ),
    )


def _onward(progress: Callable[[int, dict[str, float]], None], done: int, step: int, row: dict[str, float]) -> None:
    """Report a step, counted on from those of the earlier members."""
    progress(done + step, row)


def fingerprint_of(inputs: Inputs, split: str) -> str:
    """Hash all that shapes the weights, including the aligned data but not the settings in ``HOW_TRAINED``."""
    run = inputs.run
    fit = run.model_dump(mode="json", include={"model", "train", "seed"}, exclude={"train": HOW_TRAINED})
    return digest({**inputs.identity, "contents": _seen(run), "split": split, "fit": digest(fit)})


def _seen(run: RunConfig) -> str:
    """Hash the parts of the store that training and validation read."""
    years = set(run.split.train)
    if run.split.validation is not None:
        reference = run.split.validation.reference
        years |= {*run.split.validation.years} | ({reference} if reference is not None else set())
    return contents_of(run.folder / "store.zarr", maps=years, states=years)


def _trained(run: RunConfig, fingerprint: str) -> bool:
    """Return whether the model exists; refuse to replace a model or a training of another configuration."""
    folder = run.folder
    states = [folder / "resume.pt", *sorted(folder.glob("member_*/resume.pt"))]
    found = str(load_card(folder).training.get("fingerprint")) if (folder / "model.json").is_file() else None
    if found == fingerprint:
        return True
    begun = {str(load_state(state)["fingerprint"]) for state in states if state.is_file()}
    if found is not None or begun - {fingerprint}:
        raise MismatchError(
            f"training in {folder} was begun with another configuration ({_differences(run)}); restore the run file, "
            "choose another name, or delete model.json, resume.pt, the folders member_* and the cubes to train anew"
        )
    return False


def _differences(run: RunConfig) -> str:
    """List the settings that differ from those the training began with."""
    try:
        before = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
        now = run.model_dump(mode="json")
        pairs = {
            name: (before[name], now[name])
            for name in ("grid", "landcover", "scenario", "static", "split", "model", "train", "seed")
        }
    except (OSError, yaml.YAMLError, TypeError, KeyError):
        return "it has no config.yaml that tells which"
    lines = []
    for name, (old, new) in pairs.items():
        parts = {f"{name}.{k}": (old.get(k), new[k]) for k in new} if isinstance(new, dict) else {name: (old, new)}
        told = [key for key, (a, b) in parts.items() if a != b and key.removeprefix("train.") not in HOW_TRAINED]
        lines += [f"{key} is {parts[key][1]!r:.60}, was {parts[key][0]!r:.60}" for key in told]
    return "; ".join(lines) or "the settings are the same; the package, the split or what the inputs hold is not"


def _validation_batches(load: Any, split: Split, count: int, seen: dict[str, Any]) -> list[Any]:
    """Load the batches for early stopping: validation years, else held-out cells of training years with masking."""
    cells = split.cells(VALIDATION)
    if split.validation is not None:
        base = split.validation.reference
        pairs = tuple((year if base is None else base, year) for year in split.validation.years)
        return list(
            load(cells=cells, pairs=pairs, seed=1_000_003, mask_all=float(base is None), focus=seen["focus"]).batches(0, count)
        )
    return list(load(cells=cells, pairs=split.pairs, seed=1_000_003, **seen).batches(0, count))


def _class_counts(store: xr.Dataset, split: Split, legend: Legend, grid: Grid) -> NDArray[np.int64]:
    cells, counts = split.roles == TRAIN, np.zeros(256, dtype=np.int64)
    for w in training_tiles(store, cells, grid.factor):
        inside = trained(store, w, cells, grid.factor)
        for year in sorted({year for _, year in split.pairs}):
            codes = store["land_cover"].sel(observed_year=year)[w.slices].values[inside]
            counts += np.bincount(legend.encode(codes), minlength=256)
    return counts[: legend.n]
