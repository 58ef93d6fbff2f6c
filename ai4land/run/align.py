"""The alignment stage: from a run's configuration to its analysis-ready store.

All checks come before long reads: missing map or scenario years, a crosswalk without a row for a state, a split that leaks, a
store of another configuration. The cluster's workers then write a large store shard by shard (:mod:`ai4land.store.write`);
this process writes a small one itself, which is faster than starting workers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from dask.system import CPU_COUNT
from distributed import Client
from distributed.system import MEMORY_LIMIT
from numpy.typing import NDArray

from ai4land.errors import ConfigError, MismatchError
from ai4land.grid import FINE_DIMS, Grid, Window
from ai4land.legend import Legend
from ai4land.places import sweep
from ai4land.rasters.items import forget_items, items_in, load_asset
from ai4land.rasters.landcover import AnnualMap, CatalogMap, find_catalog_maps, find_maps
from ai4land.rasters.read import open_raster
from ai4land.run.config import Coordinate, FractionsConfig, Luh2Config, RunConfig, SharesConfig, StaticLayer
from ai4land.run.hold import hold
from ai4land.run.inputs import Inputs, Tell, fraction_files, held_states, map_source, mask_year, needed_years
from ai4land.scenario.areachange import open_change
from ai4land.scenario.fractions import open_fractions
from ai4land.scenario.luh2 import open_states
from ai4land.scenario.shares import open_shares
from ai4land.sources.hrefs import local_path
from ai4land.sources.search import years_of_item
from ai4land.store.contents import changed_files, note_files
from ai4land.store.read import Source, check_identity
from ai4land.store.shard import Layer
from ai4land.store.write import SCENARIO_YEARS, block_memory, write_store

_log = logging.getLogger(__name__)

_SMALL = 2**28
"""Cells of all layers and maps that this process reads in about the time that workers need to start."""

_FEW = 200
"""Number of tiles of a collection up to which their contents are sampled."""


def align(run: RunConfig, *, tell: Tell = _log.info) -> Path:
    """Make the analysis-ready store of a run, unless it exists.

    Raises
    ------
    MismatchError
        If the store was made from something else, or another process is using the folder of the run.
    """
    with hold(run.folder):
        return _align(run, Inputs.of(run), tell)


def _align(run: RunConfig, inputs: Inputs, tell: Tell) -> Path:
    path = run.folder / "store.zarr"
    codes = inputs.legend.codes.tolist()
    unknown = sorted(set(run.constrain.lock) - set(codes))
    if unknown:
        raise ConfigError(f"constrain.lock has the codes {unknown}, expected some of {codes}; mend it")
    needed, states = needed_years(run)
    if check_identity(path, inputs.identity):
        check_years(path, needed, states)
        _check_files(path, run)
        return path
    forget_items()
    grid, legend = inputs.grid, inputs.legend
    _ = inputs.split  # refused before long work if it cannot be
    crosswalk = inputs.crosswalk
    maps = maps_of(run, grid, legend)
    lacking = sorted(needed - set(maps))
    if lacking:
        where = run.landcover.source or " and ".join(run.landcover.collections)
        raise ConfigError(
            f"land-cover maps of {lacking} are needed, {where} has {_span(list(maps))}; change the years or the files"
        )
    coarse = _open_scenario(run, grid, legend, maps)
    lacking = sorted(states - {int(y) for y in coarse["year"].values})
    if lacking:
        raise ConfigError(
            f"scenario years {lacking} are needed, the scenario has {_span(coarse['year'].values.tolist())}; change the years or the files"
        )
    crosswalk.for_states(coarse["state"].values.tolist())
    known = None
    if isinstance(run.scenario, FractionsConfig) and run.scenario.mask:
        known = np.isfinite(coarse.values).all(axis=(0, 1))
    years = sorted(needed | ({y for y in maps if y in run.reconstruct.years}))
    files = note_files(_files(run, grid, [maps[year] for year in years]), beside=run.data)
    try:
        with _workers(run, grid, len(years), tell) as client:
            write_store(
                path,
                grid=grid,
                legend=legend,
                mask=partial(_mapped, reference=maps[mask_year(run)]),
                maps={year: maps[year].read for year in years},
                coarse=coarse,
                layers=[Layer(s.name, s.categorical, partial(read_layer, layer=s, run=run, grid=grid)) for s in run.static],
                identity=inputs.identity,
                known=known,
                files=files,
                client=client,
                progress=tell,
            )
    finally:
        sweep(path)  # remove what workers wrote after a failure before they ended
    return path


@contextmanager
def _workers(run: RunConfig, grid: Grid, maps: int, tell: Callable[[str], None]) -> Iterator[Client | None]:
    """Start workers for a large store; a small one needs none."""
    if grid.shape[0] * grid.shape[1] * (maps + len(run.static)) <= _SMALL or len(grid.shards()) == 1:
        yield None
        return
    from ai4land.workers.cluster import connect
    from ai4land.workers.slurm import cores_of_worker

    each = block_memory(grid, len(run.static))
    workers, threads = max(1, min(CPU_COUNT, int(0.8 * MEMORY_LIMIT / each), len(grid.shards()))), 1
    if run.cluster != "local":
        workers, threads = run.reconstruct.workers, run.reconstruct.cores
        threads = cores_of_worker(threads) if run.cluster == "slurm" else threads
    with connect(
        run.cluster, memory=each * threads, folder=run.folder, tell=tell, workers=workers, threads=threads, cores=threads
    ) as client:
        yield client


def maps_of(run: RunConfig, grid: Grid, legend: Legend) -> Mapping[int, AnnualMap | CatalogMap]:
    """Find the land-cover maps of a run by year."""
    c = run.landcover
    options: dict[str, Any] = {"grid": grid, "legend": legend, "resampling": c.resampling}
    if c.source is not None:
        return find_maps(map_source(run), variable=c.variable, **options)
    return find_catalog_maps(run.path(str(c.catalog)), collections=c.collections, asset=str(c.asset), **options)


def _open_scenario(run: RunConfig, grid: Grid, legend: Legend, maps: Mapping[int, AnnualMap | CatalogMap]) -> xr.DataArray:
    s = run.scenario
    years = sorted(needed_years(run, held_states(run))[1])
    if isinstance(s, Luh2Config):
        return open_states(
            [run.path(p) for p in s.paths],
            static=None if s.static is None else run.path(s.static),
            grid=grid,
            years=years,
            units=s.units,
            time_units=s.time_units,
            cell_degrees=s.cell_degrees,
            years_at_once=SCENARIO_YEARS,
        )
    if isinstance(s, SharesConfig):
        return open_shares(run.path(s.path), variable=s.variable, grid=grid, years=years)
    if isinstance(s, FractionsConfig):
        files = fraction_files(run, s)
        return open_fractions(files, states=s.states, grid=grid, years=years, remainder=s.remainder, interpolate=s.interpolate)
    if s.base_year not in maps:
        raise ConfigError(f"scenario changes the map of {s.base_year}, which is not among the land-cover maps; add it")
    return open_change(
        {year: run.file(p) for year, p in s.paths.items()},
        base=maps[s.base_year].read,
        base_year=s.base_year,
        legend=legend,
        grid=grid,
        merge=s.merge,
    )


def _mapped(window: Window, *, reference: AnnualMap | CatalogMap) -> NDArray[np.bool_]:
    """Find the mapped cells of a shard: those with a class in the reference map."""
    return np.asarray(reference.read(window) != reference.legend.fill.code)


def read_layer(window: Window, *, layer: StaticLayer | Coordinate, run: RunConfig, grid: Grid) -> NDArray[np.float32]:
    """Read a window of a static layer, NaN where it has no value."""
    if isinstance(layer, Coordinate):
        along = np.asarray(grid.coords()[layer.coordinate])[window.slices[FINE_DIMS.index(layer.coordinate)]]
        along = along[:, None] if layer.coordinate == FINE_DIMS[0] else along
        return np.broadcast_to(along, (window.height, window.width)).astype(np.float32)
    method: Any = layer.method
    if layer.path is not None:
        path = run.path(layer.path)
        field = open_raster(path, grid=grid, resampling=method, band=layer.band, variable=layer.variable, window=window)
        return np.asarray(field.values)
    catalog, asset = run.path(str(layer.catalog)), str(layer.asset)
    items = items_in(catalog, collection=str(layer.collection), grid=grid, window=window)
    if not items:
        return np.full((window.height, window.width), np.nan, dtype=np.float32)
    loaded = load_asset(items, asset=asset, grid=grid, resampling=method, dtype="float32", nodata=float("nan"), window=window)
    return np.asarray(loaded.compute(scheduler="synchronous").values)  # one thread a shard: the workers have others


def _files(run: RunConfig, grid: Grid, maps: Iterable[AnnualMap | CatalogMap]) -> dict[str, bool]:
    """List the local files that a run reads and whether to sample their contents; of many tiles only the size counts."""
    s = run.scenario
    layers = [layer for layer in run.static if isinstance(layer, StaticLayer)]
    named: list[str | None] = [layer.path for layer in layers]
    if isinstance(s, Luh2Config):
        named += [*s.paths, s.static]
    elif isinstance(s, SharesConfig):
        named.append(s.path)
    else:
        named += [f.path for f in s.files] if isinstance(s, FractionsConfig) else list(s.paths.values())
    found = {run.path(str(name)): True for name in named if name is not None}
    found |= {m.path: True for m in maps if isinstance(m, AnnualMap)}
    tiled = {(run.path(str(layer.catalog)), str(layer.collection), str(layer.asset)) for layer in layers if layer.path is None}
    tiled |= {(m.path, m.collection, m.asset) for m in maps if isinstance(m, CatalogMap)}
    years = {m.year for m in maps}
    for catalog, collection, asset in sorted(tiled):
        of_maps = collection in run.landcover.collections
        items = items_in(catalog, collection=collection, grid=grid, window=Window(0, 0, *grid.shape))
        for item in items:
            path = local_path(item.assets[asset].href) if asset in item.assets else None
            if path is not None and not (of_maps and years_of_item(item)[0] not in years):
                found[str(path)] = len(items) <= _FEW
    return found


def _check_files(path: Path, run: RunConfig) -> None:
    """Refuse a store if one of its input files has changed or been replaced since."""
    attrs: Any = zarr.open_group(path, mode="r").attrs
    changed = changed_files(attrs.get("files", {}), beside=run.data)
    if changed:
        raise MismatchError(
            f"inputs hold something else than when store {path} was made: {', '.join(changed[:3])}{', …' if changed[3:] else ''}; "
            "restore them, choose another name, or delete the store"
        )


def check_years(path: Path, maps: set[int], states: set[int]) -> None:
    """Refuse a store that lacks years of the run.

    Raises
    ------
    MismatchError
        If it lacks the map, or the scenario, of one of these years.
    """
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
