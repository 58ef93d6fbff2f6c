"""Coarse sources: opening them, their years and units, and the checks that every scenario passes.

A scenario is one float32 DataArray ``coarse`` (year, state, coarse_latitude, coarse_longitude) of shares of the cell, NaN
where the source has no data. :mod:`ai4land.scenario.luh2` and :mod:`ai4land.scenario.shares` make it from files with these functions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ai4land.errors import DataError
from ai4land.grid import COARSE_DIMS, Grid
from ai4land.rasters.file import open_dataset
from ai4land.scenario.regrid import Footprint
from ai4land.years import years_in

_log = logging.getLogger(__name__)

EARTH_RADIUS_KM = 6371.0
"""Radius of the sphere on which areas in km2 become shares."""
HUGE = 1e19
"""Values at or above this are missing (LUH2 marks them 1e20)."""
LOW, HIGH = -1e-4, 1 + 1e-3
"""Rounding tolerance: how far a share may leave 0..1, and the sum of shares exceed 1."""
SUM_TOLERANCE = 2e-3


def open_source(path: str | Path) -> xr.Dataset:
    """Open a NetCDF or Zarr file lazily, with scale and missing values applied and time left as numbers.

    Raises
    ------
    DataError
        If it does not exist, is truncated or is neither NetCDF nor Zarr.
    """
    if not Path(path).exists():
        raise DataError(f"{path} does not exist, expected a NetCDF or Zarr file; check the path")
    return xr.decode_cf(open_dataset(path), decode_times=False)


def held_years(paths: Iterable[str | Path], *, dim: str, units: str | None = None) -> set[int]:
    """List the years of files along ``dim``; ``units`` override theirs, plain numbers are calendar years.

    A file without this coordinate adds none; the reader reports the error.
    """
    held: set[int] = set()
    for path in paths:
        with open_source(path) as dataset:
            if dim in dataset.coords:
                time = dataset[dim]
                text = units or (None if "units" in time.attrs else "years since 0-01-01")
                held |= set(years_in(time, source=path, units=text).tolist())
    return held


def to_shares(
    values: NDArray[Any], *, units: str, lat: NDArray[Any], source: str | Path, cell_degrees: float | None = None
) -> NDArray[np.float32]:
    """Turn values ``(..., lat, lon)`` into shares of the cell; missing values (NaN, 1e19 and more) become NaN.

    Parameters
    ----------
    values, lat
        Field and its latitudes in degrees.
    units
        "1", "fraction" or "" (shares), "percent" or "%" (also "fraction of …", "percent of …"), or "km2": area in a source
        cell.
    source
        Name of the source for messages.
    cell_degrees
        Side of the cell that values in km2 are counted in; its area is (side · 6371 km)² · cos(lat), side in radians.

    Raises
    ------
    DataError
        If the units are others, or km2 and ``cell_degrees`` is not given.
    """
    shares = np.where(values < HUGE, values, np.nan).astype(np.float32)
    unit = " ".join(units.lower().split())
    if unit in ("", "1", "fraction") or unit.startswith("fraction of"):
        return shares
    if unit in ("%", "percent") or unit.startswith("percent of"):
        return shares / np.float32(100)
    if unit in ("km2", "km^2", "km**2"):
        if cell_degrees is None:
            raise DataError(
                f"units of {source} are {units!r}, expected shares (1): wrong units; if the values are km2 in a source cell, "
                "give its side as cell_degrees, for example 0.25"
            )
        area = (math.radians(cell_degrees) * EARTH_RADIUS_KM) ** 2 * np.cos(np.deg2rad(lat))
        return (shares / area[:, None]).astype(np.float32)
    raise DataError(
        f"units of {source} are {units!r}, expected 1, percent or km2: wrong units; give units if the file is mislabelled"
    )


def check_shares(
    shares: NDArray[np.float32], *, names: Sequence[str], years: Sequence[int], cut: Footprint, source: str | Path
) -> NDArray[np.float64]:
    """Check shares ``(year, state, lat, lon)`` and clip them to 0..1, in place; cells that lack one state lose all.

    Returns
    -------
    array
        Sum over the states ``(year, lat, lon)``, NaN without data.

    Raises
    ------
    DataError
        If a share leaves 0..1 by more than rounding.
    """
    gap = np.isnan(shares)
    some, every = np.asarray(gap.any(axis=1)), np.asarray(gap.all(axis=1))
    if (some != every).any():
        _log.warning("%s: %d cells hold some states only and count as no data", source, int((some & ~every).sum()))
        shares[np.broadcast_to(some[:, None], shares.shape)] = np.nan
    wrong: NDArray[np.bool_] = np.asarray((shares < LOW) | (shares > HIGH))
    if wrong.any():
        y, s, i, j = (int(n[0]) for n in np.nonzero(wrong))
        raise DataError(
            f"share of {names[s]} in {source} is {shares[y, s, i, j]:g} in {years[y]} at {cut.lat[i]:g} N {cut.lon[j]:g} E, "
            "expected 0..1; give the units of the file"
        )
    np.clip(shares, 0, 1, out=shares)
    return np.asarray(shares.sum(axis=1, dtype=np.float64))


def check_sums(
    total: NDArray[np.float64],
    *,
    want: NDArray[np.float64] | float,
    what: str,
    years: Sequence[int],
    cut: Footprint,
    source: str | Path,
    tolerance: float = SUM_TOLERANCE,
    above: NDArray[np.bool_] | bool = False,
) -> None:
    """Check that sums ``(year, lat, lon)`` are ``want``, or, where ``above``, not more; the error names the worst cell."""
    off = total - want
    worst = np.nan_to_num(np.where(above, off, np.abs(off)), nan=-np.inf)
    y, i, j = (int(n) for n in np.unravel_index(int(worst.argmax()), worst.shape))
    if worst[y, i, j] > tolerance:
        raise DataError(
            f"sum over the states of {source} is {total[y, i, j]:.6g} in {years[y]} at {cut.lat[i]:g} N {cut.lon[j]:g} E, expected "
            f"{what} {total[y, i, j] - off[y, i, j]:.6g} within {tolerance:.2g}; check that the file is whole and holds shares"
        )


def as_scenario(values: NDArray[Any], *, years: Sequence[int], states: Sequence[str], grid: Grid) -> xr.DataArray:
    """Label values ``(year, state, rows, cols)`` as a scenario on the coarse cells of a grid."""
    coords = {"year": np.array(years, np.int64), "state": np.array(states, dtype=str)}
    places = {name: values for name, values in grid.coords().items() if name in COARSE_DIMS}
    return xr.DataArray(
        values.astype(np.float32, copy=False),
        dims=("year", "state", *COARSE_DIMS),
        coords={**coords, **places},
        name="coarse",
        attrs={"units": "1", "long_name": "share of the cell"},
    )


def blocks(index: Sequence[int], size: int) -> Iterator[slice]:
    """Cut indices into slices of consecutive ones, none longer than ``size``, in the order given.

    >>> list(blocks([3, 4, 5, 9], 2))
    [slice(3, 5, None), slice(5, 6, None), slice(9, 10, None)]
    """
    start = 0
    for end in range(1, len(index) + 1):
        if end == len(index) or end - start == size or index[end] != index[end - 1] + 1:
            yield slice(index[start], index[end - 1] + 1)
            start = end
