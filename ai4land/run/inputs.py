"""The inputs of a run, resolved: grid, legend, crosswalk, split, years, cubes, and the identity of the store."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ai4land.crosswalk import Crosswalk, load_crosswalk
from ai4land.cube.ledger import part
from ai4land.digests import digest
from ai4land.errors import ConfigError
from ai4land.grid import Grid, make_grid
from ai4land.legend import Legend, load_legend
from ai4land.places import Place, folder_of
from ai4land.run.config import FractionsConfig, Luh2Config, RunConfig, SharesConfig
from ai4land.scenario.coarse import held_years
from ai4land.scenario.fractions import FractionFile, fraction_years
from ai4land.train.splits import VALIDATION, Scored, Split, make_split

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run as values, each made on first use and cached."""

    run: RunConfig

    @classmethod
    def of(cls, run: RunConfig) -> Inputs:
        """Resolve the inputs that a run file names."""
        return cls(run)

    @cached_property
    def grid(self) -> Grid:
        """Target grid."""
        g = self.run.grid
        return make_grid(g.bbox, coarse_cell=g.coarse_cell, factor=g.factor, shard=g.shard, origin=g.origin, crs=g.crs)

    @cached_property
    def legend(self) -> Legend:
        """Class scheme of the maps: built in, or a user's own file."""
        name = self.run.landcover.legend
        return load_legend(self.run.file(name) if name.endswith(".yaml") else name)

    @cached_property
    def crosswalk(self) -> Crosswalk:
        """Weights from the states of the scenario to the classes: built in, or a user's own file."""
        name = self.run.scenario.crosswalk
        return load_crosswalk(self.run.file(name) if name.endswith(".csv") else name, self.legend)

    @cached_property
    def split(self) -> Split:
        """Cells and years to train, validate and test on.

        Raises
        ------
        ConfigError
            If no year and no cell remains for early stopping.
        """
        s, (rows, cols) = self.run.split, self.grid.coarse.shape
        scored = [None if e is None else Scored(e.reference, tuple(e.years)) for e in (s.validation, s.test)]
        split = make_split(
            (int(rows), int(cols)),
            train=s.train,
            max_lead=s.max_lead,
            backward=s.backward,
            validation=scored[0],
            test=scored[1],
            space=None if s.space is None else s.space.model_dump(),
            seed=self.run.seed,
            wraps=self.grid.wraps,
        )
        if split.validation is None and not (split.roles == VALIDATION).any():
            raise ConfigError(
                "split has neither validation years nor validation cells, expected one; set split.validation or split.space"
            )
        return split

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the store, and all that is made from it, comes from: settings, and what the legend and the crosswalk hold."""
        legend = self.legend
        codes = legend.model_dump(mode="json", include={"nodata", "aliases"})
        return {
            **{name: self.run.fingerprint(name) for name in ("grid", "landcover", "scenario", "static")},
            "legend": digest([legend.fill.code, [(c.code, c.name) for c in legend.classes], codes]),
            "crosswalk": digest([self.crosswalk.states, self.crosswalk.weights]),
            "reference": self.run.reconstruct.reference,
            **({"mask_year": mask_year(self.run)} if self.run.reconstruct.reference is None else {}),
            **({"interpolated": "linearly, in scenario years that the files lack"} if _interpolates(self.run.scenario) else {}),
        }


def cubes_of(run: RunConfig) -> dict[str, tuple[Place, int | None, list[int]]]:
    """Name the cubes of a run, with the year of their reference map (None: without one) and their years.

    The published cube, and one for each scored experiment with a different reference map.
    """
    r = run.reconstruct
    place: Place = run.folder / "cube.zarr"
    if r.cube is not None:
        given = run.path(r.cube)
        place = given if folder_of(given) is None else Path(given)
    made: dict[str, tuple[Place, int | None, list[int]]] = {"cube": (part(place, r.part), r.reference, list(r.years))}
    for name, experiment in (("validation", run.split.validation), ("test", run.split.test)):
        if experiment is None:
            continue
        own = experiment.reference == r.reference and set(experiment.years) <= set(r.years)
        if not own:
            made[name] = (run.folder / f"{name}.zarr", experiment.reference, list(experiment.years))
    return made


def map_source(run: RunConfig) -> str | dict[int, Path]:
    """Return the path pattern or the paths by year of the land-cover maps."""
    source = run.landcover.source
    if source is None:
        raise ConfigError("landcover has no source, expected one; its maps are those of a STAC collection")
    return run.path(source) if isinstance(source, str) else {year: run.file(p) for year, p in source.items()}


def mask_year(run: RunConfig) -> int:
    """Year of the map that says which cells are mapped: the reference map, or without one that of the first training year."""
    return min(run.split.train) if run.reconstruct.reference is None else run.reconstruct.reference


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


def held_states(run: RunConfig) -> set[int]:
    """Years that the scenario of a run can give."""
    s = run.scenario
    if isinstance(s, Luh2Config):
        return held_years([run.path(p) for p in s.paths], dim="time", units=s.time_units)
    if isinstance(s, SharesConfig):
        return held_years([run.path(s.path)], dim="year")
    if isinstance(s, FractionsConfig):
        return set(fraction_years(fraction_files(run, s), interpolate=s.interpolate))
    return {s.base_year, *s.paths}


def fraction_files(run: RunConfig, s: FractionsConfig) -> list[FractionFile]:
    """List the files of a scenario of fractions."""
    return [FractionFile(run.file(f.path), f.year, f.year_dim, dict(f.select)) for f in s.files]
