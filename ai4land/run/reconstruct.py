"""The reconstruction stage: from a run's configuration to blocks on a cluster.

Reuses a result that exists and matches the configuration, and computes only what is missing. It passes plain values down.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ai4land.constrain.totals import STATEMENTS, Method
from ai4land.cube import cube, ledger
from ai4land.cube.claim import claim
from ai4land.cube.verify import Damage, strike, verify
from ai4land.digests import digest
from ai4land.errors import ConfigError, DataError
from ai4land.model.checkpoint import check_fits, load_model
from ai4land.model.forward import Precision, precision_of
from ai4land.places import Place, folder_of
from ai4land.reconstruct.block import BlockSettings
from ai4land.reconstruct.blocks import run_blocks
from ai4land.reconstruct.plan import land_of, plan_blocks
from ai4land.run.align import align
from ai4land.run.config import RunConfig
from ai4land.run.file import load_run
from ai4land.run.hold import hold
from ai4land.run.inputs import Inputs, Tell, cubes_of
from ai4land.run.train import fingerprint_of
from ai4land.sources import known
from ai4land.store.contents import held_of
from ai4land.store.read import Source, open_store

_log = logging.getLogger(__name__)


def reconstruct(run: RunConfig, *, tell: Tell = _log.info, progress: Callable[[int, int], None] | None = None) -> Place:
    """Make the cubes of a run, skipping blocks that the ledger records as done.

    Returns
    -------
    path or URL
        Of the published cube.

    Raises
    ------
    MismatchError
        If a cube belongs to another run or is being made by one, or another process is using the folder.
    """
    load_model(run.folder)
    with hold(run.folder), ExitStack() as claims:
        return _reconstruct(run, claims, {}, tell, progress)


def _reconstruct(
    run: RunConfig, claims: ExitStack, tokens: dict[Place, str], tell: Tell, progress: Callable[[int, int], None] | None
) -> Place:
    """Make the cubes; ``tokens`` belong to the claims that the caller already holds."""
    from ai4land.run.cost import network_of, worker_memory
    from ai4land.workers.cluster import connect
    from ai4land.workers.slurm import cores_of_worker

    inputs = Inputs.of(run)
    _, card = load_model(run.folder)
    fits = partial(check_fits, card, legend=inputs.legend, feature_names=[s.name for s in run.static], factor=run.grid.factor)
    fits(states=list(card.spec.states))
    store_path = align(run, tell=tell)
    source = Source(store_path)
    if "fingerprint" in card.training and card.training["fingerprint"] != fingerprint_of(inputs, card.split):
        tell(f"the model in {run.folder} was trained with other settings or inputs than those of the run file and its store")
    fits(states=[str(s) for s in open_store(store_path)["state"].values])
    r = run.reconstruct
    cores = cores_of_worker(r.cores) if run.cluster == "slurm" and r.threads is None else r.cores
    precision = precision_of(card) if r.precision == "auto" else r.precision
    work: list[tuple[Place, list[cube.Block], BlockSettings]] = []
    for name, (path, reference, years) in cubes_of(run).items():
        held = next((token for place, token in tokens.items() if _same(place, path)), None)
        token = claims.enter_context(claim(path, held=held, tell=tell))
        identity = {
            "model": card.weights,
            "sharpness": card.sharpness,
            "store": digest(inputs.identity),
            "contents": held_of(store_path, reference=reference, years=years),
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
            land=land_of(source),
            years_a_shard=r.years_a_shard,
            attrs=credit_attrs(run),
        )
        blocks = plan_blocks(
            store_path, years=years, reference=reference, done=ledger.recorded(path), years_a_shard=r.years_a_shard
        )
        origin = "without a reference map" if reference is None else f"from the map of {reference}"
        tell(f"{name}: {len(blocks)} blocks to do, years {years[0]}-{years[-1]} {origin}")
        about: dict[str, Any] = {"reference": reference, "checksum": card.weights, "threads": cores, "precision": precision}
        work.append((path, blocks, replace(job_of(run, source, cube_path=path, **about), token=token)))
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
            run.cluster,
            workers=r.workers,
            threads=r.at_once or min(2, cores),
            cores=cores,
            memory=memory,
            folder=run.folder,
            tell=tell,
        ) as client:
            for _, blocks, job in work:
                run_blocks(blocks, job, client=client, progress=step)
    for path, _, _ in work:
        _remove_partial(path)
        years = cube.show(path)
        if len(years) != len(cube.template_of(path)["years"]):
            raise DataError(
                f"cube {path} has only the years {years} whole after all blocks; verify it with: ai4land verify {path}"
            )
    if card.training.get("fingerprint") == fingerprint_of(inputs, card.split):
        run.save(run.folder / "config.yaml")
    return cubes_of(run)["cube"][0]


def _remove_partial(place: Place) -> None:
    """Remove unfinished files of dead workers; a late task may still move its own into place."""
    folder = folder_of(place)
    for file in () if folder is None else folder.rglob("*.partial"):
        file.unlink(missing_ok=True)


def credit_attrs(run: RunConfig) -> dict[str, str]:
    """Return the cube attributes that state its licence and credit its sources."""
    found = known.credits_of(run.sources)
    if not found:
        return {}
    owed = [f"{s.title}: {s.citation or ', '.join(s.providers)} ({s.licence})" for s in found]
    return {"license": known.licence_of(run.sources), "attribution": "; ".join(owed)}


def run_of(place: Place, file: Path | None = None) -> RunConfig:
    """Find the run that made a cube.

    Parameters
    ----------
    place
        Of the cube or of a part of one.
    file
        Run file; None: ``config.yaml`` in the folder of the cube.

    Raises
    ------
    ConfigError
        If there is no run file, or it did not make this cube.
    """
    above = ledger.part_of(place)
    folder = folder_of(place if above is None else above[0])
    found = file or (None if folder is None else folder.parent / "config.yaml")
    if found is None or not found.is_file():
        raise ConfigError(f"run of cube {place} is not known, expected its run file; give it with --run RUN.yaml")
    # The saved file may hold a path relative to another working folder.
    run = load_run(found, [f"runs={found.parent.parent}"] if file is None else [])
    if not any(_same(place, one) for one, *_ in cubes_of(run).values()):
        raise ConfigError(f"cube {place} is none of those of {found}; give the run file that made it with --run RUN.yaml")
    return run


def _same(a: Place, b: Place) -> bool:
    one, other = folder_of(a), folder_of(b)
    return str(a).rstrip("/") == str(b).rstrip("/") if one is None or other is None else one.resolve() == other.resolve()


def mend(
    run: RunConfig,
    place: Place,
    damages: list[Damage],
    *,
    tell: Tell = _log.info,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Redo what :func:`ai4land.cube.verify.verify` found missing or damaged, and verify again.

    Raises
    ------
    DataError
        If something is still wrong.
    """
    load_model(run.folder)
    with hold(run.folder), ExitStack() as claims:
        token = claims.enter_context(claim(place, tell=tell))
        again = strike(place, damages)
        tell(f"{len(damages)} things are wrong with {place}; {len({k[:2] for k in again})} shards are done again")
        _reconstruct(run, claims, {place: token}, tell, progress)
    left = verify(place)
    if left:
        raise DataError(f"cube {place} is still not as its ledger says: {'; '.join(map(str, left[:5]))}; is its disk sound?")


def method_of(run: RunConfig, reference: int | None) -> Method:
    """Choose how to impose the totals: without a reference map, ``change`` becomes ``level``."""
    return "level" if reference is None and run.constrain.method == "change" else run.constrain.method


def job_of(
    run: RunConfig,
    source: Source,
    *,
    cube_path: Place,
    reference: int | None,
    checksum: str = "",
    threads: int = 1,
    precision: Precision = "float32",
) -> BlockSettings:
    """Collect the settings that all tasks of a reconstruction share."""
    c = run.constrain
    return BlockSettings(
        store=str(run.folder / "store.zarr"),
        cube=str(cube_path),
        model=str(run.folder),
        checksum=checksum,
        reference=reference,
        threads=threads,
        crosswalk=Inputs.of(run).crosswalk,
        precision=precision,
        method=method_of(run, reference),
        weights=run.scenario.weights,
        keep=c.keep,
        settle=c.settle,
        lock=tuple(c.lock),
        protected=c.protected,
    )
