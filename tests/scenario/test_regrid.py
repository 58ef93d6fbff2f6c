"""Conservative regridding and nesting: conservation, constants, seams and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from ai4land.errors import ConfigError, DataError
from ai4land.grid import centres, edges, make_grid
from ai4land.scenario.regrid import _average, _spread, _weights, cell_edges, find_centres, footprint, nested_index, sphere_areas

BOX = make_grid((-180, -90, 180, 90), coarse_cell=10, factor=1, shard=18).coarse


def world(rows, cols, *, west=-180.0, flip=False):
    lat = np.linspace(-90, 90, rows + 1)
    return (lat[::-1] if flip else lat), west + np.linspace(0, 360, cols + 1)


def regrid(values, *, lat_edges, lon_edges, box):
    """Average a field ``(..., lat, lon)`` over the cells of a box, as a footprint does with the part that it reads."""
    return _average(values, *_weights(lat_edges, lon_edges, box))


def valid_share(valid, *, lat_edges, lon_edges, box):
    """Share of each cell of a box that valid source cells cover: mean times share times area is the sum over the overlap."""
    return _spread(valid.astype(np.float64), *_weights(lat_edges, lon_edges, box))


def box_areas(box):
    lat = box.affine.f + np.arange(box.shape[0] + 1) * box.affine.e
    return sphere_areas(lat, box.affine.a, radius=1.0)[:, None]


sources = st.tuples(
    st.integers(2, 31), st.integers(2, 47), st.floats(-360, 360), st.booleans(), st.floats(0, 0.9), st.integers(0, 2**32 - 1)
)


@settings(max_examples=40, deadline=None)
@given(sources)
def test_global_integral_is_conserved(source):
    rows, cols, west, flip, gaps, seed = source
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(2, rows, cols))
    valid = rng.random((rows, cols)) >= gaps
    lat, lon = world(rows, cols, west=west, flip=flip)
    out = regrid(np.where(valid, values, np.nan), lat_edges=lat, lon_edges=lon, box=BOX)
    share = valid_share(valid, lat_edges=lat, lon_edges=lon, box=BOX)
    there = (np.where(np.isnan(out), 0, out) * share * box_areas(BOX)).sum(axis=(1, 2))
    here = (np.where(valid, values, 0) * sphere_areas(lat, 360 / cols, radius=1.0)[:, None]).sum(axis=(1, 2))
    np.testing.assert_allclose(there, here, atol=2e-5)
    assert np.isnan(out[0][share < 1e-7]).all() and np.isfinite(out[0][share > 1e-5]).all()


@settings(max_examples=30, deadline=None)
@given(sources, st.floats(-1e3, 1e3))
def test_constants_stay_constant(source, constant):
    rows, cols, west, flip, gaps, seed = source
    values = np.where(np.random.default_rng(seed).random((rows, cols)) >= gaps, constant, np.nan)
    lat, lon = world(rows, cols, west=west, flip=flip)
    out = regrid(values, lat_edges=lat, lon_edges=lon, box=BOX)
    np.testing.assert_allclose(out[np.isfinite(out)], constant, rtol=1e-9, atol=1e-9)
    assert np.isfinite(out).any() == np.isfinite(values).any()


def test_identical_grid_is_exact():
    values = np.random.default_rng(0).normal(size=(18, 36))
    lat, lon = world(18, 36, flip=True)
    np.testing.assert_allclose(regrid(values, lat_edges=lat, lon_edges=lon, box=BOX), values, rtol=1e-12)


def test_overlap_agrees_with_sampling_points():
    rng = np.random.default_rng(1)
    lat, lon = world(13, 17, west=3.0)
    values = rng.random((13, 17))
    out = regrid(values, lat_edges=lat, lon_edges=lon, box=BOX)
    for row, col in ((0, 0), (7, 18), (17, 35)):
        north, west = 90 - 10 * row, -180 + 10 * col
        y, x = north - (np.arange(400) + 0.5) / 40, west + (np.arange(400) + 0.5) / 40
        seen = values[np.searchsorted(lat, y) - 1][:, np.searchsorted(lon, (x - 3) % 360 + 3) - 1]
        assert out[row, col] == pytest.approx(np.average(seen.mean(axis=1), weights=np.cos(np.deg2rad(y))), abs=3e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 71), st.booleans(), st.integers(0, 2**32 - 1))
def test_nested_source_is_picked_unchanged(turn, flip, seed):
    grid = make_grid((-20, 30, 20, 60), coarse_cell=5, factor=2, shard=4)
    lat = np.arange(-87.5, 90, 5.0)[:: -1 if flip else 1]
    lon = np.roll(np.arange(-177.5, 180, 5.0), turn)
    values = np.random.default_rng(seed).random((3, 36, 72)).astype(np.float32)
    field = xr.DataArray(values, dims=("t", "lat", "lon"), coords={"lat": lat, "lon": lon})
    cut = footprint(lat, lon, box=grid.coarse, source="field")
    assert cut.nested and (cut.lat.size, cut.lon.size) == grid.coarse.shape
    y, x = centres(grid.coarse)
    np.testing.assert_array_equal(cut.to_box(cut.cut(field, dims=("lat", "lon"))), field.sel(lat=y, lon=x).values)


@settings(max_examples=30, deadline=None)
@given(st.floats(-360, 360), st.integers(20, 60), st.booleans())
def test_cut_gives_what_the_whole_source_gives(west, cols, flip):
    grid = make_grid((-20, 30, 20, 60), coarse_cell=5, factor=2, shard=4)
    lat_edges, lon_edges = world(29, cols, west=west, flip=flip)
    lat, lon = (lat_edges[1:] + lat_edges[:-1]) / 2, (lon_edges[1:] + lon_edges[:-1]) / 2
    values = np.random.default_rng(cols).random((29, cols))
    cut = footprint(lat, lon, box=grid.coarse, source="field")
    part = cut.cut(xr.DataArray(values, dims=("lat", "lon")), dims=("lat", "lon"))
    assert part.shape == (cut.lat.size, cut.lon.size) and part.size < values.size / 2
    whole = regrid(values, lat_edges=lat_edges, lon_edges=lon_edges, box=grid.coarse)
    np.testing.assert_allclose(cut.to_box(part), whole, rtol=1e-9)


@pytest.mark.parametrize("shift,step", [(0.01, 1.0), (0.0, 0.5), (0.0, 1.01), (0.5, 1.0)])
def test_other_cells_are_not_nested(shift, step):
    box = make_grid((0, 0, 8, 8), coarse_cell=1, factor=1, shard=4, origin=(0, 8)).coarse
    lat, lon = (np.arange(step / 2, 10, step) + shift for _ in "yx")
    assert nested_index(lat, lon, box) is None


def test_cells_within_a_thousandth_are_nested():
    box = make_grid((0, 0, 8, 8), coarse_cell=1, factor=1, shard=4, origin=(0, 8)).coarse
    rows, cols = nested_index(np.arange(0.5, 6) + 5e-4, np.arange(0.5, 6) - 5e-4, box)
    assert rows.tolist() == [-1, -1, 5, 4, 3, 2, 1, 0] and cols.tolist() == [0, 1, 2, 3, 4, 5, -1, -1]


def test_nothing_beyond_a_nested_or_other_source():
    box = make_grid((0, 0, 8, 8), coarse_cell=1, factor=1, shard=4, origin=(0, 8)).coarse
    for step in (1.0, 0.7):
        lat = lon = np.arange(step / 2, 5, step)
        cut = footprint(lat, lon, box=box, source="field")
        out = cut.to_box(np.ones((lat.size, lon.size)))
        assert np.isnan(out[0]).all() and np.isnan(out[:, -1]).all() and (out[-4:, :4] == pytest.approx(1))


@given(st.floats(-89, 0), st.floats(0.05, 2), st.integers(2, 40), st.booleans())
def test_edges_lie_half_a_step_round_the_centres(first, step, n, flip):
    centre = (first + step * np.arange(n))[:: -1 if flip else 1]
    found = cell_edges(centre)
    np.testing.assert_allclose((found[1:] + found[:-1]) / 2, centre, atol=1e-9)


@pytest.mark.parametrize("centre", [[1.0], [0.0, 1.0, 2.1], [1.0, 1.0], [0.0, np.nan, 2.0]])
def test_irregular_coordinates_are_refused(centre):
    with pytest.raises(DataError, match="expected"):
        cell_edges(np.array(centre))


def test_refusals_name_the_source():
    lat, lon = np.arange(0.5, 10), np.arange(0.5, 10)
    far = make_grid((-60, -40, -50, -30), coarse_cell=1, factor=1, shard=10).coarse
    with pytest.raises(DataError, match=r"x\.nc covers .* expected some overlap"):
        footprint(lat, lon, box=far, source="x.nc")
    utm = make_grid((5e5, 5e6, 6e5, 51e5), coarse_cell=1e4, factor=1, shard=10, origin=(5e5, 51e5), crs="EPSG:32632").coarse
    assert edges(utm)[0] == 5e5
    with pytest.raises(ConfigError, match="expected degrees"):
        footprint(lat, lon, box=utm, source="x.nc")
    with pytest.raises(DataError, match="expected at most 360"):
        regrid(np.ones((10, 40)), lat_edges=np.arange(11), lon_edges=np.arange(0, 410, 10), box=BOX)
    with pytest.raises(DataError, match="latitude named one of"):
        find_centres(xr.Dataset(coords={"lon": lon}), source="x.nc")
    with pytest.raises(DataError, match="reaches 950000"):
        find_centres(xr.Dataset(coords={"y": lat * 1e5, "x": lon}), source="x.nc")
