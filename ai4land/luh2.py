"""Land-use states of LUH2 and LUH3 as a scenario on the coarse grid.

A scenario is one float32 DataArray ``coarse`` (year, state, coarse_latitude, coarse_longitude) of shares of the cell, NaN
where the source has no data. :func:`open_states` reads LUH2 v2h (850-2015), v2f (2015-2100), LUH3 and files cut from them
by what they hold, not by their names: any order of latitudes, any branch of longitudes, several time encodings and units.
Only the years and the cells that are asked for are read. The helpers for files, years and checks serve
:mod:`ai4land.scenario` too.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ai4land.errors import DataError
from ai4land.grid import COARSE_DIMS, Grid
from ai4land.regrid import Footprint, find_centres, footprint

_log = logging.getLogger(__name__)

STATES = ("primf", "primn", "secdf", "secdn", "pastr", "range", "urban", "c3ann", "c4ann", "c3per", "c4per", "c3nfx")
"""The states of LUH2."""
LUH3_STATES = (*STATES, "pltns")
"""The states of LUH3: those of LUH2 and planted forest."""
REDUCED_STATES = ("primf", "primn", "secdf", "secdn", "crops", "pastr", "urban")
"""States of files that sum the five crop types into ``crops``; ``range`` may be there too."""

EARTH_RADIUS_KM = 6371.0
"""Radius of the sphere on which areas in km2 become shares."""
HUGE = 1e19
"""Values from here on are missing (LUH2 marks them 1e20)."""
LOW, HIGH = -1e-4, 1 + 1e-3
"""Shares of one state, and their sum from above, may leave 0..1 so far by rounding."""
SUM_TOLERANCE = 2e-3
_BLOCK_BYTES = 128e6
_YEARS_SINCE = re.compile(r"^\s*(?:common_)?years?\s+since\s+(-?\d+)(?:-(\d+)(?:-(\d+))?)?", re.IGNORECASE)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the errors of the file libraries into a :class:`DataError` that names the file."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path} is truncated or not NetCDF ({error}), expected a whole file; download it again") from error


def open_source(path: str | Path) -> xr.Dataset:
    """Open a NetCDF or Zarr file lazily, with scale and missing values applied and time left as numbers.

    Raises
    ------
    DataError
        If it does not exist, is truncated or is neither NetCDF nor Zarr.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist, expected a NetCDF or Zarr file; check the path")
    if path.is_dir():
        try:
            return xr.open_dataset(path, engine="zarr", chunks=None, consolidated=False, decode_times=False)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} is a folder but not a Zarr group ({error}), expected one; check the path") from error
    with reading(path):
        with netCDF4.Dataset(path) as file:
            if file.data_model.startswith("NETCDF3"):
                least = sum(math.prod(v.shape) * v.dtype.itemsize for v in file.variables.values())
                if path.stat().st_size < least:
                    raise OSError(f"{path.stat().st_size} bytes, the header promises at least {least}")
        return xr.open_dataset(path, engine="netcdf4", decode_times=False)


def years_in(time: xr.DataArray, *, source: str | Path, units: str | None = None) -> NDArray[np.int64]:
    """Calendar year of every time step, shape ``(time,)``.

    Parameters
    ----------
    time
        Undecoded time coordinate.
    source
        Name of the source for messages.
    units
        CF time units to use in place of those in the file: "years since …" or "common_years since …" (a year a unit,
        whatever the calendar), "days since …" and all else that cftime knows.

    Raises
    ------
    DataError
        If units are lacking or unknown, or two steps fall in one year.
    """
    text = str(units or time.attrs.get("units", "")).strip()
    values = np.asarray(time.values)
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise DataError(f"time of {source} holds {values.dtype} values or gaps, expected numbers; repair the file")
    since = _YEARS_SINCE.match(text)
    if since:
        month, day = int(since[2] or 1), int(since[3] or 1)
        years = int(since[1]) + np.floor(values + ((month - 1) * 30.4375 + day - 1) / 365.25 + 1e-6).astype(np.int64)
    elif not text:
        raise DataError(
            f"time of {source} is without units ({values.flat[0]:g} … {values.flat[-1]:g}), expected CF units; "
            'give time_units, for example "days since 1850-01-01"'
        )
    else:
        try:
            dates = netCDF4.num2date(values, text, str(time.attrs.get("calendar", "standard")), only_use_cftime_datetimes=True)
        except (ValueError, OverflowError) as error:
            raise DataError(
                f'time units of {source} are {text!r} ({error}), expected "years since …" or "days since …"; give time_units'
            ) from error
        years = np.array([date.year for date in np.atleast_1d(np.asarray(dates))], dtype=np.int64)
    if np.unique(years).size != years.size:
        raise DataError(
            f"{source} holds {years.size} time steps in {np.unique(years).size} years, expected one a year; average it first"
        )
    return years


def pick_years(held: Iterable[int], wanted: Iterable[int] | None, *, source: str | Path) -> list[int]:
    """Sort the wanted years, all of them if None, and check that they are held.

    >>> pick_years([2016, 2015], None, source="states.nc")
    [2015, 2016]
    """
    there = sorted({int(y) for y in held})
    years = there if wanted is None else sorted({int(y) for y in wanted})
    lacking = sorted(set(years) - set(there))
    if lacking or not years:
        gaps = "" if there[-1] - there[0] + 1 == len(there) else f" with gaps ({len(there)} years)"
        raise DataError(
            f"years are {lacking}, expected years of {source}, which holds {there[0]}..{there[-1]}{gaps}; choose other years"
        )
    return years


def to_shares(
    values: NDArray[Any], *, units: str, lat: NDArray[Any], source: str | Path, cell_degrees: float | None = None
) -> NDArray[np.float32]:
    """Turn values ``(..., lat, lon)`` into shares of the cell; missing values (NaN, 1e19 and more) become NaN.

    Parameters
    ----------
    values, lat
        Field and its latitudes in degrees.
    units
        "1", "fraction" or "" (shares), "percent" or "%" (also "percent of …"), or "km2": area in a source cell.
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
    if unit in ("", "1", "fraction"):
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
    above: bool = False,
) -> None:
    """Check that sums ``(year, lat, lon)`` are ``want``, or not ``above`` it; the error names the worst cell."""
    off = total - want
    worst = np.nan_to_num(off if above else np.abs(off), nan=-np.inf)
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


@dataclass(frozen=True, eq=False)
class _States:
    """One open file: its states, the year of every step, the part that the grid needs and 1 - icwtr of this part."""

    path: Path
    dataset: xr.Dataset
    dims: tuple[Hashable, Hashable]
    names: tuple[str, ...]
    years: tuple[int, ...]
    cut: Footprint
    land: NDArray[np.float64] | None
    units: str | None
    cell_degrees: float | None

    def read(self, years: Sequence[int]) -> Iterator[tuple[list[int], NDArray[Any]]]:
        """Yield years and their checked shares ``(year, state, rows, cols)`` on the coarse grid, block by block."""
        place = [self.years.index(y) for y in years]
        a_year = 4 * len(self.names) * self.cut.lat.size * self.cut.lon.size
        for steps in blocks(place, max(1, int(_BLOCK_BYTES // a_year))):
            held = self.years[steps]
            shares = np.stack([self._state(name, steps) for name in self.names], axis=1)
            total = check_shares(shares, names=self.names, years=held, cut=self.cut, source=self.path)
            check_sums(
                total, want=1.0, what="at most", years=held, cut=self.cut, source=self.path, tolerance=HIGH - 1, above=True
            )
            if self.land is not None:
                check_sums(total, want=self.land, what="1 - icwtr =", years=held, cut=self.cut, source=self.path)
            yield list(held), self.cut.to_box(shares)

    def _state(self, name: str, steps: slice) -> NDArray[np.float32]:
        variable = self.dataset[name]
        units = str(variable.attrs.get("units", "")) if self.units is None else self.units
        with reading(self.path):
            values = self.cut.cut(variable.isel(time=steps), dims=self.dims)
        where = f"{name} in {self.path}"
        return to_shares(values, units=units, lat=self.cut.lat, source=where, cell_degrees=self.cell_degrees)


def _schema(dataset: xr.Dataset, path: Path) -> tuple[str, ...]:
    reduced = "crops" in dataset
    known = (*REDUCED_STATES, "range") if reduced else LUH3_STATES
    lacking = [n for n in (REDUCED_STATES if reduced else STATES) if n not in dataset]
    twice = [n for n in STATES if n.startswith("c") and n in dataset] if reduced else []
    if lacking or twice:
        raise DataError(
            f"{path} lacks the states {lacking} and has {sorted(map(str, dataset.data_vars))}, expected {list(STATES)}, these and pltns, "
            f"or {list(REDUCED_STATES)}; complete the file" + (f", or drop crops, which counts {twice} twice" if twice else "")
        )
    return tuple(n for n in known if n in dataset)


def _ice_and_water(static: str | Path, cut: Footprint) -> NDArray[np.float64]:
    """Share of ice and water in the cells of a cut, NaN where the static file has none."""
    with open_source(static) as dataset:
        if "icwtr" not in dataset:
            raise DataError(
                f"{static} holds {sorted(map(str, dataset.data_vars))}, expected icwtr; give staticData_quarterdeg.nc"
            )
        lat, lon = find_centres(dataset, source=static)
        far_lat = np.abs(dataset[lat].values[:, None] - cut.lat)
        far_lon = np.abs((dataset[lon].values[:, None] - cut.lon + 180) % 360 - 180)
        if max(far_lat.min(axis=0).max(), far_lon.min(axis=0).max()) > 1e-3:
            raise DataError(
                f"{static} has other cells than the states, expected the same grid; give the static file of the release"
            )
        with reading(Path(static)):
            whole = dataset["icwtr"].squeeze(drop=True).transpose(lat, lon).values
        share = whole[np.ix_(far_lat.argmin(axis=0), far_lon.argmin(axis=0))].astype(np.float64)
        return np.where(np.abs(share) < HUGE, share, np.nan)


def open_states(
    paths: str | Path | Sequence[str | Path],
    *,
    grid: Grid,
    static: str | Path | None = None,
    years: Iterable[int] | None = None,
    units: str | None = None,
    time_units: str | None = None,
    cell_degrees: float | None = None,
) -> xr.DataArray:
    """Read land-use states of LUH2 or LUH3 on the coarse cells of a grid.

    Parameters
    ----------
    paths
        One file, or several that follow one another in time. The last year of a file may be the first of the next
        (2015 in v2h and v2f): the later file wins. Other years held twice must agree.
    grid
        The grid; its coarse cells are filled, NaN where the files do not reach.
    static
        ``staticData_quarterdeg.nc``; with it the states must sum to 1 - icwtr.
    years
        Years to read; all by default.
    units, time_units
        In place of those in the files.
    cell_degrees
        Side of the source cell that values in km2 are counted in, degrees.

    Returns
    -------
    xarray.DataArray
        Scenario ``coarse`` (year, state, coarse_latitude, coarse_longitude), float32 shares of the cell.

    Raises
    ------
    DataError
        If a file is damaged or incomplete, in unknown units, out of range, without a wanted year, or does not overlap the
        grid; if the files hold different states or contradict each other.
    """
    listed = [paths] if isinstance(paths, str | Path) else list(paths)
    if not listed:
        raise DataError("paths is empty, expected one states file or more; give paths")
    with ExitStack() as stack:
        sources: list[_States] = []
        for path in map(Path, listed):
            dataset = stack.enter_context(open_source(path))
            names = _schema(dataset, path)
            lat, lon = find_centres(dataset, source=path)
            if "time" not in dataset.coords or any(set(dataset[n].dims) != {"time", lat, lon} for n in names):
                raise DataError(
                    f"{path} has states over {dataset[names[0]].dims}, expected time, {lat}, {lon}; rename its dimensions"
                )
            cut = footprint(dataset[lat].values, dataset[lon].values, box=grid.coarse, source=path)
            land = None if static is None else 1 - _ice_and_water(static, cut)
            steps = tuple(int(y) for y in years_in(dataset["time"], source=path, units=time_units))
            sources.append(_States(path, dataset, (lat, lon), names, steps, cut, land, units, cell_degrees))
        return _join(sources, years, grid)


def _join(sources: list[_States], years: Iterable[int] | None, grid: Grid) -> xr.DataArray:
    sources = sorted(sources, key=lambda s: min(s.years))
    names = sources[0].names
    other = next((s for s in sources if s.names != names), None)
    if other:
        raise DataError(
            f"{other.path} holds the states {list(other.names)}, expected those of {sources[0].path}, {list(names)}; use one release"
        )
    held = [y for s in sources for y in s.years]
    wanted = pick_years(held, years, source=", ".join(str(s.path) for s in sources))
    values = np.full((len(wanted), len(names), *grid.coarse.shape), np.nan, dtype=np.float32)
    reached = -(2**62)
    owner: dict[int, Path] = {}
    for source in sources:
        for some, shares in source.read([y for y in wanted if y in source.years]):
            for year, new in zip(some, shares, strict=True):
                old = values[wanted.index(year)]
                if year in owner:
                    both = np.isnan(old) == np.isnan(new)
                    gap = float(np.where(both, np.nan_to_num(np.abs(old - new)), 1).max())
                    if gap > 1e-6 and not (year == reached == min(source.years)):
                        raise DataError(
                            f"shares of {year} in {source.path} differ by {gap:g} from {owner[year]}, expected one value a year; "
                            "give only files that follow one another"
                        )
                    _log.log(
                        logging.WARNING if gap > 1e-6 else logging.INFO,
                        "%d is in %s and %s (largest difference %g): the latter is used",
                        *(year, owner[year], source.path, gap),
                    )
                old[:] = new
                owner[year] = source.path
        reached = max(reached, *source.years)
    return as_scenario(values, years=wanted, states=names, grid=grid)
