"""Years as users write them and as files hold them."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from ai4land.errors import DataError
from ai4land.years import expand_years, pick_years, whole_year, years_in


@given(st.lists(st.tuples(st.integers(1000, 2100), st.integers(0, 30)), min_size=1, max_size=5))
def test_expand_years_is_the_sorted_union(ranges):
    parts = [f"{a} - {a + n}" if n else a for a, n in ranges]
    expected = sorted({y for a, n in ranges for y in range(a, a + n + 1)})
    assert expand_years(parts) == expected
    assert expand_years(expected) == expected


@pytest.mark.parametrize("value", [1992.9, True, np.bool_(True), None, "1992.5", "nineteen", [1992], float("nan"), float("inf")])
def test_what_is_no_whole_year_is_refused(value):
    with pytest.raises(ValueError, match="expected a whole number"):
        whole_year(value)
    for years in (value, [1990, value]) if value != [1992] else ([[1992]],):
        with pytest.raises(ValueError, match="expected numbers such as 1992"):
            expand_years(years)
    with pytest.raises(ValueError, match="expected a whole number"):
        pick_years([1, 1992], [value], source="x")


@pytest.mark.parametrize("value", [1992, "1992", " 1992 ", 1992.0, np.int16(1992), np.float64(1992)])
def test_a_whole_year_is_read_from_any_number(value):
    assert whole_year(value) == 1992 and expand_years(value) == [1992] == pick_years([1992], [value], source="x")


@pytest.mark.parametrize("value", ["1999-1992", "1992-", "-", "1992-1993-1994"])
def test_ranges_that_are_none_are_refused(value):
    with pytest.raises(ValueError, match="expected"):
        expand_years(value)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(851, 2500), min_size=1, max_size=20, unique=True),
    st.sampled_from(
        ["years since 850-01-01 0:0:0", "common_years since 850-1-1", "days since 850-01-01", "days since 1-5-1 00:00:00"]
    ),
    st.floats(0, 0.6),
)
def test_years_come_back_from_every_encoding(years, units, within):
    day = 365 if units.startswith("days") else 1
    since = 1 if "1-5-1" in units else 850
    time = xr.DataArray([(y - since + within) * day for y in years], dims="time", attrs={"units": units, "calendar": "noleap"})
    assert years_in(time, source="x").tolist() == years


def test_two_steps_in_a_year_are_refused():
    with pytest.raises(DataError, match="expected one a year"):
        years_in(xr.DataArray([0, 200], dims="time", attrs={"units": "days since 2000-01-01"}), source="x")


def test_no_year_is_refused():
    with pytest.raises(DataError, match=r"holds 2000\.\.2001"):
        pick_years([2000, 2001], [], source="x")
