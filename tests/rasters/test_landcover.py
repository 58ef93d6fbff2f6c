from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import rasterio
import xarray as xr
from affine import Affine

from ai4land.errors import ConfigError, DataError
from ai4land.grid import make_grid
from ai4land.legend import load_legend
from ai4land.rasters.landcover import find_catalog_maps, find_maps
from tests.catalogs import make_item, save, write_cog

GRID = make_grid((-6, -4, 10, 8), coarse_cell=2.0, factor=4, shard=8, origin=(-6.0, 8.0))
HILDA, FOREST, LCCS = load_legend("hildaplus"), load_legend("hildaplus_forest"), load_legend("lccs_level1")


def write_tif(path: Path, maps, *, names=(), nodata=None) -> Path:
    bands = np.asarray(maps)
    bands = bands if bands.ndim == 3 else bands[None]
    profile = {"count": bands.shape[0], "height": bands.shape[1], "width": bands.shape[2], "nodata": nodata}
    path.parent.mkdir(exist_ok=True)
    t = GRID.fine.affine
    with rasterio.open(path, "w", "GTiff", dtype=bands.dtype, crs="EPSG:4326", transform=t, **profile) as file:
        file.write(bands)
        for number, name in enumerate(names, 1):
            file.set_band_description(number, name)
    return path


def draw(legend, count: int, dtype="uint8"):
    random = np.random.default_rng(3)
    return random.choice([legend.fill.code, *legend.codes.tolist()], (count, *GRID.shape)).astype(dtype)


def read(source, legend, **options):
    return {year: m.read() for year, m in find_maps(source, grid=GRID, legend=legend, **options).items()}


def dataset(maps, time, *, name="lccs_class", dim="time", attrs=None, dtype=None):
    coords = {dim: (dim, time, attrs or {}), "lat": GRID.coords()["latitude"], "lon": GRID.coords()["longitude"]}
    return xr.Dataset({name: ((dim, "lat", "lon"), maps if dtype is None else maps.astype(dtype))}, coords)


def test_the_same_maps_come_from_every_kind_of_source(tmp_path):
    maps, years = draw(LCCS, 3), [2001, 2003, 2010]
    for year, codes in zip(years, maps, strict=True):
        write_tif(tmp_path / "a [x]" / f"v1_LC_{year}_x.tif", codes)
        dataset(codes[None], [f"{year}-01-01"]).assign_coords(time=[np.datetime64(f"{year}-07-01", "ns")]).to_netcdf(
            tmp_path / f"cci_{year}.nc"
        )
    write_tif(tmp_path / "all.tif", maps, names=[f"year {y}" for y in years])
    days = {"units": "days since 2000-01-01", "calendar": "noleap"}
    dataset(maps, [400, 365 * 3 + 5, 3660], attrs=days).to_netcdf(tmp_path / "days.nc")
    dataset(maps, years, dim="year").to_netcdf(tmp_path / "years.nc")
    dataset(maps, np.array(years, "f8"), name="LULC_states").assign(other=("time", years)).to_netcdf(tmp_path / "plain.nc")
    dataset(maps, years, dim="year", name="land_cover").to_zarr(tmp_path / "cube.zarr", zarr_format=3)
    sources = [
        str(tmp_path / "a [x]" / "v1_LC_{year}_x.tif"),
        tmp_path / "a [x]" / "*_{year}_*.tif",
        {y: str(tmp_path / "a [x]" / f"v1_LC_{y}_x.tif") for y in reversed(years)},
        tmp_path / "cci_{year}.nc",
        *(tmp_path / n for n in ("all.tif", "days.nc", "years.nc", "plain.nc", "cube.zarr")),
    ]
    for source in sources:
        got = read(source, LCCS)
        assert list(got) == years
        for year, codes in zip(years, maps, strict=True):
            assert got[year].dtype == np.uint8
            np.testing.assert_array_equal(got[year], codes, err_msg=str(source))
    assert list(read(sources[0], LCCS, years=[2010, 2001, 2010])) == [2001, 2010]


def test_maps_are_read_one_at_a_time_and_years_checked_at_once(tmp_path):
    write_tif(tmp_path / "m_2001.tif", draw(HILDA, 1))
    (tmp_path / "m_2002.tif").write_text("damaged")
    maps = find_maps(tmp_path / "m_{year}.tif", grid=GRID, legend=HILDA)
    assert list(maps) == [2001, 2002] and maps[2001].read().any()
    with pytest.raises(DataError, match=r"m_2002.tif is truncated"):
        maps[2002].read()
    with pytest.raises(DataError, match=r"maps of \[1990, 2003\] are not in .* expected years out of \[2001, 2002\]"):
        find_maps(tmp_path / "m_{year}.tif", grid=GRID, legend=HILDA, years=[1990, 2001, 2003])


def test_signed_bytes_floats_with_nan_and_aliases_become_codes(tmp_path):
    codes = draw(LCCS, 1)[0]
    signed = dataset(codes[None].view("int8"), [2000], dim="year")
    signed.to_netcdf(tmp_path / "signed.nc")
    assert (signed["lccs_class"].values < 0).any()
    np.testing.assert_array_equal(read(tmp_path / "signed.nc", LCCS)[2000], codes)
    signed["lccs_class"].attrs = {"_Unsigned": "true", "_FillValue": np.int8(-1)}
    signed["lccs_class"][0, 0, 0] = -1
    signed.to_netcdf(tmp_path / "unsigned.nc")
    got = read(tmp_path / "unsigned.nc", LCCS)[2000]
    assert got[0, 0] == LCCS.fill.code and (got.ravel()[1:] == codes.ravel()[1:]).all()
    forest = draw(FOREST, 1)[0]
    floats = np.where(forest == 0, np.nan, forest).astype("float32")
    path = write_tif(tmp_path / "f_2009.tif", floats, nodata=np.nan)
    np.testing.assert_array_equal(read({2009: path}, FOREST)[2009], forest)
    np.testing.assert_array_equal(read({2009: path}, HILDA)[2009], np.where(forest // 10 == 4, 44, forest))


def test_the_vote_is_among_the_classes_of_the_legend_and_leaves_out_missing_cells(tmp_path):
    block = np.array([[40, 41, 45], [33, 33, 0], [99, 0, 0]], "uint8")
    big = np.tile(block, GRID.shape)
    path = tmp_path / "m.tif"
    t = GRID.fine.affine * rasterio.Affine.scale(1 / 3)
    with rasterio.open(
        path, "w", "GTiff", width=big.shape[1], height=big.shape[0], count=1, dtype="uint8", crs="EPSG:4326", transform=t
    ) as file:
        file.write(big, 1)
    assert (read({2000: path}, HILDA, resampling="mode")[2000] == 44).all()
    assert (read({2000: path}, FOREST, resampling="mode")[2000] == 33).all()


def test_unknown_codes_name_the_year_and_the_file(tmp_path):
    path = write_tif(tmp_path / "m_2001.tif", np.full(GRID.shape, 13, "uint8"))
    for resampling in ("exact", "nearest", "mode"):
        with pytest.raises(DataError, match=r"land-cover map of 2001 \(.*m_2001.tif\) holds class codes 13 .* legend hildaplus"):
            read({2001: path}, HILDA, resampling=resampling)


def test_a_map_without_a_class_is_refused(tmp_path):
    with pytest.raises(DataError, match="all nodata"):
        read({2001: write_tif(tmp_path / "m.tif", np.full(GRID.shape, 99, "uint8"))}, HILDA)


def test_sources_that_are_not_clear_are_refused(tmp_path):
    one = write_tif(tmp_path / "x_2000.tif", draw(HILDA, 1))
    write_tif(tmp_path / "y_2000.tif", draw(HILDA, 1))
    write_tif(tmp_path / "twice.tif", draw(HILDA, 2), names=["2000", "2000"])
    dataset(draw(LCCS, 2), [0, 30], attrs={"units": "days since 2000-01-01"}).to_netcdf(tmp_path / "twice.nc")
    dataset(draw(LCCS, 2), [2000, 2001], dim="step").to_netcdf(tmp_path / "step.nc")
    bad = {
        str(tmp_path / "*_{year}.tif"): "are both of 2000",
        str(tmp_path / "z_{year}.tif"): "no file matches",
        str(tmp_path / "none.tif"): "does not exist",
        str(tmp_path): "is a folder, expected a pattern",
        str(one): "described as .* expected a year each",
        str(tmp_path / "twice.tif"): "years .2000. more than once",
        str(tmp_path / "twice.nc"): "2 time steps in 1 years",
        str(tmp_path / "step.nc"): "expected time or year",
    }
    for source, text in bad.items():
        with pytest.raises(DataError, match=text):
            find_maps(source, grid=GRID, legend=LCCS)
    with pytest.raises(DataError, match="empty dict"):
        find_maps({}, grid=GRID, legend=LCCS)
    with pytest.raises(ConfigError, match="expected exact, nearest or mode"):
        find_maps({2000: one}, grid=GRID, legend=HILDA, resampling="average")


def test_real_bavarian_maps_have_the_known_counts(real_data):
    source = real_data / "bavaria_cci_landcover" / "cci_lc_bavaria_300m_1992-2015.tif"
    grid = make_grid((8.975, 47.2694, 13.839, 50.5639), coarse_cell=100 / 360, factor=100, shard=400)
    assert list(find_maps(source, grid=grid, legend=LCCS)) == list(range(1992, 2016))
    first, last = (m.read() for m in find_maps(source, grid=grid, legend=LCCS, years=[1992, 2015]).values())
    assert ((first != 0) == (last != 0)).all() and np.count_nonzero(first) == 1_122_489
    assert np.count_nonzero(first == 10) == 405_819 and np.count_nonzero(first == 70) == 229_270
    assert np.count_nonzero(first != last) == 95_011


def test_real_uk_maps_need_the_nearest_cell(real_data):
    source = str(real_data / "uk_hilda_plus" / "*_HILDA_UK_LULC_{year}.tif")
    grid = make_grid((-8.5, 49.5, 2.0, 61.0), coarse_cell=0.5, factor=50, shard=400)
    with pytest.raises(
        DataError, match=r"cells of 0.00998862433 x 0.00998834659, expected 0.01 x 0.01 .* choose resampling nearest"
    ):
        find_maps(source, grid=grid, legend=FOREST)[2009].read()
    found = find_maps(source, grid=grid, legend=FOREST, resampling="nearest")
    maps = {year: m.read() for year, m in found.items()}
    assert list(maps) == [2009, 2012]
    shares = []
    for year, name in ((2009, "20221006_HILDA_UK_LULC_2009.tif"), (2012, "20230211_HILDA_UK_LULC_2012.tif")):
        with rasterio.open(real_data / "uk_hilda_plus" / name) as file:
            stored = file.read(1)
        counts = [(np.count_nonzero(maps[year] == c), np.count_nonzero(stored == c)) for c in (22, 33, 41)]
        shares += [np.log(got / want) for got, want in counts]
    assert all(abs(a - b) < 0.02 for a, b in itertools.combinations(shares, 2))
    assert abs(np.mean(shares)) < 0.01


@pytest.fixture
def tiled(tmp_path):
    """A catalogue of two years of maps in two halves, in the codes of ESA CCI, and what they say."""
    rng, half = np.random.default_rng(5), GRID.shape[1] // 2
    known = [10, 11, 30, 50, 70, 130, 190, 210, 0]
    codes = {year: rng.choice(known, GRID.shape).astype("uint8") for year in (2000, 2001)}
    items = []
    for year, values in codes.items():
        for name, cut in (("west", slice(0, half)), ("east", slice(half, None))):
            t = GRID.fine.affine * Affine.translation(cut.start, 0)
            path = write_cog(tmp_path / f"{name}_{year}.tif", values[:, cut], t, nodata=0)
            fields = {"lccs": {"nodata": 0, "data_type": "uint8"}}
            items.append(make_item(f"{name}-{year}", {"lccs": path}, t, values[:, cut].shape, year=year, extra=fields))
    return save(tmp_path, {"cci": items}), codes


def test_maps_of_a_catalogue_are_those_of_files(tiled, tmp_path):
    catalog, codes = tiled
    maps = find_catalog_maps(str(catalog), collections=["cci"], asset="lccs", grid=GRID, legend=LCCS)
    assert list(maps) == [2000, 2001]
    for year, values in codes.items():
        whole = maps[year].read()
        assert np.array_equal(whole, LCCS.decode(LCCS.encode(values))) and (whole[values == 11] == 10).all()
        for w in GRID.shards():
            assert np.array_equal(maps[year].read(w), whole[w.slices])
    with pytest.raises(DataError, match="cci and cci both have a map of 2000"):
        find_catalog_maps(str(catalog), collections=["cci", "cci"], asset="lccs", grid=GRID, legend=LCCS)
    again = pickle.loads(pickle.dumps(maps[2000]))
    assert np.array_equal(again.read(), maps[2000].read())


def test_what_no_item_covers_has_no_class_and_what_is_no_annual_map_is_refused(tmp_path):
    t, shape = GRID.fine.affine, (GRID.shape[0], GRID.shape[1] // 2)
    path = write_cog(tmp_path / "a.tif", np.full(shape, 50, "uint8"), t, nodata=0)
    item = make_item("a", {"lccs": path}, t, shape, extra={"lccs": {"nodata": 0, "data_type": "uint8"}})
    catalog = save(tmp_path, {"cci": [item]})
    about = {"collections": ["cci"], "asset": "lccs", "grid": GRID, "legend": LCCS}
    (found,) = find_catalog_maps(str(catalog), **about).values()
    assert (found.read()[:, : shape[1]] == 50).all() and (found.read()[:, shape[1] :] == LCCS.fill.code).all()
    assert (found.read(GRID.shards()[-1]) == LCCS.fill.code).all()
    with pytest.raises(ConfigError, match="from a catalogue is 'mode', expected exact or nearest"):
        find_catalog_maps(str(catalog), resampling="mode", **about)
    (tmp_path / "other").mkdir()
    more = make_item("b", {"lccs": write_cog(tmp_path / "other" / "a.tif", np.full(shape, 50, "uint8"), t)}, t, shape)
    more.properties |= {"start_datetime": "2000-01-01T00:00:00Z", "end_datetime": "2004-12-31T00:00:00Z"}
    with pytest.raises(DataError, match="item b is of the years 2000-2004, expected one year"):
        find_catalog_maps(str(save(tmp_path / "other", {"cci": [more]})), **about)


@pytest.mark.parametrize("code", [311, -9999])
def test_codes_of_a_catalogue_that_the_legend_lacks_are_refused_and_not_cut_to_bytes(tmp_path, code):
    values = np.full(GRID.shape, 50, "int16")
    values[3, 4] = code
    path = write_cog(tmp_path / "a.tif", values, GRID.fine.affine, nodata=0)
    item = make_item("a", {"lccs": path}, GRID.fine.affine, GRID.shape, extra={"lccs": {"nodata": 0, "data_type": "int16"}})
    catalog = str(save(tmp_path, {"cci": [item]}))
    (found,) = find_catalog_maps(catalog, collections=["cci"], asset="lccs", grid=GRID, legend=LCCS).values()
    with pytest.raises(DataError, match=rf"{code}"):
        found.read()
