"""LUH2 and LUH3 states: headers, units, checks and damage, on small files written like the real ones."""

from __future__ import annotations

import logging

import netCDF4
import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from ai4land.errors import DataError
from ai4land.grid import centres, make_grid
from ai4land.scenario.coarse import blocks, to_shares
from ai4land.scenario.luh2 import LUH3_STATES, STATES, open_states

GRID = make_grid((-10, 40, 20, 60), coarse_cell=5, factor=2, shard=4)
LAT, LON = np.arange(87.5, -90, -5.0), np.arange(-177.5, 180, 5.0)
ICWTR = np.random.default_rng(5).uniform(0, 0.6, (36, 72))
OCEAN = np.zeros((36, 72), bool)
OCEAN[8, 34] = OCEAN[30:] = True


def truth(year, seed=0):
    shares = np.random.default_rng([seed, year]).dirichlet(np.ones(len(STATES)), size=(36, 72)) * (1 - ICWTR)[..., None]
    return np.where(OCEAN, np.nan, np.moveaxis(shares, -1, 0)).astype(np.float32)


def on_grid(year, seed=0):
    y, x = centres(GRID.coarse)
    return xr.DataArray(truth(year, seed), dims=("s", "y", "x"), coords={"y": LAT, "x": LON}).sel(y=y, x=x).values


STYLES = {
    "v2h": {"time": "years since 850-01-01 0:0:0", "since": 850, "day": 1, "turn": 0, "up": False},
    "v2f": {"time": "years since 2015-01-01 0:0:0", "since": 2015, "day": 1, "turn": 0, "up": False},
    "luh3": {"time": "days since 0850-01-01", "since": 850, "day": 365, "turn": 36, "up": True},
    "common": {"time": "common_years since 850-01-01", "since": 850, "day": 1, "turn": 36, "up": False},
}


def write(
    path, years, *, style="v2h", seed=0, names=None, units="1", scale=1.0, form="NETCDF4", time_units=..., edit=None, order="tyx"
):
    s = STYLES[style]
    names = names or (LUH3_STATES if style == "luh3" else STATES)
    arrange = lambda a: np.roll(a[..., :: -1 if s["up"] else 1, :], s["turn"], axis=-1)  # noqa: E731
    with netCDF4.Dataset(path, "w", format=form) as file:
        for dim, size in (("time", None), ("lat", 36), ("lon", 72)):
            file.createDimension(dim, size)
        time = file.createVariable("time", "f8", ("time",))
        time[:] = [(y - s["since"]) * s["day"] for y in years]
        time.calendar = "noleap"
        if time_units is ...:
            time.units = s["time"]
        elif time_units:
            time.units = time_units
        file.createVariable("lat", "f8", ("lat",))[:] = LAT[::-1] if s["up"] else LAT
        file.createVariable("lon", "f8", ("lon",))[:] = np.roll(LON % 360 if style == "luh3" else LON, s["turn"])
        dims = {"tyx": ("time", "lat", "lon"), "yxt": ("lat", "lon", "time")}[order]
        fields = np.stack([truth(y, seed) for y in years])
        if edit:
            edit(fields)
        for name in names:
            v = file.createVariable(name, "f4", dims)
            v.setncatts({"units": units, "missing_value": np.float32(1e20), "_Fillvalue": np.float32(1e20)})
            part = fields[:, STATES.index(name)] if name in STATES else np.where(OCEAN, np.nan, fields[:, 0] * 0)
            part = np.nan_to_num(arrange(part * scale), nan=1e20)
            v[:] = part if order == "tyx" else np.moveaxis(part, 0, -1)
        file.createVariable("secma", "f4", dims)[:] = 60.0
    return path


def write_static(path, icwtr=ICWTR):
    with netCDF4.Dataset(path, "w") as file:
        file.createDimension("lat", 36)
        file.createDimension("lon", 72)
        file.createVariable("lat", "f8", ("lat",))[:] = LAT
        file.createVariable("lon", "f8", ("lon",))[:] = LON
        for name, values in (("icwtr", np.where(OCEAN, 1, icwtr)), ("carea", np.ones((36, 72)))):
            file.createVariable(name, "f4", ("lat", "lon"))[:] = values
    return path


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("order", ["tyx", "yxt"])
def test_every_header_reads_the_same_values(tmp_path, style, order):
    path = write(tmp_path / "multiple-states.nc", range(2013, 2017), style=style, order=order, form="NETCDF4_CLASSIC")
    coarse = open_states(path, grid=GRID, years=[2016, 2014], static=write_static(tmp_path / "static.nc"))
    assert coarse.name == "coarse" and coarse.dims == ("year", "state", "coarse_latitude", "coarse_longitude")
    assert coarse.year.dtype == np.int64 and coarse.year.values.tolist() == [2014, 2016] and coarse.dtype == np.float32
    assert coarse.state.values.tolist() == list(LUH3_STATES if style == "luh3" else STATES)
    np.testing.assert_array_equal(coarse.coarse_latitude, GRID.coords()["coarse_latitude"])
    for year in (2014, 2016):
        np.testing.assert_array_equal(coarse.sel(year=year, state=list(STATES)).values, on_grid(year))
    assert np.isnan(coarse.values).any() and np.isfinite(coarse.values).any()


def test_other_cells_are_averaged_by_area(tmp_path):
    grid = make_grid((-10, 40, 20, 60), coarse_cell=10, factor=2, shard=2)
    path = write(tmp_path / "states.nc", [2000])
    coarse = open_states(path, grid=grid)
    lat = np.deg2rad([60.0, 55, 50])
    top, low = np.sin(lat[0]) - np.sin(lat[1]), np.sin(lat[1]) - np.sin(lat[2])
    cells = truth(2000)[:, 6:8, 34:36].astype(np.float64)
    weights = np.array([[top, top], [low, low]])
    assert np.isfinite(cells).all()
    np.testing.assert_allclose(coarse.values[0, :, 0, 0], (cells * weights).sum((1, 2)) / weights.sum(), rtol=1e-5)


def test_the_later_file_wins_in_the_year_that_joins(tmp_path, caplog):
    past, future = write(tmp_path / "v2h.nc", [2013, 2014, 2015]), write(tmp_path / "v2f.nc", [2015, 2016], style="v2f", seed=1)
    with caplog.at_level(logging.INFO, logger="ai4land"):
        coarse = open_states([future, past], grid=GRID)
    assert coarse.year.values.tolist() == [2013, 2014, 2015, 2016]
    np.testing.assert_array_equal(coarse.values, np.stack([on_grid(y, int(y > 2014)) for y in range(2013, 2017)]))
    assert [r.levelno for r in caplog.records] == [logging.WARNING] and "2015 is in" in caplog.text


def test_years_held_twice_must_agree(tmp_path):
    one, same = write(tmp_path / "a.nc", [2000, 2001, 2002]), write(tmp_path / "b.nc", [2001, 2002, 2003])
    coarse = open_states([one, same], grid=GRID)
    np.testing.assert_array_equal(coarse.values, np.stack([on_grid(y) for y in range(2000, 2004)]))
    other = write(tmp_path / "c.nc", [2001, 2002, 2003], seed=2)
    with pytest.raises(DataError, match=r"shares of 2001 in .*c\.nc differ by"):
        open_states([one, other], grid=GRID)
    with pytest.raises(DataError, match="holds the states"):
        open_states([one, write(tmp_path / "d.nc", [2003], style="luh3")], grid=GRID)


@pytest.mark.parametrize("form", ["NETCDF4", "NETCDF3_CLASSIC", "NETCDF3_64BIT_DATA"])
def test_truncated_file_is_named(tmp_path, form):
    path = write(tmp_path / "states.nc", [2000, 2001], form=form)
    assert open_states(path, grid=GRID).shape[0] == 2
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"states\.nc is truncated or not NetCDF"):
        open_states(path, grid=GRID)


def test_files_that_are_no_netcdf_are_refused(tmp_path):
    page = tmp_path / "page.nc"
    page.write_text("<html>not found</html>")
    with pytest.raises(DataError, match="truncated or not NetCDF"):
        open_states(page, grid=GRID)
    with pytest.raises(DataError, match="does not exist"):
        open_states(tmp_path / "none.nc", grid=GRID)
    with pytest.raises(DataError, match="not NetCDF or Zarr"):
        open_states(tmp_path, grid=GRID)
    with pytest.raises(DataError, match="paths is empty"):
        open_states([], grid=GRID)


def test_missing_state_year_region_and_time_units_are_named(tmp_path):
    path = write(tmp_path / "a.nc", [2000], names=[n for n in STATES if n != "c3per"])
    with pytest.raises(DataError, match=r"lacks the states \['c3per'\]"):
        open_states(path, grid=GRID)
    path = write(tmp_path / "b.nc", [2000, 2001, 2003])
    with pytest.raises(DataError, match=r"years are \[1999, 2002\].*holds 2000\.\.2003 with gaps"):
        open_states(path, grid=GRID, years=[1999, 2000, 2002])
    with xr.open_dataset(path, decode_times=False) as whole:
        whole.isel(lat=slice(30, 36), lon=slice(10)).to_netcdf(tmp_path / "south.nc")
    with pytest.raises(DataError, match="expected some overlap"):
        open_states(tmp_path / "south.nc", grid=GRID)
    path = write(tmp_path / "c.nc", [2000, 2001], time_units=None)
    with pytest.raises(DataError, match=r"without units.*give time_units"):
        open_states(path, grid=GRID)
    assert open_states(path, grid=GRID, time_units="years since 0850-01-01").year.values.tolist() == [2000, 2001]
    path = write(tmp_path / "d.nc", [2000], time_units="furlongs since 1900-01-01")
    with pytest.raises(DataError, match="'furlongs since 1900-01-01'"):
        open_states(path, grid=GRID)


def test_region_beyond_the_file_is_nan(tmp_path):
    path = write(tmp_path / "a.nc", [2000])
    with xr.open_dataset(path, decode_times=False) as whole:
        whole.isel(lat=slice(0, 8)).to_netcdf(tmp_path / "north.nc")
    coarse = open_states(tmp_path / "north.nc", grid=GRID)
    inside = coarse.coarse_latitude.values > 50
    np.testing.assert_array_equal(coarse.values[0][:, inside], on_grid(2000)[:, inside])
    assert np.isnan(coarse.values[0][:, ~inside]).all() and (~inside).any()


def test_units(tmp_path):
    percent = write(tmp_path / "percent.nc", [2000], units="%", scale=100.0)
    np.testing.assert_allclose(open_states(percent, grid=GRID).values[0], on_grid(2000), atol=1e-6)
    with pytest.raises(DataError, match=r"share of \w+ in .* expected 0\.\.1"):
        open_states(percent, grid=GRID, units="1")
    strange = write(tmp_path / "strange.nc", [2000], units="kg m-2")
    with pytest.raises(DataError, match=r"'kg m-2'.*wrong units"):
        open_states(strange, grid=GRID)
    np.testing.assert_array_equal(open_states(strange, grid=GRID, units="1").values[0], on_grid(2000))
    km2 = to_shares(np.array([[np.nan, 1e20, 500.0]]), units="km2", lat=np.array([60.0]), source="x", cell_degrees=0.25)
    assert np.isnan(km2[0, :2]).all() and km2[0, 2] == pytest.approx(500 / (772.9 / 2), rel=1e-3)
    with pytest.raises(DataError, match=r"wrong units.*cell_degrees"):
        to_shares(np.ones((1, 1)), units="km2", lat=np.zeros(1), source="x")


def test_sums_are_checked_and_the_worst_cell_is_named(tmp_path):
    def spoil(fields):
        fields[1, 2, 7, 35] += 0.01
        fields[1, 3, 6, 36] += 0.005

    path, static = write(tmp_path / "a.nc", [2000, 2001], edit=spoil), write_static(tmp_path / "static.nc")
    assert open_states(path, grid=GRID).shape[0] == 2
    total = float(np.nansum(truth(2001)[:, 7, 35]) + 0.01)
    with pytest.raises(
        DataError, match=rf"sum over the states .* is {total:.4f}\d* in 2001 at 52\.5 N -2\.5 E, expected 1 - icwtr"
    ):
        open_states(path, grid=GRID, static=static)
    assert open_states(path, grid=GRID, static=static, years=[2000]).shape[0] == 1

    def overfill(fields):
        fields[0, :, 7, 35] = 0.1

    with pytest.raises(DataError, match=r"is 1\.2 in 2000 at 52\.5 N -2\.5 E, expected at most 1"):
        open_states(write(tmp_path / "b.nc", [2000], edit=overfill), grid=GRID)


def test_where_the_static_file_has_no_ice_and_water_sums_stay_below_one(tmp_path):
    def overfill(fields):
        fields[0, :, 7, 35] = 0.1

    icwtr = ICWTR.copy()
    icwtr[7, 35] = np.nan
    static = write_static(tmp_path / "static.nc", icwtr)
    assert np.isfinite(open_states(write(tmp_path / "a.nc", [2000]), grid=GRID, static=static).values[0, :, 1, 1]).all()
    with pytest.raises(DataError, match=r"is 1\.2 in 2000 at 52\.5 N -2\.5 E"):
        open_states(write(tmp_path / "b.nc", [2000], edit=overfill), grid=GRID, static=static)


def test_static_file_of_another_grid_is_refused(tmp_path):
    path, static = write(tmp_path / "a.nc", [2000]), write_static(tmp_path / "static.nc")
    with xr.open_dataset(static) as whole:
        whole.assign_coords(lat=whole.lat + 0.1).to_netcdf(tmp_path / "moved.nc")
        whole.drop_vars("icwtr").to_netcdf(tmp_path / "bare.nc")
    with pytest.raises(DataError, match="other cells than the states"):
        open_states(path, grid=GRID, static=tmp_path / "moved.nc")
    with pytest.raises(DataError, match="expected icwtr"):
        open_states(path, grid=GRID, static=tmp_path / "bare.nc")


def test_rounding_is_clipped_and_half_missing_cells_are_dropped(tmp_path, caplog):
    def edit(fields):
        fields[0, 4, 7, 35] = -5e-5
        fields[0, 5, 7, 36] = np.nan

    coarse = open_states(write(tmp_path / "a.nc", [2000], edit=edit), grid=GRID)
    assert coarse.min() == 0 and "1 cells hold some states only" in caplog.text
    assert np.isnan(coarse.sel(coarse_latitude=52.5, coarse_longitude=2.5).values).all()


@given(st.lists(st.integers(0, 60), unique=True, max_size=30).map(sorted), st.integers(1, 7))
def test_blocks_cover_the_indices_in_order(index, size):
    cut = list(blocks(index, size))
    assert [i for s in cut for i in range(s.start, s.stop)] == index and all(s.stop - s.start <= size for s in cut)


def test_reduced_states_of_europe(real_data):
    path = real_data / "europe_luh2_states_2015-2100" / "luh2_states_europe_0.5deg_2015-2100.nc"
    grid = make_grid((9.0, 47.3, 13.8, 50.5), coarse_cell=100 / 360, factor=100, shard=400)
    with pytest.raises(DataError, match="wrong units"):
        open_states(path, grid=grid)
    coarse = open_states(path, grid=grid, years=[2015, 2050], cell_degrees=0.25)
    assert coarse.shape == (2, 7, *grid.coarse.shape) and np.isfinite(coarse.values).all()
    assert 0.7 < float(coarse.sum("state").mean()) <= 1
    west, north = 9 + 1 / 36, 49 + 4 / 9
    cell = coarse.sel(year=2015, state="crops").sel(coarse_latitude=north, coarse_longitude=west, method="nearest")
    y = float(cell.coarse_latitude) + (np.arange(100) - 49.5) / 360
    x = float(cell.coarse_longitude) + (np.arange(100) - 49.5) / 360
    with xr.open_dataset(path) as raw:
        seen = raw.crops[0].sel(lat=y, lon=x, method="nearest").values / ((np.pi / 720 * 6371) ** 2)
        seen = seen / np.cos(np.deg2rad(raw.lat.sel(lat=y, method="nearest").values))[:, None]
    assert float(cell) == pytest.approx(np.average(seen.mean(axis=1), weights=np.cos(np.deg2rad(y))), rel=0.01)
