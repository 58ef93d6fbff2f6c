"""Fractions of land uses, on files made here and on the real ones where they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from ai4land.crosswalk import load_crosswalk
from ai4land.errors import ConfigError, DataError
from ai4land.grid import make_grid
from ai4land.legend import load_legend
from ai4land.scenario.fractions import FractionFile, fraction_years, open_fractions

GRID = make_grid((0, 40, 20, 50), coarse_cell=5, factor=2, shard=4)
LAT, LON = np.arange(87.5, -90, -5.0), np.arange(-177.5, 180, 5.0)
STATES = {"cropland": "crop", "pasture": "past"}


def write(
    path: Path, years: list[int] | None, *, seed: int = 0, units: str = "fraction of grid cell", scale: float = 1.0
) -> xr.Dataset:
    """Two uses of random shares, of two models, for the years or for one that the file does not tell."""
    rng = np.random.default_rng(seed)
    lead = {"gcm": ["a", "b"], **({} if years is None else {"period": years})}
    shape = (*(len(v) for v in lead.values()), LAT.size, LON.size)
    parts = np.moveaxis(rng.dirichlet(np.ones(3), size=shape), -1, 0)[:2].astype(np.float32)
    coords = {**lead, "lat": LAT, "lon": LON}
    made = {n: xr.DataArray(v, dims=tuple(coords), coords=coords) for n, v in zip(STATES.values(), parts, strict=True)}
    store(xr.Dataset(made), path, units=units, scale=scale)
    return xr.Dataset(made)


def store(data: xr.Dataset, path: Path, *, units: str = "1", scale: float = 1.0) -> None:
    path.unlink(missing_ok=True)
    data.assign({n: (v * scale).assign_attrs(units=units) for n, v in data.items()}).to_netcdf(path)


def cut(data: xr.Dataset, **labels) -> np.ndarray:
    coords = GRID.coords()
    part = data.sel(**labels).sel(lat=coords["coarse_latitude"], lon=coords["coarse_longitude"])
    return np.stack([part[v].values for v in STATES.values()]).astype(np.float64)


def files_in(folder: Path) -> tuple[list[FractionFile], xr.Dataset, xr.Dataset]:
    """A file of 1990 and 2080, and one of 2010 that does not tell its year."""
    first, second = write(folder / "a.nc", [2080, 1990]), write(folder / "b.nc", None, seed=1, units="percent", scale=100.0)
    files = [
        FractionFile(folder / "a.nc", year_dim="period", select={"gcm": "b"}),
        FractionFile(folder / "b.nc", 2010, select={"gcm": "a"}),
    ]
    return files, first, second


def test_years_of_several_files_come_back(tmp_path):
    files, first, second = files_in(tmp_path)
    coarse = open_fractions(files, states=STATES, grid=GRID)
    assert coarse.state.values.tolist() == ["cropland", "pasture", "other"] and coarse.year.values.tolist() == [1990, 2010, 2080]
    assert coarse.dtype == np.float32 and "interpolated" not in coarse.attrs
    want = [cut(first, gcm="b", period=1990), cut(second, gcm="a"), cut(first, gcm="b", period=2080)]
    np.testing.assert_allclose(coarse.values[:, :2], np.stack(want), atol=1e-6)
    np.testing.assert_allclose(coarse.sum("state"), 1, atol=1e-6)
    assert fraction_years(files) == [1990, 2010, 2080] and fraction_years(files, interpolate=True) == list(range(1990, 2081))
    one = open_fractions(files, states={"past": "past"}, grid=GRID, years=[2010], remainder="rest")
    assert one.state.values.tolist() == ["past", "rest"] and np.allclose(one.values[0, 0], want[1][1], atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(years=st.sets(st.integers(1990, 2080), min_size=1, max_size=5))
def test_years_between_are_linear_and_said_to_be(tmp_path_factory, years):
    files, *_ = files_in(tmp_path_factory.mktemp("years"))
    held = open_fractions(files, states=STATES, grid=GRID).values.astype(np.float64)
    coarse = open_fractions(files, states=STATES, grid=GRID, years=years, interpolate=True)
    at = np.interp(sorted(years), [1990, 2010, 2080], [0, 1, 2])
    low = np.floor(at).astype(int).clip(max=1)
    want = np.stack([held[i] * (1 - (v - i)) + held[i + 1] * (v - i) for i, v in zip(low, at, strict=True)])
    np.testing.assert_allclose(coarse.values, want, atol=1e-6)
    made = sorted(years - {1990, 2010, 2080})
    assert [int(part.split()[0]) for part in coarse.attrs.get("interpolated", "").split(", ") if part] == made


def test_years_are_not_made_without_leave(tmp_path):
    files, *_ = files_in(tmp_path)
    with pytest.raises(DataError, match=r"years are \[2019\]"):
        open_fractions(files, states=STATES, grid=GRID, years=[2010, 2019])
    with pytest.raises(DataError, match=r"years are \[1989, 2081\]"):
        open_fractions(files, states=STATES, grid=GRID, years=[1989, 2000, 2081], interpolate=True)


def test_cells_that_one_file_knows_are_land_without_agriculture_in_the_others(tmp_path):
    files, first, second = files_in(tmp_path)
    for data, name, scale in ((first, "a.nc", 1), (second, "b.nc", 100)):
        lost = data.copy(deep=True)
        for v in STATES.values():
            lost[v].loc[{"lat": 47.5, "lon": 2.5}] = np.nan
            if name == "a.nc":
                lost[v].loc[{"lat": 42.5, "lon": 12.5}] = np.nan
        store(lost, tmp_path / name, units="1" if scale == 1 else "percent", scale=scale)
    coarse = open_fractions(files, states=STATES, grid=GRID, years=[1990, 2010])
    assert np.isnan(coarse.values[:, :, 0, 0]).all() and np.isfinite(coarse.values).sum() == coarse.size - 6
    assert coarse.values[0, :, 1, 2].tolist() == [0, 0, 1] and coarse.values[1, 0, 1, 2] > 0


def test_files_with_faults_are_refused(tmp_path):
    files, first, _ = files_in(tmp_path)
    a, b = files

    def read(*given, states=STATES, **options):
        return open_fractions(list(given), states=states, grid=GRID, **options)

    with pytest.raises(ConfigError, match="remainder is 'pasture' beside the states"):
        read(a, remainder="pasture")
    with pytest.raises(DataError, match=r"holds \['crop', 'past'\], expected \['trees'\]"):
        read(a, states={"forest": "trees"})
    with pytest.raises(DataError, match=r"gcm of .* is 'z', expected one of \['a', 'b'\]"):
        read(FractionFile(a.path, year_dim="period", select={"gcm": "z"}))
    with pytest.raises(DataError, match="choose one label of each other dimension"):
        read(FractionFile(a.path, year_dim="period"))
    with pytest.raises(DataError, match="expected time; give year_dim or year"):
        read(FractionFile(a.path, year_dim="time", select={"gcm": "a"}))
    with pytest.raises(DataError, match=r"years \[2010\] are in more than one"):
        read(b, b)
    with pytest.raises(DataError, match="does not exist"):
        read(FractionFile(tmp_path / "none.nc", 2000))
    store(first, tmp_path / "c.nc", scale=2)
    with pytest.raises(DataError, match=r"expected 0\.\.1|expected at most"):
        read(FractionFile(tmp_path / "c.nc", year_dim="period", select={"gcm": "a"}))
    write(tmp_path / "d.nc", None, units="hectare")
    with pytest.raises(DataError, match="wrong units"):
        read(FractionFile(tmp_path / "d.nc", 2000, select={"gcm": "a"}))


def test_real_land_use_totals_become_igbp_shares(real_data):
    folder = real_data / "global_isimip2b_landuse"
    grid = make_grid((-180, -60, 180, 90), coarse_cell=0.5, factor=10, shard=600)
    files = [
        FractionFile(
            folder / "isimip2b_landuse_totals_global_0.5deg_1995_2080.nc",
            year_dim="period",
            select={"rcp": "rcp60", "gcm": "gfdl-esm2m"},
        ),
        FractionFile(folder / "isimip2b_landuse_totals_2005soc_global_0.5deg.nc", 2005),
    ]
    states = {"cropland": "cropland_total", "pasture": "pastures"}
    coarse = open_fractions(files, states=states, grid=grid, years=[1995, 2005, 2019, 2080], interpolate=True)
    known = np.isfinite(coarse.values)
    assert (known == known[:1, :1]).all() and known[0, 0].sum() == 67420
    np.testing.assert_allclose(np.nansum(coarse.values, axis=1)[:, known[0, 0]], 1, atol=1e-5)
    with xr.open_dataset(files[1].path) as raw:
        np.testing.assert_allclose(np.nan_to_num(raw.pastures.values[:300]), np.nan_to_num(coarse.values[1, 1]), atol=1e-6)
    part = 14 / 75
    values = coarse.values.astype(np.float64)
    np.testing.assert_allclose(values[2], values[1] * (1 - part) + values[3] * part, atol=1e-6)
    legend = load_legend("igbp")
    weights = load_crosswalk("isimip2b_to_igbp", legend).for_states(coarse.state.values)
    shares = np.stack([weights.to_classes(part) for part in coarse.values])
    np.testing.assert_allclose(shares.sum(axis=1)[:, known[0, 0]], 1, atol=1e-5)
    crops = shares[1, legend.names.index("cropland")]
    assert crops[95, 172] > 0.6  # Iowa, 42.25 N 93.75 W
