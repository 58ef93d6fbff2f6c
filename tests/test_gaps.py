from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from ai4land.errors import DataError
from ai4land.gaps import check_any, check_finite, fill_gaps
from ai4land.grid import FINE_DIMS, make_grid

GRID = make_grid((-6, -4, 10, 8), coarse_cell=2.0, factor=4, shard=8, origin=(-6.0, 8.0))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), limit=st.one_of(st.none(), st.integers(1, 4)))
def test_gaps_take_a_nearest_value_and_nothing_else_changes(seed, limit):
    random = np.random.default_rng(seed)
    field = np.where(random.random((9, 11)) < 0.7, np.nan, random.random((9, 11)))
    field[4, 5] = 0.5
    mask = random.random(field.shape) < 0.6
    filled, share = fill_gaps(field, mask=mask, max_distance=limit)
    gaps, valid = mask & np.isnan(field), np.argwhere(np.isfinite(field))
    np.testing.assert_array_equal(filled[~gaps], field[~gaps])
    done = 0
    for cell in np.argwhere(gaps):
        distance = np.hypot(*(valid - cell).T)
        if limit is not None and distance.min() > limit:
            assert np.isnan(filled[tuple(cell)])
            continue
        done += 1
        nearest = valid[np.isclose(distance, distance.min())]
        assert filled[tuple(cell)] in field[tuple(nearest.T)]
    assert share == pytest.approx(done / mask.sum() if gaps.any() else 0.0)


def test_gaps_of_an_array_with_coordinates_keep_them_and_need_a_value():
    field = xr.DataArray(np.full((2, 2), np.nan), dims=FINE_DIMS, coords={"latitude": [1.0, 0.0], "longitude": [5.0, 6.0]})
    with pytest.raises(DataError, match="all NaN"):
        fill_gaps(field, mask=np.ones((2, 2), bool))
    field[0, 0] = 3
    filled, share = fill_gaps(field, mask=np.array([[True, True], [False, False]]))
    assert filled.values[0].tolist() == [3, 3] and np.isnan(filled.values[1]).all() and share == 0.5
    assert filled.identical(filled.assign_coords(field.coords))


def test_cells_left_missing_are_counted_and_placed():
    field = xr.DataArray(np.zeros(GRID.shape), dims=FINE_DIMS, coords={d: GRID.coords()[d] for d in FINE_DIMS})
    mask = np.ones(GRID.shape, bool)
    check_finite("bio1", field, mask)
    field[3, 4], field[5, 6] = np.nan, np.inf
    for given_field, grid in ((field, None), (field.values, GRID)):
        with pytest.raises(DataError, match=r"bio1 is NaN or infinite in 2 of 768 .*longitude -3.75, latitude 6.25"):
            check_finite("bio1", given_field, mask, grid=grid)
    with pytest.raises(DataError, match="row 3, column 4"):
        check_finite("bio1", field.values, mask)
    mask[3, 4] = mask[5, 6] = False
    check_finite("bio1", field, mask)
    with pytest.raises(DataError, match="all nodata"):
        check_any("bio1", field * np.nan)
