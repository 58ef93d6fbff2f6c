"""The stages that compute: training and reconstruction, from a run's configuration to calls of what does the work.

Each stage looks whether its result is there and is that of this configuration, and does only what is missing. This is
the last place that knows configuration objects: what it calls takes plain values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
import yaml
from dask.system import CPU_COUNT
from numpy.typing import NDArray

from ai4land import cube
from ai4land.align import open_store
from ai4land.batch import PatchLoader
from ai4land.checkpoint import Card, check_fits, load_card, load_model, load_state, save_model
from ai4land.config import RunConfig, digest
from ai4land.ensemble import Ensemble, fit_sharpness
from ai4land.errors import MismatchError
from ai4land.features import fit_spec
from ai4land.forward import Precision, gate, precision_of
from ai4land.grid import Grid
from ai4land.inputs import Tell, align, crosswalk_of, cubes_of, grid_of, identity_of, legend_of, split_of
from ai4land.legend import Legend
from ai4land.losses import class_weights
from ai4land.predict import Source
from ai4land.reconstruct import Job, plan_blocks, run_blocks
from ai4land.splits import TRAIN, VALIDATION, Split
from ai4land.totals import STATEMENTS, Method
from ai4land.train import Schedule, Trained, fit
from ai4land.unet import UNet

_log = logging.getLogger(__name__)

_SEEDS_APART = 1000
"""Between the seeds of two members."""


def train(run: RunConfig, *, tell: Tell = _log.info, progress: Callable[[int, dict[str, float]], None] | None = None) -> Path:
    """Train the model of a run, if it is not there; go on where a killed training stopped."""
    store_path = align(run, tell=tell)
    grid = grid_of(run)
    split = split_of(run, grid)
    fingerprint = _fingerprint(run, split.hash)
    if _trained(run, fingerprint):
        return run.folder
    run.save(run.folder / "config.yaml")
    split.save(run.folder / "splits.json")
    t = run.train
    torch.set_num_threads(t.threads or CPU_COUNT)
    store = open_store(store_path)
    legend = Legend(**store.attrs["legend"])
    codes = legend.codes.tolist()
    spec = fit_spec(
        store, cells=split.roles == TRAIN, pairs=split.pairs, codes=codes, factor=grid.factor, position=run.train.position
    )
    load = partial(
        PatchLoader, partial(open_store, store_path), grid=grid, legend=legend, spec=spec, patch=t.patch, batch=t.batch, mix=t.mix
    )
    seen: dict[str, Any] = {"mask_all": t.mask_all, "mask_some": t.mask_some, "disturb": t.disturb, "focus": t.focus}
    held = _validation_batches(load, split, t.validation_batches, seen)
    weights = class_weights(_class_counts(store, split, legend, grid), power=t.class_balance)
    members: list[UNet] = []
    fits: list[Trained] = []
    for number in range(t.members):
        seed = t.seed + run.seed + _SEEDS_APART * number
        torch.manual_seed(seed)
        model = UNet(
            static_channels=len(spec.static_names),
            coarse_channels=len(spec.coarse_names),
            classes=legend.n,
            factor=grid.factor,
            **run.model.model_dump(),
        )
        size = sum(p.numel() for p in model.parameters())
        tell(
            f"training member {number + 1} of {t.members}: {size:,} parameters, {len(split.pairs)} pairs of years, {t.steps} steps"
        )
        done = fit(
            model,
            batches=load(cells=split.roles == TRAIN, pairs=split.pairs, seed=seed, turn=t.turn, **seen).batches,
            validation=held,
            weights=torch.from_numpy(weights),
            schedule=Schedule(**{k: v for k, v in t.model_dump().items() if k in Schedule.__dataclass_fields__}),
            folder=run.folder / f"member_{number + 1}" if number else run.folder,
            fingerprint=fingerprint,
            progress=None if progress is None else partial(_onward, progress, number * t.steps),
        )
        model.load_state_dict(done.weights)
        members.append(model.cpu())
        fits.append(done)
    ensemble = Ensemble(members)
    even = _validation_batches(load, split, t.validation_batches, {**seen, "focus": 0.0})
    sharpness = fit_sharpness(ensemble, even, totals=t.totals_share > 0)
    tell(f"sharpness {sharpness:.3f} on validation")
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
            store=digest(identity_of(run)),
            training={
                "fingerprint": fingerprint,
                "steps": [f.steps for f in fits],
                "best_step": [f.best_step for f in fits],
                "validation_loss": [f.best_loss for f in fits],
                "years": split.training_years,
                "class_weights": [round(float(w), 5) for w in weights],
                "receptive_radius": ensemble.receptive_radius,
            },
        ),
    )
    return run.folder


def _onward(progress: Callable[[int, dict[str, float]], None], done: int, step: int, row: dict[str, float]) -> None:
    """Report a step of a later member as one after those of the members before."""
    progress(done + step, row)


def _fingerprint(run: RunConfig, split: str) -> str:
    """Hash all that shapes the weights."""
    return digest({**identity_of(run), "split": split, "fit": run.fingerprint("model", "train", "seed")})


def _trained(run: RunConfig, fingerprint: str) -> bool:
    """Tell whether the model of a run is there; refuse to replace a model or a training of another configuration."""
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
    """List the settings that are not those that the folder's training was begun with."""
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
        lines += [f"{key} is {b!r:.60}, was {a!r:.60}" for key, (a, b) in parts.items() if a != b]
    return "; ".join(lines) or "the settings are the same, the package or the split is not"


def _validation_batches(load: Any, split: Split, count: int, seen: dict[str, Any]) -> list[Any]:
    """Batches that decide when to stop: the validation years, or held-out cells of the training years with holes."""
    cells = split.cells(VALIDATION)
    if split.validation is not None:
        base = split.validation.reference
        pairs = tuple((year if base is None else base, year) for year in split.validation.years)
        return list(
            load(cells=cells, pairs=pairs, seed=1_000_003, mask_all=float(base is None), focus=seen["focus"]).batches(0, count)
        )
    return list(load(cells=cells, pairs=split.pairs, seed=1_000_003, **seen).batches(0, count))


def _class_counts(store: xr.Dataset, split: Split, legend: Legend, grid: Grid) -> NDArray[np.int64]:
    cells = store["mask"].values.astype(bool) & np.kron(split.roles == TRAIN, np.ones((grid.factor, grid.factor), dtype=bool))
    counts = np.zeros(256, dtype=np.int64)
    for year in sorted({year for _, year in split.pairs}):
        counts += np.bincount(legend.encode(store["land_cover"].sel(observed_year=year).values[cells]), minlength=256)
    return counts[: legend.n]


# -- reconstruct --------------------------------------------------------------------------------------------------------


def reconstruct(run: RunConfig, *, tell: Tell = _log.info, progress: Callable[[int, int], None] | None = None) -> Path:
    """Make the cubes of a run; blocks that the ledger has are not done again."""
    from ai4land.cluster import connect
    from ai4land.cost import network_of, worker_memory

    _, card = load_model(run.folder)
    fits = partial(check_fits, card, legend=legend_of(run), feature_names=[s.name for s in run.static], factor=run.grid.factor)
    fits(states=list(card.spec.states))
    store_path = align(run, tell=tell)
    source = Source(store_path)
    fits(states=[str(s) for s in open_store(store_path)["state"].values])
    r = run.reconstruct
    precision = precision_of(card) if r.precision == "auto" else r.precision
    work: list[tuple[Path, list[cube.Block], Job]] = []
    for name, (path, reference, years) in cubes_of(run).items():
        identity = {
            "model": card.weights,
            "sharpness": card.sharpness,
            "store": digest(identity_of(run)),
            "reference": reference,
            "constrain": run.constrain.model_dump(mode="json"),
            "precision": precision,
        }
        cube.create(
            path,
            grid=source.grid,
            legend=source.legend,
            years=years,
            identity=identity,
            title=run.title or run.name,
            source=f"ai4land {card.version}, model {card.weights[:16]}, reference map {reference}; legend: {source.legend.title}",
            totals=STATEMENTS[method_of(run, reference)],
        )
        blocks = plan_blocks(store_path, years=years, reference=reference, done=cube.recorded(path))
        origin = "without a reference map" if reference is None else f"from the map of {reference}"
        tell(f"{name}: {len(blocks)} blocks to do, years {years[0]}-{years[-1]} {origin}")
        job = job_of(
            run, source, cube_path=path, reference=reference, checksum=card.weights, threads=r.cores, precision=precision
        )
        work.append((path, blocks, job))
    total = sum(len(blocks) for _, blocks, _ in work)
    count = 0

    def step(_: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if progress is not None:
            progress(count, total)

    if total:
        memory = worker_memory(run, network_of(run)).both
        with connect(
            run.cluster, workers=r.workers, threads=r.hands, cores=r.cores, memory=memory, folder=run.folder, tell=tell
        ) as client:
            for _, blocks, job in work:
                run_blocks(blocks, job, client=client, progress=step)
    for path, _, _ in work:
        for left in path.glob("*/c/**/*.partial"):
            left.unlink()
        cube.finish(path)
    if card.training.get("fingerprint") == _fingerprint(run, card.split):
        run.save(run.folder / "config.yaml")
    return run.folder / "cube.zarr"


def method_of(run: RunConfig, reference: int | None) -> Method:
    """How the totals are imposed: without a reference map there is no level to put a change on."""
    return "level" if reference is None and run.constrain.method == "change" else run.constrain.method


def job_of(
    run: RunConfig,
    source: Source,
    *,
    cube_path: Path,
    reference: int | None,
    checksum: str = "",
    threads: int = 1,
    precision: Precision = "float32",
) -> Job:
    """Put together what the tasks of a reconstruction share."""
    c = run.constrain
    return Job(
        store=str(run.folder / "store.zarr"),
        cube=str(cube_path),
        model=str(run.folder),
        checksum=checksum,
        reference=reference,
        threads=threads,
        crosswalk=crosswalk_of(run, source.legend),
        precision=precision,
        method=method_of(run, reference),
        weights=run.scenario.weights,
        keep=c.keep,
        settle=c.settle,
        lock=tuple(c.lock),
        protected=c.protected,
    )
