"""Fractions of some land uses, one variable each, as a scenario.

Products such as the land-use totals of ISIMIP give only the cropland and pasture of a cell, in files with different years and
dimensions. :func:`open_fractions` regrids them to the coarse cells, adds a state for the remainder and can interpolate years.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ai4land.errors import ConfigError, DataError
from ai4land.grid import Grid
from ai4land.rasters.file import reading
from ai4land.scenario.coarse import HIGH, as_scenario, blocks, check_shares, check_sums, open_source, to_shares
from ai4land.scenario.regrid import find_centres, footprint
from ai4land.years import pick_years, years_in

_log = logging.getLogger(__name__)

_BLOCK_BYTES = 128e6


@dataclass(frozen=True)
class FractionFile:
    """A NetCDF or Zarr file of one ``year``, or of the years along ``year_dim``.

    ``select`` takes one label of each further dimension, such as a climate model.
    """

    path: Path
    year: int | None = None
    year_dim: str | None = None
    select: Mapping[str, str | int] = field(default_factory=dict)


def fraction_years(files: Sequence[FractionFile], *, interpolate: bool = False) -> list[int]:
    """List the years that files hold, or, with ``interpolate``, all years from the first to the last of them.

    Raises
    ------
    DataError
        If a file is damaged or without its dimension of years, or two files hold one year.
    """
    held: list[int] = []
    for file in files:
        with open_source(file.path) as dataset:
            held += _years(dataset, file)
    twice = sorted({y for y in held if held.count(y) > 1})
    if twice:
        raise DataError(f"years {twice} are in more than one of {[str(f.path) for f in files]}, expected each once; drop a file")
    return list(range(min(held), max(held) + 1)) if interpolate else sorted(held)


def open_fractions(
    files: Sequence[FractionFile],
    *,
    states: Mapping[str, str],
    grid: Grid,
    years: Iterable[int] | None = None,
    remainder: str = "other",
    interpolate: bool = False,
) -> xr.DataArray:
    """Read fractions of land uses on the coarse cells of a grid.

    Parameters
    ----------
    files
        That together hold the years, each year once.
    states
        Variable of each state, over latitude and longitude and the dimensions that the file is told of: in shares,
        fractions or percent by its ``units``.
    grid
        The grid; its coarse cells are filled.
    years
        Years to read; all that the files hold by default.
    remainder
        Name of the state that takes what the others leave of a cell.
    interpolate
        Make wanted years that the files lack linearly from the nearest year before and after.

    Returns
    -------
    xarray.DataArray
        Scenario ``coarse`` (year, state, coarse_latitude, coarse_longitude), whose states sum to 1. A cell that any year of
        any file knows is land, and a state counts as 0 where a file lacks it; other cells are NaN. The attribute
        ``interpolated`` lists the years that were made.

    Raises
    ------
    DataError
        If a file is damaged, lacks a variable, a label or a dimension, does not overlap the grid, leaves 0..1 or sums to
        more than 1; if a wanted year is neither held nor between two that are.
    ConfigError
        If the remainder has the name of a state.
    """
    if remainder in states or not files:
        raise ConfigError(f"remainder is {remainder!r} beside the states {list(states)}, expected another name; rename it")
    held = fraction_years(files)
    wanted = pick_years(
        range(held[0], held[-1] + 1) if interpolate else held,
        held if years is None else years,
        source=", ".join(str(f.path) for f in files),
    )
    around = {y: (max(h for h in held if h <= y), min(h for h in held if h >= y)) for y in wanted}
    keep = {h for pair in around.values() for h in pair}
    known = np.zeros(grid.coarse.shape, dtype=bool)
    found: dict[int, NDArray[np.float64]] = {}
    for file in files:
        _read(file, dict(states), grid, keep, known, found)
    made = {}
    for year in wanted:
        before, after = around[year]
        weight = (year - before) / (after - before) if after > before else 0.0
        values = (1 - weight) * np.nan_to_num(found[before]) + weight * np.nan_to_num(found[after])
        total = values.sum(axis=0)
        values = values / np.maximum(total, 1)
        rest = np.clip(1 - total, 0, None)[None]
        made[year] = np.where(known, np.concatenate([values, rest]), np.nan)
    out = as_scenario(np.stack([made[y] for y in wanted]), years=wanted, states=[*states, remainder], grid=grid)
    between = [y for y in wanted if y not in held]
    if between:
        text = ", ".join(f"{y} (between {around[y][0]} and {around[y][1]})" for y in between)
        _log.warning("scenario years made by linear interpolation: %s", text)
        out.attrs["interpolated"] = text
    return out


def _years(dataset: xr.Dataset, file: FractionFile) -> list[int]:
    """Return the years of a file in file order."""
    if file.year is not None:
        return [file.year]
    if file.year_dim not in dataset.coords:
        raise DataError(
            f"{file.path} has the coordinates {sorted(map(str, dataset.coords))}, expected {file.year_dim}; give year_dim or year"
        )
    time = dataset[file.year_dim]
    return [int(y) for y in years_in(time, source=file.path, units=None if "units" in time.attrs else "years since 0-01-01")]


def _read(
    file: FractionFile,
    states: dict[str, str],
    grid: Grid,
    keep: set[int],
    known: NDArray[np.bool_],
    found: dict[int, NDArray[np.float64]],
) -> None:
    """Read the years to ``keep`` of one file into ``found`` (state, rows, cols), and mark the cells with data."""
    with open_source(file.path) as dataset:
        lacking = sorted(set(states.values()) - set(map(str, dataset.data_vars)))
        if lacking:
            raise DataError(f"{file.path} holds {sorted(map(str, dataset.data_vars))}, expected {lacking}; mend states")
        lat, lon = find_centres(dataset, source=file.path)
        for dim, label in file.select.items():
            labels = dataset[dim].values.tolist() if dim in dataset.coords else []
            if label not in labels:
                raise DataError(f"{dim} of {file.path} is {label!r}, expected one of {labels}; mend select")
        arrays = [dataset[v].sel({d: x for d, x in file.select.items() if d in dataset[v].dims}) for v in states.values()]
        dims = {lat, lon} | ({file.year_dim} if file.year_dim else set())
        for array in arrays:
            if set(array.dims) != dims:
                raise DataError(
                    f"{array.name} in {file.path} is over {array.dims} after select, expected {sorted(map(str, dims))}; "
                    "choose one label of each other dimension in select"
                )
        held = _years(dataset, file)
        cut = footprint(dataset[lat].values, dataset[lon].values, box=grid.coarse, source=file.path)
        size = max(1, int(_BLOCK_BYTES // (4 * len(states) * cut.lat.size * cut.lon.size)))
        for steps in blocks(range(len(held)), size):
            with reading(str(file.path), kind="NetCDF or Zarr"):
                parts = [cut.cut(a.isel({file.year_dim: steps}) if file.year_dim else a, dims=(lat, lon)) for a in arrays]
            shares = np.stack(
                [
                    to_shares(p, units=str(a.attrs.get("units", "")), lat=cut.lat, source=f"{a.name} in {file.path}")
                    for a, p in zip(arrays, parts, strict=True)
                ],
                axis=-3,
            ).reshape(-1, len(states), *parts[0].shape[-2:])
            total = check_shares(shares, names=list(states), years=held[steps], cut=cut, source=file.path)
            check_sums(
                total, want=1.0, what="at most", years=held[steps], cut=cut, source=file.path, tolerance=HIGH - 1, above=True
            )
            values = cut.to_box(shares)
            known |= np.isfinite(values[:, 0]).any(axis=0)
            found.update({y: v.astype(np.float64) for y, v in zip(held[steps], values, strict=True) if y in keep})
