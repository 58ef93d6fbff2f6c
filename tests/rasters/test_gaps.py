from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from ai4land.errors import DataError
from ai4land.grid import FINE_DIMS
from ai4land.rasters.gaps import check_any, fill_far, fill_near, stand_ins


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), reach=st.sampled_from([1, 1.5, 2, 3, 4, np.inf]), bad=st.sampled_from([np.nan, np.inf]))
def test_gaps_take_a_nearest_value_within_reach_and_nothing_else_changes(seed, reach, bad):
    random = np.random.default_rng(seed)
    field = np.where(random.random((9, 11)) < 0.8, bad, random.random((9, 11))).astype(np.float32)
    field[4, 5] = 0.5
    mask = random.random(field.shape) < 0.6
    before = field.copy()
    filled = fill_near(field, mask=mask, reach=reach)
    np.testing.assert_array_equal(field, before)
    gaps, valid = mask & ~np.isfinite(field), np.argwhere(np.isfinite(field))
    np.testing.assert_array_equal(filled[~gaps], field[~gaps])
    for cell in np.argwhere(gaps):
        distance = np.hypot(*(valid - cell).T)
        if distance.min() > reach:
            assert not np.isfinite(filled[tuple(cell)])
            continue
        assert filled[tuple(cell)] in field[tuple(valid[np.isclose(distance, distance.min())].T)]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), reach=st.sampled_from([1.5, 3, np.inf]), cols=st.sampled_from([9, 12]))
def test_on_a_globe_the_nearest_value_may_lie_beyond_the_dateline(seed, reach, cols):
    random = np.random.default_rng(seed)
    field = np.where(random.random((5, cols)) < 0.9, np.nan, random.random((5, cols))).astype(np.float32)
    field[2, 0] = 0.5
    mask = random.random(field.shape) < 0.6
    filled = fill_near(field, mask=mask, reach=reach, wrap=True)
    valid = np.argwhere(np.isfinite(field))
    for row, col in np.argwhere(mask & ~np.isfinite(field)):
        across = np.abs(valid[:, 1] - col)
        distance = np.hypot(valid[:, 0] - row, np.minimum(across, cols - across))
        near = field[tuple(valid[np.isclose(distance, distance.min())].T)]
        assert filled[row, col] in near if distance.min() <= reach else np.isnan(filled[row, col])
    rolled = fill_near(np.roll(field, 4, 1), mask=np.roll(mask, 4, 1), reach=reach, wrap=True)
    np.testing.assert_array_equal(np.isfinite(rolled), np.isfinite(np.roll(filled, 4, 1)))


def test_what_has_no_gap_or_no_value_is_given_back():
    field, mask = np.ones((2, 2), np.float32), np.ones((2, 2), bool)
    assert fill_near(field, mask=mask) is field
    field[0, 0] = np.nan
    assert fill_near(field, mask=~mask) is field
    empty = np.full((2, 2), np.nan, np.float32)
    assert fill_near(empty, mask=mask) is empty


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), factor=st.integers(1, 5))
def test_the_valid_mapped_cell_nearest_to_the_middle_stands_for_a_coarse_cell(seed, factor):
    random = np.random.default_rng(seed)
    field = random.random((3 * factor, 2 * factor)).astype(np.float32)
    field[random.random(field.shape) < 0.7] = random.choice([np.nan, -np.inf])
    mask = random.random(field.shape) < 0.6
    found = stand_ins(field, mask=mask, factor=factor)
    for row, col in np.ndindex(found.shape):
        own = slice(row * factor, (row + 1) * factor), slice(col * factor, (col + 1) * factor)
        cells = np.argwhere(mask[own] & np.isfinite(field[own]))
        if not cells.size:
            assert np.isnan(found[row, col])
            continue
        away = np.hypot(*(cells - (factor - 1) / 2).T)
        assert found[row, col] in field[own][tuple(cells[np.isclose(away, away.min())].T)]


def test_far_gaps_take_what_stands_for_their_coarse_cell():
    field = np.array([[1, np.nan, np.nan, 4], [np.inf, 2, 3, np.nan]], np.float32)
    mask = np.array([[True, True, False, True], [True, True, True, True]])
    filled = fill_far(field, mask=mask, stand_in=np.array([[8.0, 9.0]], np.float32), factor=2)
    np.testing.assert_array_equal(filled, [[1, 8, np.nan, 4], [8, 2, 3, 9]])
    assert np.isnan(field[0, 1])


def test_empty_field_is_refused():
    field = xr.DataArray(np.full((2, 2), np.nan), dims=FINE_DIMS)
    with pytest.raises(DataError, match="bio1 is all nodata"):
        check_any("bio1", field)
    with pytest.raises(DataError, match="codes is all nodata"):
        check_any("codes", field.fillna(7), nodata=7)
    check_any("codes", field.fillna(7), nodata=0)
