"""Class shares of a map product as a scenario.

A scenario is one float32 DataArray ``coarse`` (year, state, coarse_latitude, coarse_longitude) of shares of the cell, NaN
where the source has no data. :func:`open_shares` reads class shares of a map product on a coarse grid; its states are the
class codes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xarray as xr

from ai4land.errors import DataError
from ai4land.grid import Grid
from ai4land.rasters.file import reading
from ai4land.scenario.coarse import as_scenario, blocks, check_shares, check_sums, open_source, to_shares
from ai4land.scenario.regrid import find_centres, footprint
from ai4land.years import pick_years, years_in

_BLOCK_BYTES = 128e6


def open_shares(
    path: str | Path,
    *,
    variable: str,
    grid: Grid,
    years: Iterable[int] | None = None,
    class_dim: str = "class_code",
    year_dim: str = "year",
) -> xr.DataArray:
    """Read the class shares of a map product on the coarse cells of a grid.

    Parameters
    ----------
    path
        NetCDF file or Zarr group.
    variable
        Variable over ``year_dim``, ``class_dim``, latitude and longitude, in shares or percent by its ``units``.
    grid
        The grid; its coarse cells are filled, NaN where the file does not reach.
    years
        Years to read; all by default.
    class_dim
        Dimension of the classes, with their codes as coordinate.
    year_dim
        Dimension of the years: calendar years, or CF time with units.

    Returns
    -------
    xarray.DataArray
        Scenario ``coarse`` (year, state, coarse_latitude, coarse_longitude).

    Raises
    ------
    DataError
        If the file is damaged, lacks the variable, a dimension or a wanted year, is in unknown units, does not overlap the
        grid, or its shares do not sum to 1 within 2e-3 in every cell with data.
    """
    path = Path(path)
    with open_source(path) as dataset:
        if variable not in dataset:
            raise DataError(f"{path} holds {sorted(map(str, dataset.data_vars))}, expected {variable}; give the variable's name")
        array = dataset[variable]
        lat, lon = find_centres(dataset, source=path)
        if set(array.dims) != {year_dim, class_dim, lat, lon} or not {year_dim, class_dim} <= set(dataset.coords):
            raise DataError(
                f"{variable} in {path} is over {array.dims} with the coordinates {sorted(map(str, dataset.coords))}, expected "
                f"{year_dim}, {class_dim}, {lat}, {lon}; give year_dim and class_dim"
            )
        names = [str(c) for c in dataset[class_dim].values.tolist()]
        time = dataset[year_dim]
        held = years_in(time, source=path, units=None if "units" in time.attrs else "years since 0-01-01").tolist()
        wanted = pick_years(held, years, source=path)
        cut = footprint(dataset[lat].values, dataset[lon].values, box=grid.coarse, source=path)
        values = np.empty((len(wanted), len(names), *grid.coarse.shape), dtype=np.float32)
        size = max(1, int(_BLOCK_BYTES // (4 * len(names) * cut.lat.size * cut.lon.size)))
        done = 0
        for steps in blocks([held.index(y) for y in wanted], size):
            with reading(str(path), kind="NetCDF or Zarr"):
                part = cut.cut(array.isel({year_dim: steps}), dims=(lat, lon))
            if array.dims.index(year_dim) > array.dims.index(class_dim):
                part = part.swapaxes(0, 1)
            shares = to_shares(part, units=str(array.attrs.get("units", "")), lat=cut.lat, source=f"{variable} in {path}")
            total = check_shares(shares, names=names, years=held[steps], cut=cut, source=path)
            check_sums(total, want=1.0, what="classes that sum to", years=held[steps], cut=cut, source=path)
            values[done : done + len(shares)] = cut.to_box(shares)
            done += len(shares)
    return as_scenario(values, years=wanted, states=names, grid=grid)
