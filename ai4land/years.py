"""Calendar years, parsed from user input and decoded from the time coordinates of files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ai4land.errors import DataError

if TYPE_CHECKING:
    import xarray as xr

_YEARS_SINCE = re.compile(r"^\s*(?:common_)?years?\s+since\s+(-?\d+)(?:-(\d+)(?:-(\d+))?)?", re.IGNORECASE)


def whole_year(value: Any) -> int:
    """Read one year, a whole number or its digits.

    Raises
    ------
    ValueError
        If it is anything else, such as 1992.9 or true.
    """
    try:
        year = int(value)
    except (TypeError, ValueError, OverflowError):
        year = None
    if year is None or isinstance(value, bool | np.bool_) or (not isinstance(value, str) and year != value):
        raise ValueError(f"year is {value!r}, expected a whole number such as 1992; mend it")
    return year


def expand_years(value: Any) -> Any:
    """Expand ``1992-1999``, a number, or a list of both, into a sorted list of years.

    Raises
    ------
    ValueError
        If a part is neither a year nor a range, or a range runs backwards.

    >>> expand_years(["1992-1994", 2001])
    [1992, 1993, 1994, 2001]
    """
    years: set[int] = set()
    for part in value if isinstance(value, list | tuple | range) else [value]:
        if isinstance(part, str) and (match := re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", part)):
            first, last = int(match[1]), int(match[2])
            if first > last:
                raise ValueError(f"years are {part!r}, expected the first year first")
            years.update(range(first, last + 1))
        else:
            try:
                years.add(whole_year(part))
            except ValueError as error:
                raise ValueError(f"years are {value!r}, expected numbers such as 1992, or ranges such as 1992-1999") from error
    return sorted(years)


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
        import netCDF4

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
    """Sort the wanted years (None: all) and check that they exist.

    >>> pick_years([2016, 2015], None, source="states.nc")
    [2015, 2016]
    """
    there = sorted({int(y) for y in held})
    years = there if wanted is None else sorted({whole_year(y) for y in wanted})
    lacking = sorted(set(years) - set(there))
    if lacking or not years:
        gaps = "" if there[-1] - there[0] + 1 == len(there) else f" with gaps ({len(there)} years)"
        raise DataError(
            f"years are {lacking}, expected years of {source}, which holds {there[0]}..{there[-1]}{gaps}; choose other years"
        )
    return years
