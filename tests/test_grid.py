from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import zarr
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox

from ai4land.errors import ConfigError
from ai4land.grid import (
    COARSE_DIMS,
    FINE_DIMS,
    Grid,
    Window,
    block_sum,
    coarse_window,
    make_grid,
    read_coarse,
    read_window,
    spatial_ref,
    tiles,
)
from ai4land.model.unet import interpolate

GLOBE = (-180.0, -90.0, 180.0, 90.0)
ELLIPSOID = 510065621724088.0
"""Area of the WGS 84 ellipsoid in square metres (NGA.STND.0036, derived constants: 4 pi times the authalic radius squared)."""

spans = st.builds(Window, st.integers(-25, 25), st.integers(-40, 40), st.integers(1, 30), st.integers(1, 40))


def reference_window(array, window: Window, *, fill: float, wrap: bool):
    out = np.full((*array.shape[:-2], window.height, window.width), fill, dtype=array.dtype)
    for i in range(window.height):
        for j in range(window.width):
            row, col = window.row + i, window.col + j
            if wrap:
                col %= array.shape[-1]
            if 0 <= row < array.shape[-2] and 0 <= col < array.shape[-1]:
                out[..., i, j] = array[..., row, col]
    return out


@given(
    west=st.floats(-170, 100), south=st.floats(-80, 60), width=st.floats(0.5, 40), height=st.floats(0.5, 20),
    coarse=st.sampled_from([1.0, 0.5, 100 / 360 * 2]), factor=st.sampled_from([1, 2, 5]), cells=st.sampled_from([1, 3]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_every_fine_cell_is_in_one_shard_and_one_coarse_cell(west, south, width, height, coarse, factor, cells):
    grid = make_grid((west, south, west + width, south + height), coarse_cell=coarse, factor=factor, shard=factor * cells)
    count = np.zeros(grid.shape, int)
    for w in grid.shards():
        assert (w.height, w.width) == (grid.shard, grid.shard)
        assert w.row % factor == 0
        assert w.col % factor == 0
        count[w.slices] += 1
    assert (count == 1).all()
    coords = grid.coords()
    for fine, whole in zip(FINE_DIMS, COARSE_DIMS, strict=True):
        assert coords[whole].size * factor == coords[fine].size
        step = abs(grid.coarse.affine.a)
        inside = abs(coords[fine].reshape(-1, factor) - coords[whole][:, None]) < step / 2
        assert inside.all()
    w, s, e, n = grid.bounds
    assert w <= west + 1e-6
    assert s <= south + 1e-6
    assert e >= west + width - 1e-6
    assert n >= south + height - 1e-6


@pytest.mark.parametrize(("coarse", "factor", "shard"), [(100 / 360, 10, 40), (0.25, 5, 60), (0.5, 7, 28), (5.0, 16, 288)])
@pytest.mark.parametrize("origin", [(-180.0, 90.0), (-180.0 + 0.5, 90.0)])
def test_region_has_bitwise_the_coordinates_of_the_globe(coarse, factor, shard, origin):
    globe = make_grid((origin[0], -90.0, origin[0] + 360.0, 90.0), coarse_cell=coarse, factor=factor, shard=shard, origin=origin)
    region = make_grid((9.1, 47.3, 13.8, 50.5), coarse_cell=coarse, factor=factor, shard=shard, origin=origin)
    for fine, whole in zip(FINE_DIMS, COARSE_DIMS, strict=True):
        for dim in (fine, whole):
            assert np.isin(region.coords()[dim], globe.coords()[dim]).all()
            assert np.allclose(np.diff(region.coords()[dim]), np.diff(globe.coords()[dim])[0], rtol=1e-6)
    assert globe.wraps
    assert not region.wraps
    res = coarse / factor
    assert region.coords()["longitude"][0] == pytest.approx(region.bounds[0] + res / 2, abs=res * 1e-5)
    assert region.coords()["latitude"][0] == pytest.approx(region.bounds[3] - res / 2, abs=res * 1e-5)


def test_cell_areas_sum_to_the_ellipsoid_and_are_additive():
    fine = make_grid(GLOBE, coarse_cell=5.0, factor=4, shard=144)
    assert fine.cell_areas().sum() * fine.shape[1] == pytest.approx(ELLIPSOID, rel=1e-9)
    coarse = Grid(fine.coarse, 1, 36)
    assert np.allclose(fine.cell_areas().reshape(-1, 4).sum(1) * 4, coarse.cell_areas(), rtol=1e-10)
    assert np.allclose(fine.cell_areas(), fine.cell_areas()[::-1], rtol=1e-9)
    region = make_grid((0, 0, 180, 90), coarse_cell=5.0, factor=4, shard=72)
    assert np.allclose(region.cell_areas(), fine.cell_areas()[:72], rtol=1e-9)


def test_cell_areas_of_a_projected_grid_are_flat():
    grid = make_grid((4e6, 3e6, 4.01e6, 3.01e6), coarse_cell=1000, factor=10, shard=100, origin=(0.0, 0.0), crs="EPSG:3035")
    assert np.allclose(grid.cell_areas(), 100.0**2)
    assert not grid.geographic
    assert not grid.wraps


@given(window=spans, wrap=st.booleans(), rows=st.integers(1, 20), cols=st.integers(1, 24), lead=st.sampled_from([(), (3,)]))
@settings(max_examples=150, deadline=None)
def test_read_window_equals_the_reference(window, wrap, rows, cols, lead):
    array = np.arange(math.prod((*lead, rows, cols)), dtype=np.int32).reshape(*lead, rows, cols)
    got = read_window(array, window, fill=-9, wrap=wrap)
    assert got.dtype == array.dtype
    assert np.array_equal(got, reference_window(array, window, fill=-9, wrap=wrap))


@given(window=spans, wrap=st.booleans())
@settings(max_examples=25, deadline=None)
def test_read_window_of_zarr_equals_numpy(window, wrap):
    array = np.arange(2 * 12 * 20, dtype=np.float32).reshape(2, 12, 20)
    stored = zarr.create_array(zarr.storage.MemoryStore(), data=array, chunks=(1, 5, 7))
    expected = reference_window(array, window, fill=np.nan, wrap=wrap)
    assert np.array_equal(read_window(stored, window, fill=np.nan, wrap=wrap), expected, equal_nan=True)


@given(
    factor=st.integers(1, 9),
    row=st.integers(-60, 60),
    col=st.integers(-60, 60),
    height=st.integers(1, 30),
    width=st.integers(1, 30),
)
def test_coarse_window_covers_both_neighbours_of_every_fine_cell(factor, row, col, height, width):
    window, offset = coarse_window(Window(row, col, height, width), factor)
    assert (window.height, window.width) == (-(-height // factor) + 3, -(-width // factor) + 3)
    assert offset == (row - window.row * factor, col - window.col * factor)
    for first, count, low, cells in ((row, height, window.row, window.height), (col, width, window.col, window.width)):
        for fine in (first, first + count - 1):
            below = math.floor((fine + 0.5) / factor - 0.5)
            assert low <= below
            assert below + 1 <= low + cells - 1
    weights = interpolate(torch.ones(1, 1, window.height, window.width), torch.tensor([offset]), (height, width), factor)
    assert torch.allclose(weights, torch.ones_like(weights), atol=1e-6)


@given(window=spans, wrap=st.booleans(), rows=st.integers(1, 9), cols=st.integers(1, 9))
@settings(deadline=None)
def test_read_coarse_repeats_edges_and_wraps(window, wrap, rows, cols):
    array = np.arange(2 * rows * cols).reshape(2, rows, cols)
    got = read_coarse(array, window, wrap=wrap)
    for i in range(window.height):
        for j in range(0, window.width, 3):
            row = min(max(window.row + i, 0), rows - 1)
            col = (window.col + j) % cols if wrap else min(max(window.col + j, 0), cols - 1)
            assert np.array_equal(got[:, i, j], array[:, row, col])


def test_dict_round_trip_keeps_the_grid():
    grid = make_grid((9.0, 47.3, 13.8, 50.5), coarse_cell=100 / 360, factor=10, shard=40)
    again = Grid.from_dict(grid.to_dict())
    assert again == grid
    assert all(np.array_equal(again.coords()[k], v) for k, v in grid.coords().items())


def test_block_sum_tiles_and_spatial_ref():
    values = np.arange(2 * 6 * 9).reshape(2, 6, 9)
    assert block_sum(values, 3)[1, 1, 2] == values[1, 3:6, 6:9].sum()
    count = np.zeros((7, 10), int)
    for w in tiles((7, 10), 4):
        count[w.slices] += 1
    assert (count == 1).all()
    ref = spatial_ref(make_grid((0, 0, 10, 10), coarse_cell=1.0, factor=2, shard=20).fine)
    assert ref.attrs["grid_mapping_name"] == "latitude_longitude"
    assert [float(v) for v in ref.attrs["GeoTransform"].split()] == [0.0, 0.5, 0.0, 10.0, 0.0, -0.5]
    with pytest.raises(ConfigError, match="no coordinate reference system"):
        spatial_ref(GeoBox((2, 2), Affine(1, 0, 0, 0, -1, 0), None))


@pytest.mark.parametrize(
    ("bbox", "kwargs", "message"),
    [
        ((10, 0, 5, 5), {}, "expected west < east"),
        ((0, 5, 5, 0), {}, "south < north"),
        ((0, 0, 5, 5), {"shard": 10}, "shard is 10 fine cells, expected a multiple.*try shard=8"),
        ((0, 0, 5, 5), {"shard": 0}, "shard is 0 fine cells"),
        ((0, 0, 5, 5), {"coarse_cell": 0.0}, "coarse cell is 0.0"),
        ((0, -90, 5, 90), {"coarse_cell": 7.0, "shard": 4}, "reach from .* expected at most -90..90"),
        ((-180, 0, 180, 5), {"coarse_cell": 7.0, "shard": 4}, "over 364 of longitude"),
    ],
)
def test_make_grid_refuses(bbox, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        make_grid(bbox, **{"coarse_cell": 1.0, "factor": 4, "shard": 8, **kwargs})


@pytest.mark.parametrize(
    ("shape", "transform", "shard", "message"),
    [((8, 9), Affine(1, 0, 0, 0, -1, 8), 4, "whole shards of 4"), ((8, 8), Affine(1, 0, 0, 0, 1, 0), 4, "north up"),
     ((8, 8), Affine(1, 0, 0, 0, -1, 8), 3, "expected a multiple"), ((8, 8), Affine(1, 0, 0, 0, -1, 8), 0, "shard is 0")],
)  # fmt: skip
def test_grid_refuses(shape, transform, shard, message):
    with pytest.raises(ConfigError, match=message):
        Grid(GeoBox(shape, transform, "EPSG:4326"), 2, shard)
