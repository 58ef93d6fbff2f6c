from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import pyproj
import pytest
import rasterio
import xarray as xr
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ai4land.errors import ConfigError, DataError
from ai4land.grid import FINE_DIMS, Grid, Window, make_grid
from ai4land.rasters import read
from ai4land.rasters.file import open_layer
from ai4land.rasters.read import open_raster

GRID = make_grid((-6, -4, 10, 8), coarse_cell=2.0, factor=4, shard=8, origin=(-6.0, 8.0))
GLOBE = make_grid((-180, -90, 180, 90), coarse_cell=10, factor=4, shard=36)


def write_tif(path: Path, values, transform, *, crs="EPSG:4326", nodata=None, names=(), **options) -> Path:
    bands = values if values.ndim == 3 else values[None]
    profile = {"driver": "GTiff", "count": bands.shape[0], "height": bands.shape[1], "width": bands.shape[2]}
    with rasterio.open(path, "w", **profile, dtype=bands.dtype, crs=crs, transform=transform, nodata=nodata, **options) as file:
        file.write(bands)
        for number, name in enumerate(names, 1):
            file.set_band_description(number, name)
    return path


def centres(grid: Grid):
    coords = grid.coords()
    return np.meshgrid(coords["longitude"], coords["latitude"])


def write_nc(path: Path, values, lat, lon, *, dims=("lat", "lon"), attrs=None, name="elevation", **encoding) -> Path:
    field = xr.DataArray(values, dims=dims, coords={dims[0]: lat, dims[1]: lon}, name=name, attrs=attrs or {})
    field.to_netcdf(path, encoding={name: encoding} if encoding else None)
    return path


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=st.integers(-20, 20), col=st.integers(-28, 28), south_up=st.booleans(), jitter=st.floats(-0.015, 0.015))
def test_exact_cuts_and_pads_and_changes_nothing(tmp_path, row, col, south_up, jitter):
    rows, cols = GRID.shape
    big = np.full((rows + 60, cols + 60), -1, dtype=np.int16)
    values = np.arange(rows * cols, dtype=np.int16).reshape(rows, cols)
    t = GRID.fine.affine * Affine.translation(col + jitter, row + jitter)
    stored = values[::-1] if south_up else values
    path = write_tif(tmp_path / "a.tif", stored, t * Affine(1, 0, 0, 0, -1, rows) if south_up else t)
    big[30 + row : 30 + row + rows, 30 + col : 30 + col + cols] = values
    want = big[30 : 30 + rows, 30 : 30 + cols]
    if abs(row) >= rows or abs(col) >= cols:
        with pytest.raises(DataError, match="does not meet the grid"):
            open_raster(path, grid=GRID, resampling="exact", dtype="int16", nodata=-1)
        return
    field = open_raster(path, grid=GRID, resampling="exact", dtype="int16", nodata=-1)
    np.testing.assert_array_equal(field.values, want)
    assert field.dims == FINE_DIMS and field.attrs["nodata"] == -1
    as_float = open_raster(path, grid=GRID, resampling="exact")
    np.testing.assert_array_equal(as_float.values, np.where(want == -1, np.nan, want.astype("float32")))


def test_coordinates_are_the_grids_own(tmp_path):
    t = GRID.fine.affine * Affine.translation(1e-3, -1e-3)
    field = open_raster(write_tif(tmp_path / "a.tif", np.ones(GRID.shape, "float32"), t), grid=GRID, resampling="exact")
    for name in FINE_DIMS:
        assert np.array_equal(field[name].values, GRID.coords()[name])
    assert set(field.coords) == set(FINE_DIMS) and field.dtype == np.float32


@pytest.mark.parametrize("resampling", ["nearest", "mode", "min", "max", "bilinear", "average"])
def test_cells_that_coincide_keep_their_values_in_every_resampling(tmp_path, resampling):
    grid = make_grid((9, 47, 10, 48), coarse_cell=100 / 360, factor=10, shard=20)
    values = np.random.default_rng(0).integers(1, 50, grid.shape).astype("float32")
    values[::3, ::2] = np.nan
    path = write_tif(tmp_path / "a.tif", values, grid.fine.affine, nodata=np.nan)
    got = open_raster(path, grid=grid, resampling=resampling).values
    inside = np.isfinite(values)
    np.testing.assert_array_equal(got[inside], values[inside])
    if resampling != "bilinear":
        assert np.isnan(got[~inside]).all()


def test_average_is_the_mean_of_the_cells_and_skips_missing_ones(tmp_path):
    values = np.random.default_rng(1).random((GRID.shape[0] * 3, GRID.shape[1] * 3)).astype("float32")
    values[0, 0] = -9999
    values[3:6, 3:6] = -9999
    path = write_tif(tmp_path / "a.tif", values, GRID.fine.affine * Affine.scale(1 / 3), nodata=-9999)
    got = open_raster(path, grid=GRID, resampling="average").values
    blocks = np.where(values == -9999, np.nan, values).reshape(GRID.shape[0], 3, GRID.shape[1], 3)
    counts = np.isfinite(blocks).sum(axis=(1, 3))
    want = np.where(counts > 0, np.nansum(blocks, axis=(1, 3)) / np.maximum(counts, 1), np.nan)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("finer", [0.25, 0.5, 1, 2, 3, 4, 8])
@pytest.mark.parametrize("resampling", ["nearest", "mode", "bilinear", "average"])
def test_cells_of_any_size_that_begin_with_the_grid_are_seen(tmp_path, finer, resampling):
    shape = tuple(int(n * finer) for n in GRID.shape)
    path = write_tif(tmp_path / "a.tif", np.full(shape, 7, "float32"), GRID.fine.affine * Affine.scale(1 / finer))
    for window in (None, *GRID.shards()):
        assert (open_raster(path, grid=GRID, resampling=resampling, window=window) == 7).all()


def test_overviews_are_never_used(tmp_path):
    big = np.zeros((GRID.shape[0] * 4, GRID.shape[1] * 4), "float32")
    big[1::2, 1::2] = 4.0
    path = write_tif(tmp_path / "a.tif", big, GRID.fine.affine * Affine.scale(0.25), tiled=True, blockxsize=16, blockysize=16)
    with rasterio.open(path, "r+") as file:
        file.build_overviews([2, 4], rasterio.enums.Resampling.nearest)
        assert file.overviews(1) == [2, 4]
    np.testing.assert_allclose(open_raster(path, grid=GRID, resampling="average").values, 1.0)


def test_small_strips_give_the_same_result(tmp_path, monkeypatch):
    values = np.random.default_rng(2).random((90, 130)).astype("float32")
    path = write_tif(tmp_path / "a.tif", values, Affine(0.13, 0, -6.3, 0, -0.14, 8.2))
    whole = {r: open_raster(path, grid=GRID, resampling=r).values for r in ("bilinear", "average", "mode")}
    monkeypatch.setattr("ai4land.rasters.read._STRIP_CELLS", 200)
    for resampling, want in whole.items():
        np.testing.assert_allclose(open_raster(path, grid=GRID, resampling=resampling).values, want, rtol=1e-6)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), resampling=st.sampled_from(["exact", "nearest", "mode", "bilinear", "average"]))
def test_a_window_has_the_cells_of_the_whole(tmp_path, data, resampling):
    row, col = (data.draw(st.integers(0, n - 1)) for n in GRID.shape)
    window = Window(row, col, *(data.draw(st.integers(1, n - k)) for n, k in zip(GRID.shape, (row, col), strict=True)))
    values = np.random.default_rng(3).random((90, 130)).astype("float32")
    lattice = GRID.fine.affine * Affine.translation(-2, 3)
    path = write_tif(tmp_path / "a.tif", values, lattice if resampling == "exact" else Affine(0.13, 0, -4.1, 0, -0.14, 8.2))
    whole = open_raster(path, grid=GRID, resampling=resampling)
    part = open_raster(path, grid=GRID, resampling=resampling, window=window)
    np.testing.assert_allclose(part.values, whole.values[window.slices], rtol=2e-6)
    for name, along in zip(FINE_DIMS, window.slices, strict=True):
        assert np.array_equal(part[name].values, whole[name].values[along])


def test_a_window_from_another_reference_system_is_off_by_a_fraction_of_a_cell(tmp_path):
    there = pyproj.Transformer.from_crs("EPSG:4326", "EPSG:3035", always_xy=True)
    grid = make_grid((0, 40, 20, 60), coarse_cell=1, factor=20, shard=100, origin=(0, 60))
    slope = Affine(4000, 0, 2_500_000, 0, -4000, 4_500_000)
    x, _ = np.meshgrid(*(2_500_000 + 4000 * (np.arange(700) + 0.5), np.arange(800)))
    path = write_tif(tmp_path / "a.tif", x.astype("float32"), slope, crs="EPSG:3035")
    for resampling in ("nearest", "bilinear", "average"):
        for window in grid.shards()[:6]:
            part = open_raster(path, grid=grid, resampling=resampling, window=window)
            want, _ = there.transform(*np.meshgrid(part["longitude"].values, part["latitude"].values))
            off = np.abs(part.values - want)[np.isfinite(part.values)] / 4000
            assert off.size and off.max() < (0.65 if resampling == "nearest" else 0.3)


def test_a_window_without_a_value_is_no_error(tmp_path):
    path = write_tif(tmp_path / "a.tif", np.ones((4, 4), "float32"), GRID.fine.affine)
    assert open_raster(path, grid=GRID, resampling="exact", window=Window(8, 8, 3, 5)).isnull().all()
    assert (open_raster(path, grid=GRID, resampling="exact", dtype="uint8", nodata=7, window=Window(8, 8, 3, 5)) == 7).all()


def test_bilinear_is_right_to_the_dateline(tmp_path):
    def wave(lon, lat):
        return np.cos(np.deg2rad(lon + 170)) * np.cos(np.deg2rad(lat))

    lon, lat = np.arange(-175, 180, 10.0), np.arange(85, -90, -10.0)
    path = write_nc(tmp_path / "a.nc", wave(*np.meshgrid(lon, lat)), lat, lon)
    got = open_raster(path, grid=GLOBE, resampling="bilinear").values
    inner = slice(8, -8)
    assert np.abs(got - wave(*centres(GLOBE)))[inner].max() < 0.01
    assert np.abs(np.diff(np.c_[got[:, -1], got[:, 0]], axis=1))[inner].max() < 0.05


@pytest.mark.parametrize("north_up", [True, False])
@pytest.mark.parametrize("names", [("lat", "lon"), ("latitude", "longitude"), ("y", "x"), ("row", "col")])
def test_netcdf_of_any_order_and_names(tmp_path, north_up, names):
    lon, lat = np.arange(-8, 12, 0.5) + 0.25, np.arange(10, -6, -0.5) - 0.25
    lat = lat if north_up else lat[::-1]
    x, y = np.meshgrid(lon, lat)
    path = tmp_path / "a.nc"
    field = xr.DataArray(
        (100 * y + x).astype("f4"), dims=names, coords=dict(zip(names, (lat, lon), strict=True)), name="elevation"
    )
    for name, standard, unit in zip(names, ("latitude", "longitude"), ("degrees_north", "degrees_east"), strict=True):
        field[name].attrs = {"standard_name": standard, "units": unit}
    field.to_netcdf(path)
    got = open_raster(path, grid=GRID, resampling="exact")
    x, y = centres(GRID)
    np.testing.assert_allclose(got.values, 100 * y + x, rtol=1e-6)
    assert got.name == "elevation"


def test_zarr_is_read_and_third_dimension_chosen(tmp_path):
    lon, lat = np.arange(-6, 10, 0.5) + 0.25, np.arange(8, -4, -0.5) - 0.25
    values = np.arange(2.0)[:, None, None] + np.zeros((2, lat.size, lon.size))
    coords = {"month": ["jan", "feb"], "lat": lat, "lon": lon}
    dataset = xr.Dataset({"t": (("month", "lat", "lon"), values), "other": ("month", [1, 2])}, coords)
    dataset.to_zarr(tmp_path / "a.zarr", zarr_format=3, consolidated=False)
    assert (open_raster(tmp_path / "a.zarr", grid=GRID, resampling="exact", band="feb") == 1).all()
    assert (open_raster(tmp_path / "a.zarr", grid=GRID, resampling="exact", band=1) == 0).all()
    with pytest.raises(DataError, match=r"steps of month .*jan, feb"):
        open_raster(tmp_path / "a.zarr", grid=GRID, resampling="exact")


def test_packed_netcdf_is_unpacked_and_its_fill_is_missing(tmp_path):
    lon, lat = np.arange(-6, 10, 0.5) + 0.25, np.arange(8, -4, -0.5) - 0.25
    values = np.full((lat.size, lon.size), 12.5)
    values[0, 0] = np.nan
    path = write_nc(tmp_path / "a.nc", values, lat, lon, dtype="i2", scale_factor=0.5, add_offset=10.0, _FillValue=-99)
    got = open_raster(path, grid=GRID, resampling="exact").values
    assert np.isnan(got[0, 0]) and np.nanmin(got) == np.nanmax(got) == 12.5
    with pytest.raises(DataError, match=r"scale 0.5 and offset 10"):
        open_raster(path, grid=GRID, resampling="exact", dtype="int16")


def test_scaled_tif_is_scaled(tmp_path):
    path = write_tif(tmp_path / "a.tif", np.full(GRID.shape, 30, "uint8"), GRID.fine.affine)
    with rasterio.open(path, "r+") as file:
        file.scales, file.offsets = (0.5,), (-1.0,)
    assert (open_raster(path, grid=GRID, resampling="exact") == 14).all()


def test_signed_bytes_are_the_codes_they_stand_for(tmp_path):
    path = write_tif(tmp_path / "a.tif", np.full(GRID.shape, -126, "int8"), GRID.fine.affine)
    for resampling in ("exact", "mode"):
        assert (open_raster(path, grid=GRID, resampling=resampling, dtype="uint8") == 130).all()
    assert (open_raster(path, grid=GRID, resampling="exact") == -126).all()


def test_recode_comes_before_the_vote(tmp_path):
    block = np.array([[1, 2, 3], [4, 9, 9], [9, 0, 0]], "uint8")
    path = write_tif(tmp_path / "a.tif", np.tile(block, GRID.shape), GRID.fine.affine * Affine.scale(1 / 3), nodata=0)
    assert (open_raster(path, grid=GRID, resampling="mode", dtype="uint8") == 9).all()
    merged = open_raster(path, grid=GRID, resampling="mode", dtype="uint8", recode=lambda c: np.where(c < 5, np.minimum(c, 1), c))
    assert (merged == 1).all()


def test_polar_projection_covers_the_pole_and_the_dateline(tmp_path):
    to_degrees = pyproj.Transformer.from_crs(3413, 4326, always_xy=True)
    side, n = 25000.0, 300
    steps = -side * n / 2 + side * (np.arange(n) + 0.5)
    _, lat = to_degrees.transform(*np.meshgrid(steps, -steps))
    t = Affine(side, 0, -side * n / 2, 0, -side, side * n / 2)
    path = write_tif(tmp_path / "a.tif", lat.astype("float32"), t, crs="EPSG:3413")
    grid = make_grid((-180, 60, 180, 90), coarse_cell=10, factor=10, shard=30)
    for resampling in ("nearest", "bilinear", "average"):
        got = open_raster(path, grid=grid, resampling=resampling).values
        assert np.isfinite(got).all()
        assert np.abs(got - centres(grid)[1]).max() < 0.3


@pytest.fixture
def most_read(monkeypatch):
    """The largest number of source cells that is read at once."""
    sizes = [0]

    def recording(layer):
        def read(rows, cols):
            values, valid = layer.read(rows, cols)
            sizes[0] = max(sizes[0], values.size)
            return values, valid

        return dataclasses.replace(layer, read=read)

    @contextlib.contextmanager
    def opened(*args, **options):
        with open_layer(*args, **options) as layer:
            yield recording(layer)

    monkeypatch.setattr(read, "open_layer", opened)
    return sizes


@pytest.mark.parametrize("resampling", ["nearest", "bilinear", "average"])
@pytest.mark.parametrize("columns", [slice(None), slice(0, 600), slice(600, None)], ids=["globe", "west", "east"])
def test_a_projected_grid_across_the_dateline_reads_only_what_it_needs_of_both_sides(tmp_path, most_read, resampling, columns):
    grid = make_grid((2e6, -1e6, 4e6, 1e6), coarse_cell=2e5, factor=4, shard=20, origin=(2e6, 1e6), crs="EPSG:3832")
    lon, lat = np.meshgrid(-180 + 0.3 * (np.arange(1200) + 0.5), 90 - 0.3 * (np.arange(600) + 0.5))
    values = (np.cos(np.deg2rad(lon)) + np.sin(np.deg2rad(lat))).astype("float32")[:, columns]
    start = columns.start or 0
    path = write_tif(tmp_path / "a.tif", values, Affine(0.3, 0, -180 + 0.3 * start, 0, -0.3, 90))
    got = open_raster(path, grid=grid, resampling=resampling)
    to_degrees = pyproj.Transformer.from_crs(3832, 4326, always_xy=True)
    lon, lat = to_degrees.transform(*np.meshgrid(got["longitude"].values, got["latitude"].values))
    assert (lon > 167).any() and (lon < -156).any()
    want = np.cos(np.deg2rad(lon)) + np.sin(np.deg2rad(lat))
    inside = (lon > -180 + 0.3 * start) & (lon < 180 if columns.stop is None else lon < 0)
    clear = np.abs(np.abs(lon) - 180) > 0.6
    assert np.abs(got.values - want)[inside].max() < 0.02
    assert np.isnan(got.values[~inside & clear]).all()
    assert most_read[0] < 0.05 * 1200 * 600


@pytest.mark.parametrize("resampling", ["nearest", "bilinear", "average"])
def test_a_projected_source_across_the_dateline_reaches_both_sides_and_is_read_by_parts(
    tmp_path, most_read, monkeypatch, resampling
):
    to_degrees = pyproj.Transformer.from_crs(32660, 4326, always_xy=True)
    side, n = 2500.0, 480
    t = Affine(side, 0, 600_000, 0, -side, 2_000_000)
    lon, lat = to_degrees.transform(*np.meshgrid(600_000 + side * (np.arange(n) + 0.5), 2_000_000 - side * (np.arange(n) + 0.5)))
    assert (lon > 177).any() and (lon < -171).any()
    path = write_tif(tmp_path / "a.tif", lat.astype("float32"), t, crs="EPSG:32660")
    grid = make_grid((-180, -90, 180, 90), coarse_cell=1, factor=4, shard=360)
    monkeypatch.setattr(read, "_STRIP_CELLS", 2**13)
    got = open_raster(path, grid=grid, resampling=resampling).values
    there = np.isfinite(got)
    assert there[:, :30].any() and there[:, -12:].any() and not there[:, 40:-20].any()
    x, y = pyproj.Transformer.from_crs(4326, 32660, always_xy=True).transform(*centres(grid))
    col, row = (x - t.c) / t.a, (y - t.f) / t.e
    assert there[(col > 10) & (col < n - 10) & (row > 10) & (row < n - 10)].all()
    assert np.abs(got - centres(grid)[1])[there].max() < 0.2
    assert 0 < most_read[0] <= 4 * 2**13 < n * n / 4


def test_a_source_whose_corners_are_off_the_globe_is_read_by_parts(tmp_path, most_read, monkeypatch):
    crs = "+proj=geos +h=35785831 +lon_0=170 +datum=WGS84"
    side, n = 20_000.0, 560
    t = Affine(side, 0, -side * n / 2, 0, -side, side * n / 2)
    steps = side * (np.arange(n) - n / 2 + 0.5)
    lon, lat = pyproj.Transformer.from_crs(crs, 4326, always_xy=True).transform(*np.meshgrid(steps, -steps))
    path = write_tif(tmp_path / "a.tif", np.where(np.isfinite(lat), lat, np.nan).astype("float32"), t, crs=crs, nodata=np.nan)
    grid = make_grid((-180, -90, 180, 90), coarse_cell=5, factor=5, shard=180)
    monkeypatch.setattr(read, "_STRIP_CELLS", 2**12)
    got = open_raster(path, grid=grid, resampling="bilinear").values
    lon, lat = centres(grid)
    away = np.abs((lon - 170 + 180) % 360 - 180)
    assert np.isfinite(got[(np.abs(lat) < 40) & (away < 40)]).all() and np.isnan(got[away > 100]).all()
    there = np.isfinite(got) & (np.abs(lat) < 50) & (away < 50)
    assert np.abs(got - lat)[there].max() < 0.3
    assert most_read[0] < n * n / 4


def test_projected_netcdf_needs_a_reference_system(tmp_path):
    t = pyproj.CRS("EPSG:3035")
    steps = np.arange(5) * 1e5
    dataset = xr.Dataset({"h": (("y", "x"), np.ones((5, 5)))}, {"y": 3.2e6 - steps, "x": 4.1e6 + steps})
    dataset.to_netcdf(tmp_path / "bare.nc")
    grid = make_grid((9, 50, 10, 51), coarse_cell=0.5, factor=5, shard=5)
    with pytest.raises(DataError, match="no coordinate reference system"):
        open_raster(tmp_path / "bare.nc", grid=grid, resampling="nearest")
    dataset["h"].attrs["grid_mapping"] = "crs"
    dataset["crs"] = ((), 0, {"crs_wkt": t.to_wkt()})
    dataset.to_netcdf(tmp_path / "good.nc")
    assert (open_raster(tmp_path / "good.nc", grid=grid, resampling="nearest") == 1).all()
    with pytest.raises(DataError, match=r"reference system .* is ETRS89-extended .* expected WGS 84"):
        open_raster(tmp_path / "good.nc", grid=grid, resampling="exact")


# -- bad input ----------------------------------------------------------------------------------------------------------


def test_half_pixel_shift_is_refused(tmp_path):
    path = write_tif(tmp_path / "a.tif", np.ones(GRID.shape, "uint8"), GRID.fine.affine * Affine.translation(-0.5, -0.5))
    with pytest.raises(DataError, match=r"half-pixel shift \(pixel-is-point file\?\)"):
        open_raster(path, grid=GRID, resampling="exact")
    assert open_raster(path, grid=GRID, resampling="nearest").notnull().any()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (Affine.translation(0.2, 0), "0.2 x 0 cells off"),
        (Affine.scale(0.5), "cells of 0.25 x 0.25, expected 0.5 x 0.5 .* average or mode"),
        (Affine.scale(2), "cells of 1 x 1, expected 0.5 x 0.5 .* nearest or bilinear"),
        (Affine.scale(1 + 3e-5), "expected 0.5 x 0.5"),
    ],
)
def test_a_source_off_the_lattice_is_refused(tmp_path, change, text):
    path = write_tif(tmp_path / "a.tif", np.ones(GRID.shape, "uint8"), GRID.fine.affine * change)
    with pytest.raises(DataError, match=text):
        open_raster(path, grid=GRID, resampling="exact")


def test_longitudes_of_0_to_360_are_refused(tmp_path):
    for first in (0.25, 0.0):
        lon, lat = np.arange(first, 360, 0.5), np.arange(8, -4, -0.5) - 0.25
        path = write_nc(tmp_path / f"{first}.nc", np.ones((lat.size, lon.size)), lat, lon)
        with pytest.raises(DataError, match=r"longitudes run 0..360 .* roll them: "):
            open_raster(path, grid=GRID, resampling="bilinear")
    east = make_grid((0, 0, 8, 8), coarse_cell=2, factor=4, shard=8, origin=(0.0, 8.0))
    assert (open_raster(tmp_path / "0.25.nc", grid=east, resampling="exact") == 1).all()


def test_boxes_that_do_not_meet_are_both_named(tmp_path):
    path = write_tif(tmp_path / "a.tif", np.ones((4, 4), "uint8"), Affine(1, 0, 100, 0, -1, 20))
    with pytest.raises(DataError, match=r"covers \(100, 16, 104, 20\), expected an overlap with \(-6, -4, 10, 8\)"):
        open_raster(path, grid=GRID, resampling="nearest")


def test_truncated_files_are_refused(tmp_path):
    noise = np.random.default_rng(0).random(GRID.shape).astype("float32")
    tif = write_tif(tmp_path / "a.tif", noise, GRID.fine.affine)
    coords = GRID.coords()
    nc = write_nc(tmp_path / "a.nc", noise, coords["latitude"], coords["longitude"])
    old = tmp_path / "old.nc"
    xr.open_dataset(nc).to_netcdf(old, format="NETCDF3_CLASSIC")
    for path in (tif, nc, old):
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        with pytest.raises(DataError, match="is truncated"):
            open_raster(path, grid=GRID, resampling="exact")
    text = tmp_path / "b.tif"
    text.write_text("no raster")
    with pytest.raises(DataError, match="is truncated or not a raster"):
        open_raster(text, grid=GRID, resampling="exact")
    with pytest.raises(DataError, match="does not exist"):
        open_raster(tmp_path / "c.tif", grid=GRID, resampling="exact")


def test_a_layer_without_a_valid_cell_is_refused(tmp_path):
    path = write_tif(tmp_path / "a.tif", np.zeros(GRID.shape, "uint8"), GRID.fine.affine, nodata=0)
    for options in ({}, {"dtype": "uint8"}):
        with pytest.raises(DataError, match="all nodata"):
            open_raster(path, grid=GRID, resampling="exact", **options)


def test_layers_must_be_clear(tmp_path):
    path = write_tif(
        tmp_path / "a.tif", np.stack([np.ones(GRID.shape), np.zeros(GRID.shape)]), GRID.fine.affine, names=["mean", "sd"]
    )
    assert (open_raster(path, grid=GRID, resampling="exact", band="mean") == 1).all()
    assert (open_raster(path, grid=GRID, resampling="exact", band=2) == 0).all()
    for band in (None, "max", 3, 0):
        with pytest.raises(DataError, match=r"expected one of the 2 bands .*mean, sd"):
            open_raster(path, grid=GRID, resampling="exact", band=band)
    x, y = GRID.coords()["longitude"], GRID.coords()["latitude"]
    two = xr.Dataset({n: (("lat", "lon"), np.ones(GRID.shape)) for n in "ab"}, {"lat": y, "lon": x})
    two.to_netcdf(tmp_path / "two.nc")
    with pytest.raises(DataError, match=r"variable of .* is None, expected one of \['a', 'b'\]"):
        open_raster(tmp_path / "two.nc", grid=GRID, resampling="exact")
    xr.Dataset({"a": ("i", [1.0])}).to_netcdf(tmp_path / "none.nc")
    with pytest.raises(DataError, match="expected a 1-D latitude"):
        open_raster(tmp_path / "none.nc", grid=GRID, resampling="exact")


def test_irregular_coordinates_rotation_and_lacking_crs_are_refused(tmp_path):
    lat, lon = np.array([8.0, 7.0, 5.0]), np.arange(-6.0, 10.0)
    with pytest.raises(DataError, match=r"lat of .* off regular steps"):
        open_raster(write_nc(tmp_path / "a.nc", np.ones((3, 16)), lat, lon), grid=GRID, resampling="nearest")
    turned = write_tif(tmp_path / "b.tif", np.ones((4, 4)), Affine.rotation(10) * GRID.fine.affine)
    with pytest.raises(DataError, match="rotated or mirrored"):
        open_raster(turned, grid=GRID, resampling="nearest")
    with pytest.raises(DataError, match="no coordinate reference system"):
        open_raster(write_tif(tmp_path / "c.tif", np.ones((4, 4)), GRID.fine.affine, crs=None), grid=GRID, resampling="nearest")


def test_codes_are_never_averaged_or_cut_off(tmp_path):
    path = write_tif(tmp_path / "a.tif", np.full(GRID.shape, 11.5, "float32"), GRID.fine.affine)
    for resampling in ("average", "bilinear"):
        with pytest.raises(ConfigError, match="whole numbers"):
            open_raster(path, grid=GRID, resampling=resampling, dtype="uint8")
    with pytest.raises(DataError, match=r"holds 11.5 in 768 cells, expected whole numbers of 0..255"):
        open_raster(path, grid=GRID, resampling="exact", dtype="uint8")


# -- gaps ---------------------------------------------------------------------------------------------------------------


# -- real files ---------------------------------------------------------------------------------------------------------

BAVARIA = make_grid((8.975, 47.2694, 13.839, 50.5639), coarse_cell=100 / 360, factor=100, shard=400)


def test_real_cci_map_is_cut_exactly_and_matches_every_other_way(real_data):
    path = real_data / "bavaria_cci_landcover" / "cci_lc_bavaria_300m_1992-2015.tif"
    exact = open_raster(path, grid=BAVARIA, resampling="exact", band="1992", dtype="uint8", nodata=0)
    assert int((exact != 0).sum()) == 1_122_489
    assert int((exact == 10).sum()) == 405_819
    vote = open_raster(path, grid=BAVARIA, resampling="mode", band=1, dtype="uint8", nodata=0)
    assert exact.identical(vote)


def test_real_static_layers_come_onto_the_grid(real_data):
    munich = {"latitude": 48.137, "longitude": 11.575, "method": "nearest"}
    bio = open_raster(
        real_data / "global_bioclim_ewembi" / "bioclim_ewembi_1995_global_0.5deg.nc",
        grid=BAVARIA,
        resampling="bilinear",
        variable="bio1",
    )
    assert 8 < float(bio.sel(**munich)) < 11
    height = open_raster(
        real_data / "bavaria_static" / "eudem_elevation_europe_0.11deg.tif",
        grid=BAVARIA,
        resampling="bilinear",
        band="altitude_mean",
    )
    assert 480 < float(height.sel(**munich)) < 560
    shade = open_raster(
        real_data / "bavaria_static" / "eudem_hillshade_bavaria_500m.tif",
        grid=BAVARIA,
        resampling="bilinear",
        band="hillshade_mean",
    )
    assert 0.34 < float(shade.notnull().mean()) < 0.37
    po = make_grid((10, 44, 13, 47), coarse_cell=0.5, factor=10, shard=10)
    leaf = open_raster(real_data / "lai_lisflood_po" / "laif.nc", grid=po, resampling="bilinear", band=18)
    assert float(leaf.min()) >= 0
    assert float(leaf.max()) < 8


def test_real_global_class_map_on_an_unnamed_ellipsoid_is_taken_as_it_is(real_data):
    (path,) = (real_data / "global_mcd12c1_2019").glob("*.tif")
    grid = make_grid((5, 40, 20, 50), coarse_cell=0.5, factor=10, shard=50)
    exact = open_raster(path, grid=grid, resampling="exact", dtype="uint8")
    assert int(exact.sel(latitude=48.137, longitude=11.575, method="nearest")) == 13
