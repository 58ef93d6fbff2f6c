"""Class shares and shares of map products, on the real files where they are."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from ai4land.crosswalk import load_crosswalk
from ai4land.errors import DataError
from ai4land.grid import make_grid
from ai4land.legend import load_legend
from ai4land.scenario.luh2 import open_states
from ai4land.scenario.shares import open_shares

GRID = make_grid((0, 40, 20, 50), coarse_cell=5, factor=2, shard=4)
BAVARIA = make_grid((9.0, 47.3, 13.8, 50.5), coarse_cell=100 / 360, factor=100, shard=400)


def product(path, *, units="percent", off=0.0, dims=("year", "class_code", "lat", "lon"), zarr=False):
    rng = np.random.default_rng(3)
    lat, lon = np.arange(-87.5, 90, 5.0), np.arange(2.5, 360, 5.0)
    shares = np.moveaxis(rng.dirichlet(np.ones(3), size=(4, 36, 72)), -1, 1)
    shares[:, :, 27, 1] = np.nan
    shares[2, 1, 26, 2] += off
    coords = {"year": [2003, 2000, 2001, 2002], "class_code": [10, 20, 30], "lat": lat, "lon": lon}
    data = xr.DataArray(shares, dims=("year", "class_code", "lat", "lon"), coords=coords, name="cover")
    stored = (data * (100 if "percent" in units or units == "%" else 1)).transpose(*dims).assign_attrs(units=units).to_dataset()
    if zarr:
        stored.to_zarr(path, zarr_format=3, consolidated=False)
    else:
        stored.to_netcdf(path)
    return data.sel(lat=GRID.coords()["coarse_latitude"], lon=GRID.coords()["coarse_longitude"])


@pytest.mark.parametrize("units", ["percent", "%", "percent of grid cell", "1"])
@pytest.mark.parametrize("zarr", [False, True])
def test_shares_of_a_product_come_back(tmp_path, units, zarr):
    path = tmp_path / ("p.zarr" if zarr else "p.nc")
    dims = ("class_code", "lat", "year", "lon") if zarr else ("year", "class_code", "lat", "lon")
    want = product(path, units=units, zarr=zarr, dims=dims)
    coarse = open_shares(path, variable="cover", grid=GRID, years=[2003, 2001])
    assert coarse.state.values.tolist() == ["10", "20", "30"] and coarse.year.values.tolist() == [2001, 2003]
    np.testing.assert_allclose(coarse.values, want.sel(year=[2001, 2003]).values, atol=1e-6)
    assert np.isnan(coarse.values).any()


def test_products_with_faults_are_refused(tmp_path):
    path = tmp_path / "p.nc"
    product(path, off=0.01)
    assert open_shares(path, variable="cover", grid=GRID, years=[2002]).shape[0] == 1
    with pytest.raises(DataError, match=r"is 1\.01 in 2001 at 42\.5 N 12\.5 E, expected classes that sum to 1"):
        open_shares(path, variable="cover", grid=GRID)
    with pytest.raises(DataError, match="expected lc_percent"):
        open_shares(path, variable="lc_percent", grid=GRID)
    with pytest.raises(DataError, match="give year_dim and class_dim"):
        open_shares(path, variable="cover", grid=GRID, class_dim="lccs_class")
    with pytest.raises(DataError, match=r"years are \[1990\]"):
        open_shares(path, variable="cover", grid=GRID, years=[1990])
    product(tmp_path / "close.nc", off=0.0015)
    assert open_shares(tmp_path / "close.nc", variable="cover", grid=GRID).shape[0] == 4
    product(tmp_path / "q.nc", units="hectare")
    with pytest.raises(DataError, match="wrong units"):
        open_shares(tmp_path / "q.nc", variable="cover", grid=GRID)


def test_real_cci_shares_are_nested(real_data):
    path = real_data / "europe_cci_fractions" / "cci_lc_fractions_europe_0.2778deg_1992-2018.nc"
    coarse = open_shares(path, variable="lc_percent", grid=BAVARIA, years=range(1992, 1995))
    y, x = coarse.coarse_latitude.values, coarse.coarse_longitude.values
    with xr.open_dataset(path) as raw:
        want = raw.lc_percent.sel(year=[1992, 1993, 1994]).sel(lat=y, lon=x, method="nearest", tolerance=1e-3).values / 100
    np.testing.assert_allclose(coarse.values, want, atol=1e-7)
    weights = load_crosswalk("identity", load_legend("lccs_level1")).for_states(coarse.state.values)
    np.testing.assert_allclose([weights.to_classes(part) for part in coarse.values], want, atol=1e-7)


def test_real_scenario_and_real_map_agree_on_cropland(real_data):
    cci = real_data / "europe_cci_fractions" / "cci_lc_fractions_europe_0.2778deg_1992-2018.nc"
    luh = real_data / "europe_luh2_states_2015-2100" / "luh2_states_europe_0.5deg_2015-2100.nc"
    grid = make_grid((-8, 38, 26, 54), coarse_cell=0.5, factor=1, shard=4)
    crops = open_states(luh, grid=grid, years=[2015], cell_degrees=0.25).sel(state="crops").values.ravel()
    seen = (
        open_shares(cci, variable="lc_percent", grid=grid, years=[2015]).sel(state=["10", "20", "30"]).sum("state", skipna=False)
    )
    both = np.isfinite(crops) & np.isfinite(seen.values.ravel())
    assert both.sum() > 1000 and np.corrcoef(crops[both], seen.values.ravel()[both])[0, 1] > 0.85
