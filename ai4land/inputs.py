"""The inputs of a run: from its configuration to grid, legend, split and the analysis-ready store.

Whatever can be refused is refused here, before hours of work: years that the maps or the scenario lack, a crosswalk without
a row for a state, a split that leaks, a store of another configuration.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ai4land import scenario
from ai4land.align import Layer, check_identity, write_store
from ai4land.areachange import open_change
from ai4land.assets import load_asset
from ai4land.catalog import find_items
from ai4land.coarse import held_years
from ai4land.config import ChangeConfig, Coordinate, FractionsConfig, Luh2Config, RunConfig, SharesConfig, StaticLayer
from ai4land.errors import ConfigError, DataError, MismatchError
from ai4land.fractions import FractionFile, fraction_years, open_fractions
from ai4land.grid import FINE_DIMS, Grid, make_grid
from ai4land.landcover import available_years, iter_maps
from ai4land.ledger import part
from ai4land.legend import Crosswalk, Legend, load_crosswalk, load_legend
from ai4land.luh2 import open_states
from ai4land.predict import Source
from ai4land.raster import open_raster
from ai4land.splits import VALIDATION, Scored, Split, make_split
from ai4land.stores import Place, folder_of

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


def cubes_of(run: RunConfig) -> dict[str, tuple[Place, int | None, list[int]]]:
    """Name the cubes of a run, with the year of their reference map (None: without one) and their years.

    The published one, and one more for each scored experiment whose reference map is another.
    """
    r = run.reconstruct
    place: Place = run.folder / "cube.zarr"
    if r.cube is not None:
        place = r.cube if folder_of(r.cube) is None else Path(run.path(r.cube))
    made: dict[str, tuple[Place, int | None, list[int]]] = {"cube": (part(place, r.part), r.reference, list(r.years))}
    for name, experiment in (("validation", run.split.validation), ("test", run.split.test)):
        if experiment is None:
            continue
        own = experiment.reference == r.reference and set(experiment.years) <= set(r.years)
        if not own:
            made[name] = (run.folder / f"{name}.zarr", experiment.reference, list(experiment.years))
    return made


def _map_source(run: RunConfig) -> str | dict[int, Path]:
    source = run.landcover.source
    return run.path(source) if isinstance(source, str) else {year: Path(run.path(p)) for year, p in source.items()}


def mask_year(run: RunConfig) -> int:
    """Year of the map that says which cells are mapped: the reference map, or without one that of the first training year."""
    return min(run.split.train) if run.reconstruct.reference is None else run.reconstruct.reference


def identity_of(run: RunConfig) -> dict[str, Any]:
    """Say what the store of a run is made from."""
    s = run.scenario
    return {
        **{name: run.fingerprint(name) for name in ("grid", "landcover", "scenario", "static")},
        "reference": run.reconstruct.reference,
        **({"mask_year": mask_year(run)} if run.reconstruct.reference is None else {}),
        **({"interpolated": "linearly, in scenario years that the files lack"} if _interpolates(s) else {}),
    }


def _interpolates(s: object) -> bool:
    return isinstance(s, FractionsConfig) and s.interpolate


def needed_years(run: RunConfig, held: Iterable[int] = ()) -> tuple[set[int], set[int]]:
    """List the years whose map, and whose scenario, the run uses.

    Parameters
    ----------
    run
        The run.
    held
        Years of the scenario. Those between a reference map and the years predicted from it are used as well, so that
        a map can be followed from year to year; a year that the scenario lacks is left out.
    """
    maps = set(run.split.train) | {mask_year(run)}
    states = set(run.split.train)
    for experiment in (run.split.validation, run.split.test):
        if experiment is not None:
            maps |= set(experiment.years)
    held = set(held)
    for _, reference, years in cubes_of(run).values():
        states |= set(years)
        if reference is not None:
            maps.add(reference)
            states.add(reference)
            states |= held & set(range(min(reference, *years), max(reference, *years) + 1))
    return maps, states


def _held(run: RunConfig) -> set[int]:
    """Years that the scenario of a run can give."""
    s = run.scenario
    if isinstance(s, Luh2Config):
        return held_years([run.path(p) for p in s.paths], dim="time", units=s.time_units)
    if isinstance(s, SharesConfig):
        return held_years([run.path(s.path)], dim="year")
    if isinstance(s, FractionsConfig):
        return set(fraction_years(_fraction_files(run, s), interpolate=s.interpolate))
    return {s.base_year, *s.paths}


def _fraction_files(run: RunConfig, s: FractionsConfig) -> list[FractionFile]:
    return [FractionFile(Path(run.path(f.path)), f.year, f.year_dim, dict(f.select)) for f in s.files]


def _open_scenario(run: RunConfig, grid: Grid, legend: Legend, base: NDArray[np.uint8] | None) -> xr.DataArray:
    s = run.scenario
    years = sorted(needed_years(run, _held(run))[1])
    if isinstance(s, Luh2Config):
        return open_states(
            [run.path(p) for p in s.paths],
            static=None if s.static is None else run.path(s.static),
            years=years,
            grid=grid,
            units=s.units,
            time_units=s.time_units,
            cell_degrees=s.cell_degrees,
        )
    if isinstance(s, SharesConfig):
        return scenario.open_shares(run.path(s.path), variable=s.variable, grid=grid, years=years)
    if isinstance(s, FractionsConfig):
        files = _fraction_files(run, s)
        return open_fractions(files, states=s.states, grid=grid, years=years, remainder=s.remainder, interpolate=s.interpolate)
    if base is None:
        raise ConfigError(f"scenario changes the map of {s.base_year}, which is not among the land-cover maps; add it")
    return open_change(
        {year: Path(run.path(p)) for year, p in s.paths.items()},
        base=base,
        base_year=s.base_year,
        legend=legend,
        grid=grid,
        merge=s.merge,
    )


def _layer(run: RunConfig, layer: StaticLayer | Coordinate, grid: Grid) -> xr.DataArray:
    if isinstance(layer, Coordinate):
        coords = {d: np.asarray(grid.coords()[d]) for d in FINE_DIMS}
        along = np.broadcast_to(
            coords[layer.coordinate][:, None] if layer.coordinate == FINE_DIMS[0] else coords[layer.coordinate], grid.shape
        )
        return xr.DataArray(along.astype(np.float32), dims=FINE_DIMS, coords=coords)
    method: Any = layer.method
    if layer.path is not None:
        return open_raster(run.path(layer.path), grid=grid, resampling=method, band=layer.band, variable=layer.variable)
    catalog, collection, asset = str(layer.catalog), str(layer.collection), str(layer.asset)
    items = find_items(run.path(catalog), collection=collection, bbox=grid.bounds if grid.geographic else None)
    return load_asset(items, asset=asset, grid=grid, resampling=method, dtype="float32", nodata=float("nan"))


def align(run: RunConfig, *, tell: Tell = _log.info) -> Path:
    """Make the analysis-ready store of a run, if it is not there."""
    path = run.folder / "store.zarr"
    codes = legend_of(run).codes.tolist()
    unknown = sorted(set(run.constrain.lock) - set(codes))
    if unknown:
        raise ConfigError(f"constrain.lock has the codes {unknown}, expected some of {codes}; mend it")
    maps, states = needed_years(run)
    if check_identity(path, identity_of(run)):
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
    reference = dict(read(years=[mask_year(run)]))[mask_year(run)]
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
            f"land-cover map of {mask_year(run)} has no class anywhere in {grid.bounds}; look at grid.bbox and the file"
        )
    if isinstance(run.scenario, FractionsConfig) and run.scenario.mask:
        mask &= _known(coarse, grid)
        if not mask.any():
            raise DataError(
                "scenario knows no coarse cell that the map has a class in, expected some; set scenario.mask to false"
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
        identity=identity_of(run),
        progress=tell,
    )
    return path


def _known(coarse: xr.DataArray, grid: Grid) -> NDArray[np.bool_]:
    """Fine cells of the coarse cells that the scenario knows."""
    known = np.isfinite(coarse.values).all(axis=(0, 1))
    return np.kron(known, np.ones((grid.factor, grid.factor), dtype=bool))


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
