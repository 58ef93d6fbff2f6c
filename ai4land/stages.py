"""The stages of a run: from a run's configuration to calls of the functions that do the work.

Each stage looks whether its result is there and is that of this configuration, and does only what is missing. This is
the last place that knows configuration objects: what it calls takes plain values.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
import yaml
from numpy.typing import NDArray

from ai4land import cube, scenario
from ai4land.align import Layer, check_identity, open_store, write_store
from ai4land.batch import PatchLoader
from ai4land.catalog import find_items, load_asset
from ai4land.checkpoint import Card, check_fits, load_card, load_model, load_state, save_model
from ai4land.config import ChangeConfig, Luh2Config, RunConfig, SharesConfig, StaticLayer, digest
from ai4land.errors import ConfigError, DataError, MismatchError
from ai4land.features import fit_spec
from ai4land.grid import Grid, block_sum, make_grid
from ai4land.landcover import available_years, iter_maps
from ai4land.legend import MISSING, Crosswalk, Legend, load_crosswalk, load_legend
from ai4land.losses import class_weights
from ai4land.luh2 import open_states
from ai4land.raster import open_raster
from ai4land.reconstruct import Job, Source, plan_blocks, run_blocks
from ai4land.splits import TRAIN, VALIDATION, Scored, Split, make_split
from ai4land.train import Schedule, fit
from ai4land.unet import UNet

_log = logging.getLogger(__name__)

Tell = Callable[[str], None]


def grid_of(run: RunConfig) -> Grid:
    """Make the grid of a run."""
    g = run.grid
    return make_grid(g.bbox, coarse_cell=g.coarse_cell, factor=g.factor, shard=g.shard, origin=g.origin, crs=g.crs)


def legend_of(run: RunConfig) -> Legend:
    """Load the legend of a run."""
    name = run.landcover.legend
    return load_legend(run.path(name) if name.endswith(".yaml") else name)


def split_of(run: RunConfig, grid: Grid) -> Split:
    """Make the split of a run, and check that something decides when training stops."""
    s = run.split
    scored = [None if e is None else Scored(e.reference, tuple(e.years)) for e in (s.validation, s.test)]
    rows, cols = grid.coarse.shape
    split = make_split(
        (int(rows), int(cols)),
        train=s.train,
        max_lead=s.max_lead,
        backward=s.backward,
        validation=scored[0],
        test=scored[1],
        space=None if s.space is None else s.space.model_dump(),
        seed=run.seed,
        wraps=grid.wraps,
    )
    if split.validation is None and not (split.roles == VALIDATION).any():
        raise ConfigError(
            "split has neither validation years nor validation cells, expected one; set split.validation or split.space"
        )
    return split


def crosswalk_of(run: RunConfig, legend: Legend) -> Crosswalk:
    """Load the crosswalk from the states of the scenario to the legend."""
    name = run.scenario.crosswalk
    return load_crosswalk(name if name == "identity" or not name.endswith(".csv") else run.path(name), legend)


def cubes_of(run: RunConfig) -> dict[str, tuple[Path, int, list[int]]]:
    """Name the cubes of a run, with the year of their reference map and their years.

    The published one, and one more for each scored experiment whose reference map is another.
    """
    r = run.reconstruct
    made = {"cube": (run.folder / "cube.zarr", r.reference, list(r.years))}
    for name, experiment in (("validation", run.split.validation), ("test", run.split.test)):
        if experiment is None:
            continue
        own = experiment.reference == r.reference and set(experiment.years) <= set(r.years)
        if not own:
            made[name] = (run.folder / f"{name}.zarr", experiment.reference, list(experiment.years))
    return made


# -- align --------------------------------------------------------------------------------------------------------------


def _map_source(run: RunConfig) -> str | dict[int, Path]:
    source = run.landcover.source
    return run.path(source) if isinstance(source, str) else {year: Path(run.path(p)) for year, p in source.items()}


def _identity(run: RunConfig) -> dict[str, Any]:
    return {name: run.fingerprint(name) for name in ("grid", "landcover", "scenario", "static")} | {
        "reference": run.reconstruct.reference
    }


def needed_years(run: RunConfig) -> tuple[set[int], set[int]]:
    """List the years whose map, and whose scenario, the run uses."""
    maps = set(run.split.train) | {run.reconstruct.reference}
    states = set(run.split.train) | set(run.reconstruct.years) | {run.reconstruct.reference}
    for experiment in (run.split.validation, run.split.test):
        if experiment is not None:
            maps |= {experiment.reference, *experiment.years}
            states |= {experiment.reference, *experiment.years}
    return maps, states


def _open_scenario(run: RunConfig, grid: Grid, legend: Legend, base: NDArray[np.uint8] | None) -> xr.DataArray:
    s = run.scenario
    _, years = needed_years(run)
    if isinstance(s, Luh2Config):
        return open_states(
            [run.path(p) for p in s.paths],
            static=None if s.static is None else run.path(s.static),
            years=sorted(years),
            grid=grid,
            units=s.units,
            time_units=s.time_units,
            cell_degrees=s.cell_degrees,
        )
    if isinstance(s, SharesConfig):
        return scenario.open_shares(run.path(s.path), variable=s.variable, grid=grid, years=sorted(years))
    if base is None:
        raise ConfigError(f"scenario changes the map of {s.base_year}, which is not among the land-cover maps; add it")
    shares, area = _base_shares(base, grid, legend)
    return scenario.open_change(
        {year: Path(run.path(p)) for year, p in s.paths.items()},
        base=shares,
        base_year=s.base_year,
        area=area,
        legend=legend,
        grid=grid,
    )


def _base_shares(codes: NDArray[np.uint8], grid: Grid, legend: Legend) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Area-weighted class shares of a map in each coarse cell, and its mapped area in km2."""
    index = legend.encode(codes)
    area = np.broadcast_to(grid.cell_areas()[:, None] / 1e6, index.shape)
    mapped = block_sum(np.where(index != MISSING, area, 0.0), grid.factor)
    shares = np.stack([block_sum(np.where(index == k, area, 0.0), grid.factor) for k in range(legend.n)])
    return np.divide(shares, mapped, out=np.full_like(shares, np.nan), where=mapped > 0), mapped


def _layer(run: RunConfig, layer: StaticLayer, grid: Grid) -> xr.DataArray:
    method: Any = layer.method
    if layer.path is not None:
        return open_raster(run.path(layer.path), grid=grid, resampling=method, band=layer.band, variable=layer.variable)
    catalog, collection, asset = str(layer.catalog), str(layer.collection), str(layer.asset)
    west, south, east, north = grid.bounds
    items = find_items(run.path(catalog), collection=collection, bbox=(west, south, east, north))
    return load_asset(items, asset=asset, grid=grid, resampling=method, dtype="float32", nodata=float("nan"))


def align(run: RunConfig, *, tell: Tell = _log.info) -> Path:
    """Make the analysis-ready store of a run, if it is not there."""
    path = run.folder / "store.zarr"
    maps, states = needed_years(run)
    if check_identity(path, _identity(run)):
        _check_years(path, maps, states)
        return path
    grid, legend = grid_of(run), legend_of(run)
    split_of(run, grid)
    crosswalk = crosswalk_of(run, legend)
    source, variable = _map_source(run), run.landcover.variable
    have = available_years(source, variable=variable)
    lacking = sorted(maps - set(have))
    if lacking:
        raise ConfigError(
            f"land-cover maps of {lacking} are needed, {run.landcover.source} has {_span(have)}; change the years or the files"
        )
    read = partial(iter_maps, source, grid=grid, legend=legend, resampling=run.landcover.resampling, variable=variable)
    reference = dict(read(years=[run.reconstruct.reference]))[run.reconstruct.reference]
    base = None
    if isinstance(run.scenario, ChangeConfig) and run.scenario.base_year in have:
        base = dict(read(years=[run.scenario.base_year]))[run.scenario.base_year]
    coarse = _open_scenario(run, grid, legend, base)
    lacking = sorted(states - {int(y) for y in coarse["year"].values})
    if lacking:
        raise ConfigError(
            f"scenario years {lacking} are needed, the scenario has {_span(coarse['year'].values.tolist())}; change the years or the files"
        )
    scenario.class_shares(coarse.isel(year=slice(0, 1)), crosswalk=crosswalk)
    mask = reference != legend.fill.code
    if not mask.any():
        raise DataError(
            f"land-cover map of {run.reconstruct.reference} has no class anywhere in {grid.bounds}; look at grid.bbox and the file"
        )
    years = sorted(maps | ({y for y in have if y in run.reconstruct.years}))
    write_store(
        path,
        grid=grid,
        legend=legend,
        mask=mask,
        maps=read(years=years),
        observed_years=years,
        coarse=coarse,
        layers=[Layer(s.name, s.categorical, partial(_layer, run, s, grid)) for s in run.static],
        identity=_identity(run),
        progress=tell,
    )
    return path


def _check_years(path: Path, maps: set[int], states: set[int]) -> None:
    """Refuse a store that was made for other years."""
    source = Source(path)
    lacking = {"land-cover maps": sorted(maps - set(source.observed)), "scenario years": sorted(states - set(source.years))}
    for what, years in lacking.items():
        if years:
            raise MismatchError(
                f"store {path} was made for other years and lacks the {what} {years}; "
                "restore the years of the run file, choose another name, or delete the store"
            )


def _span(years: list[int]) -> str:
    return f"{min(years)}-{max(years)} ({len(years)} years)" if years else "none"


# -- train --------------------------------------------------------------------------------------------------------------


def train(run: RunConfig, *, tell: Tell = _log.info, progress: Callable[[int, dict[str, float]], None] | None = None) -> Path:
    """Train the model of a run, if it is not there; go on where a killed training stopped."""
    store_path = align(run, tell=tell)
    grid = grid_of(run)
    split = split_of(run, grid)
    fingerprint = digest({**_identity(run), "split": split.hash, "fit": run.fingerprint("model", "train", "seed")})
    if _trained(run, fingerprint):
        return run.folder
    run.save(run.folder / "config.yaml")
    split.save(run.folder / "splits.json")
    t = run.train
    torch.set_num_threads(t.threads or os.cpu_count() or 1)
    torch.manual_seed(t.seed + run.seed)
    store = open_store(store_path)
    legend = Legend(**store.attrs["legend"])
    spec = fit_spec(store, cells=split.roles == TRAIN, pairs=split.pairs, codes=legend.codes.tolist(), factor=grid.factor)
    load = partial(
        PatchLoader, partial(open_store, store_path), grid=grid, legend=legend, spec=spec, patch=t.patch, batch=t.batch
    )
    loader = load(cells=split.roles == TRAIN, pairs=split.pairs, seed=t.seed, mask_all=t.mask_all, mask_some=t.mask_some)
    held = _validation_batches(load, split, t.validation_batches, t.mask_all, t.mask_some)
    weights = class_weights(_class_counts(store, split, legend, grid), power=t.class_balance)
    model = UNet(
        static_channels=len(spec.static_names),
        coarse_channels=len(spec.coarse_names),
        classes=legend.n,
        factor=grid.factor,
        **run.model.model_dump(),
    )
    tell(
        f"training {sum(p.numel() for p in model.parameters()):,} parameters on {len(split.pairs)} pairs of years, {t.steps} steps"
    )
    result = fit(
        model,
        batches=loader.batches,
        validation=held,
        weights=torch.from_numpy(weights),
        schedule=Schedule(**{k: v for k, v in t.model_dump().items() if k in Schedule.__dataclass_fields__}),
        folder=run.folder,
        fingerprint=fingerprint,
        progress=progress,
    )
    save_model(
        run.folder,
        result.weights,
        Card(
            legend=legend,
            spec=spec,
            network=model.settings,
            cell=(float(grid.fine.affine.a), float(-grid.fine.affine.e)),
            weights="",
            split=split.hash,
            store=digest(_identity(run)),
            training={
                "fingerprint": fingerprint,
                "steps": result.steps,
                "best_step": result.best_step,
                "validation_loss": result.best_loss,
                "years": split.training_years,
                "class_weights": [round(float(w), 5) for w in weights],
                "receptive_radius": model.receptive_radius,
            },
        ),
    )
    return run.folder


def _trained(run: RunConfig, fingerprint: str) -> bool:
    """Tell whether the model of a run is there; refuse to replace a model or a training of another configuration."""
    folder, resume = run.folder, run.folder / "resume.pt"
    found = str(load_card(folder).training.get("fingerprint")) if (folder / "model.json").is_file() else None
    if found == fingerprint:
        return True
    begun = str(load_state(resume)["fingerprint"]) if resume.is_file() else None
    if found is not None or begun not in (None, fingerprint):
        raise MismatchError(
            f"training in {folder} was begun with another configuration ({_differences(run)}); restore the run file, "
            "choose another name, or delete model.json, resume.pt and the cubes to train anew"
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


def _validation_batches(load: Any, split: Split, count: int, mask_all: float, mask_some: float) -> list[Any]:
    """Batches that decide when to stop: the validation years, or held-out cells of the training years with holes."""
    cells = split.cells(VALIDATION)
    if split.validation is not None:
        pairs = tuple((split.validation.reference, year) for year in split.validation.years)
        return list(load(cells=cells, pairs=pairs, seed=1_000_003).batches(0, count))
    return list(load(cells=cells, pairs=split.pairs, seed=1_000_003, mask_all=mask_all, mask_some=mask_some).batches(0, count))


def _class_counts(store: xr.Dataset, split: Split, legend: Legend, grid: Grid) -> NDArray[np.int64]:
    cells = store["mask"].values.astype(bool) & np.kron(split.roles == TRAIN, np.ones((grid.factor, grid.factor), dtype=bool))
    counts = np.zeros(256, dtype=np.int64)
    for year in sorted({year for _, year in split.pairs}):
        counts += np.bincount(legend.encode(store["land_cover"].sel(observed_year=year).values[cells]), minlength=256)
    return counts[: legend.n]


# -- reconstruct --------------------------------------------------------------------------------------------------------


def reconstruct(run: RunConfig, *, tell: Tell = _log.info, progress: Callable[[int, int], None] | None = None) -> Path:
    """Make the cubes of a run; blocks that the ledger has are not done again."""
    from distributed import Client, LocalCluster

    _, card = load_model(run.folder)
    fits = partial(check_fits, card, legend=legend_of(run), feature_names=[s.name for s in run.static], factor=run.grid.factor)
    fits(states=list(card.spec.states))
    store_path = align(run, tell=tell)
    source = Source(store_path)
    fits(states=[str(s) for s in open_store(store_path)["state"].values])
    r = run.reconstruct
    threads = r.threads or max(1, (os.cpu_count() or 1) // r.workers)
    work: list[tuple[Path, list[cube.Block], Job]] = []
    for name, (path, reference, years) in cubes_of(run).items():
        identity = {"model": card.weights, "store": digest(_identity(run)), "reference": reference, "seed": run.seed}
        cube.create(
            path,
            grid=source.grid,
            legend=source.legend,
            years=years,
            identity=identity,
            title=run.title or run.name,
            source=f"ai4land {card.version}, model {card.weights[:16]}, reference map {reference}; legend: {source.legend.title}",
        )
        blocks = plan_blocks(store_path, years=years, window=r.window, done=cube.recorded(path))
        tell(f"{name}: {len(blocks)} blocks to do, years {years[0]}-{years[-1]} from the map of {reference}")
        work.append((path, blocks, Job(str(store_path), str(path), str(run.folder), card.weights, reference, threads)))
    total = sum(len(blocks) for _, blocks, _ in work)
    count = 0

    def step(_: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if progress is not None:
            progress(count, total)

    if total:
        with (
            LocalCluster(
                n_workers=r.workers, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0", host="127.0.0.1"
            ) as cluster,
            Client(cluster) as client,
        ):
            tell(f"Dask dashboard: {cluster.dashboard_link}")
            for _, blocks, job in work:
                run_blocks(blocks, job, client=client, progress=step)
    for path, _, _ in work:
        for left in path.glob("*/c/**/*.partial"):
            left.unlink()
        cube.finish(path)
    return run.folder / "cube.zarr"
