"""Yearly changes of area on a map, on files made here and on the real ones where they are."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st

from ai4land.errors import ConfigError, DataError
from ai4land.grid import block_sum, make_grid
from ai4land.legend import MISSING, load_legend
from ai4land.rasters.landcover import find_maps
from ai4land.scenario.areachange import open_change
from ai4land.store.shard import of_array

GRID = make_grid((0, 40, 20, 50), coarse_cell=5, factor=10, shard=20)
LEGEND = load_legend("hildaplus_forest")
ROWS, COLS = (int(v) for v in GRID.coarse.shape)


def write_change(path: Path, bands: dict[str, np.ndarray], transform: Affine = GRID.coarse.affine, *, crs="EPSG:4326") -> Path:
    first = next(iter(bands.values()))
    profile = {"driver": "GTiff", "height": first.shape[0], "width": first.shape[1], "count": len(bands), "dtype": "float64"}
    with rasterio.open(path, "w", crs=crs, transform=transform, nodata=np.nan, **profile) as file:
        for number, (label, values) in enumerate(bands.items(), start=1):
            file.write(values, number)
            file.set_band_description(number, label)
    return path


def map_of(seed: int, *, classes: int = 4, land: np.ndarray | None = None) -> np.ndarray:
    index = np.random.default_rng(seed).integers(0, classes, GRID.shape).astype(np.uint8)
    return LEGEND.decode(index if land is None else np.where(land, index, MISSING).astype(np.uint8))


def class_areas(codes: np.ndarray) -> np.ndarray:
    """km2 of each class in each coarse cell of the grid."""
    index = LEGEND.encode(codes)
    area = np.broadcast_to(GRID.cell_areas()[:, None] / 1e6, index.shape)
    return np.stack([block_sum(np.where(index == k, area, 0.0), GRID.factor) for k in range(LEGEND.n)])


def change_of(paths, base, **options) -> np.ndarray:
    """Scenario in km2 ``(year, class, rows, cols)``, 0 without land."""
    coarse = open_change(paths, base=of_array(base), base_year=2000, legend=LEGEND, grid=GRID, **options)
    assert coarse.year.values.tolist() == [2000, *sorted(paths)] and coarse.state.values.tolist() == [
        str(c) for c in LEGEND.codes
    ]
    land = class_areas(base).sum(axis=0)
    assert np.isnan(coarse.values[:, :, land == 0]).all()
    valid = coarse.values[:, :, land > 0]
    np.testing.assert_allclose(valid.sum(axis=1), 1, atol=1e-5)
    assert valid.min() >= 0
    return np.nan_to_num(coarse.values.astype(np.float64)) * land


def balanced(rng: np.random.Generator, shape: tuple[int, ...], size: float) -> np.ndarray:
    """Change of three classes that sums to 0."""
    change = rng.uniform(-size, size, (3, *shape))
    return change - change.mean(axis=0)


def bands_of(change: np.ndarray, **more: np.ndarray) -> dict[str, np.ndarray]:
    return {**{f"LC{LEGEND.codes[k]}": c for k, c in enumerate(change)}, **more}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 5000))
def test_change_that_cells_hold_is_added(tmp_path_factory, seed, size):
    folder, rng = tmp_path_factory.mktemp("change"), np.random.default_rng(seed)
    change = [balanced(rng, (ROWS, COLS), size) for _ in range(2)]
    base = map_of(seed)
    paths = {2001 + i: write_change(folder / f"{i}.tif", bands_of(c)) for i, c in enumerate(change)}
    km2 = change_of(paths, base)
    np.testing.assert_allclose(km2[0], class_areas(base), rtol=1e-5)
    want = class_areas(base)
    for year, part in enumerate(change, start=1):
        want[:3] += part
        np.testing.assert_allclose(km2[year], want, rtol=1e-4, atol=1)


def test_loss_that_is_not_held_is_dropped_with_as_much_gain(tmp_path, caplog):
    base = np.full(GRID.shape, LEGEND.codes[0])
    base[:, 5:] = LEGEND.codes[1]
    have = class_areas(base)
    change = np.stack([np.full((ROWS, COLS), v) for v in (-1e5, -1e4, 1.1e5)])
    with caplog.at_level(logging.INFO):
        km2 = change_of({2001: write_change(tmp_path / "a.tif", bands_of(change))}, base)
    # Only the first column of coarse cells holds class 0, half of it; what lacks of its loss is no gain of class 2 either.
    assert "exceeds what its zones hold and is dropped" in caplog.text
    np.testing.assert_allclose(km2[1, 0], np.clip(have[0] - 1e5, 0, None), atol=1)
    np.testing.assert_allclose(km2[1, 1], have[1] - 1e4, rtol=1e-4)
    np.testing.assert_allclose(km2[1, 2], np.minimum(have[0], 1e5) + 1e4, rtol=1e-4)


COAST = np.zeros(GRID.shape, dtype=bool)
COAST[:, :34] = True
COAST[:8, 30:] = False
"""Land: three columns of coarse cells, and slivers 4 fine cells wide in the fourth."""


def coastal(
    tmp_path: Path, seed: int, *, land_of_slivers: float = 1.0, name: str = "a.tif", size: float = 3000
) -> tuple[np.ndarray, np.ndarray, dict]:
    """A map with slivers, the change of the cells beside them, and a file in which the slivers have no data."""
    base = map_of(seed, land=COAST)
    km2 = class_areas(base).sum(axis=0)
    change = balanced(np.random.default_rng(seed), (ROWS, COLS), size)
    spoken = km2.copy()
    spoken[:, 2] += land_of_slivers * km2[:, 3]
    change[:, :, 3] = np.nan
    spoken[:, 3] = np.nan
    return base, change, {2001: write_change(tmp_path / name, bands_of(change, cell_area=spoken))}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 3000))
def test_slivers_share_the_change_of_the_cell_they_were_merged_into(tmp_path_factory, seed, size):
    base, change, paths = coastal(tmp_path_factory.mktemp("coast"), seed, size=size)
    before, after = class_areas(base), change_of(paths, base)[1]
    made = after - before
    zone = np.nan_to_num(change[:, :, 2])
    np.testing.assert_allclose(made[:3, :, 2:].sum(axis=2), zone, rtol=1e-3, atol=2)
    np.testing.assert_allclose(made[:3, :, :2], change[:, :, :2], rtol=1e-3, atol=2)
    np.testing.assert_allclose(made.sum(axis=0), 0, atol=2)
    # Every part loses the same share of what it holds of a class.
    for row in range(ROWS):
        for k in np.flatnonzero(zone[:, row] < -10):
            lost, held = made[k, row, 2:], before[k, row, 2:]
            assert lost[0] * held[1] == pytest.approx(lost[1] * held[0], rel=1e-2, abs=1e-2)


def test_slivers_stay_as_they_are_without_word_that_they_were_merged(tmp_path):
    base, change, paths = coastal(tmp_path, 5)
    slivers = class_areas(base)[..., 3]
    assert np.abs(change_of(paths, base)[1][..., 3] - slivers).max() > 10
    np.testing.assert_allclose(change_of(paths, base, merge=False)[1][..., 3], slivers, rtol=1e-5)
    _, _, apart = coastal(tmp_path, 5, land_of_slivers=0.0, name="b.tif")
    np.testing.assert_allclose(change_of(apart, base)[1][..., 3], slivers, rtol=1e-5)
    silent = {2001: write_change(tmp_path / "c.tif", bands_of(change))}
    np.testing.assert_allclose(change_of(silent, base)[1][..., 3], slivers, rtol=1e-5)


def test_land_goes_to_the_nearest_centre_in_degrees_cell_by_cell(tmp_path):
    land = np.ones(GRID.shape, dtype=bool)
    base = np.where(land, LEGEND.codes[0], 0).astype(np.uint8)
    km2 = class_areas(base).sum(axis=0)
    # Only two cells have data, beside each other around the middle of the first row: the land between goes half and half.
    change = np.full((3, ROWS, COLS), np.nan)
    change[:, 0, 0], change[:, 0, 3] = [-900, 900, 0], [-1800, 0, 1800]
    spoken = np.full((ROWS, COLS), np.nan)
    spoken[0, 0] = spoken[0, 3] = km2.sum() / 2
    made = change_of({2001: write_change(tmp_path / "a.tif", bands_of(change, cell_area=spoken))}, base)[1]
    np.testing.assert_allclose(made[1, :, :2] / km2[:, :2], 900 / km2[:, :2].sum(), rtol=1e-3)
    np.testing.assert_allclose(made[2, :, 2:] / km2[:, 2:], 1800 / km2[:, 2:].sum(), rtol=1e-3)
    assert not made[1, :, 2:].any() and not made[2, :, :2].any()


def test_change_of_other_cells_is_conserved(tmp_path):
    change = balanced(np.random.default_rng(0), (3, 6), 3000)
    change[:, 0, 0] = np.nan
    base = map_of(1)
    for turn in (0, 360):
        path = write_change(tmp_path / f"{turn}.tif", bands_of(change), Affine(3, 0, 1 + turn, 0, -3, 49.5))
        made = change_of({2001: path}, base)[1] - class_areas(base)
        np.testing.assert_allclose(made[:3].sum(axis=(1, 2)), np.nansum(change, axis=(1, 2)), atol=3)
        assert np.abs(made).max() > 100


def test_zones_may_differ_from_year_to_year(tmp_path):
    base, change, paths = coastal(tmp_path, 3)
    full = np.nan_to_num(change) / 2
    paths[2002] = write_change(tmp_path / "full.tif", bands_of(full))
    made = change_of(paths, base)
    np.testing.assert_allclose((made[2] - made[1])[:3], full, rtol=1e-3, atol=2)


def test_changes_with_faults_are_refused(tmp_path):
    change, base = np.ones((ROWS, COLS)), map_of(0)

    def read(path, *, years=(2001,), base=base, grid=GRID):
        return open_change(dict.fromkeys(years, path), base=of_array(base), base_year=2000, legend=LEGEND, grid=grid)

    good = write_change(tmp_path / "good.tif", {"LC11": change})
    assert read(good, years=(2001, 2002)).shape[0] == 3
    with pytest.raises(DataError, match="expected every year from 2001"):
        read(good, years=(2001, 2003))
    with pytest.raises(DataError, match="base map has no class anywhere"):
        read(good, base=np.zeros_like(base))
    flat = make_grid((0, 0, 40, 20), coarse_cell=10, factor=10, shard=20, origin=(0, 20), crs="EPSG:32632")
    with pytest.raises(ConfigError, match="expected degrees"):
        read(good, grid=flat)
    with pytest.raises(DataError, match="expected bands described LC"):
        read(write_change(tmp_path / "b.tif", {"urban": change}))
    with pytest.raises(DataError, match="class codes 12"):
        read(write_change(tmp_path / "c.tif", {"LC12": change}))
    with pytest.raises(DataError, match="expected km2"):
        read(write_change(tmp_path / "d.tif", {"LC11": change * 1e6}))
    with pytest.raises(DataError, match="reproject it"):
        read(write_change(tmp_path / "e.tif", {"LC11": change}, Affine(1e3, 0, 0, 0, -1e3, 0), crs="EPSG:32632"))
    with pytest.raises(DataError, match="expected some overlap"):
        read(write_change(tmp_path / "f.tif", {"LC11": change}, Affine(5, 0, -170, 0, -5, -20)))
    (tmp_path / "g.tif").write_bytes(good.read_bytes()[:100])
    with pytest.raises(DataError, match="truncated or not a GeoTIFF"):
        read(tmp_path / "g.tif")


def test_real_hilda_change_leads_from_one_map_to_the_other(real_data):
    folder = real_data / "uk_hilda_plus"
    grid = make_grid((-8.5, 49.5, 2, 61), coarse_cell=0.5, factor=50, shard=400)
    source = {2009: folder / "20221006_HILDA_UK_LULC_2009.tif", 2012: folder / "20230211_HILDA_UK_LULC_2012.tif"}
    maps = {year: m.read() for year, m in find_maps(source, grid=grid, legend=LEGEND, resampling="nearest").items()}
    area = np.broadcast_to(grid.cell_areas()[:, None] / 1e6, grid.shape)
    seen = LEGEND.encode(maps[2009]) != MISSING
    truth, start = (
        np.stack([block_sum(np.where(seen & (maps[y] == c), area, 0.0), 50) for c in LEGEND.codes]) for y in (2012, 2009)
    )
    land = block_sum(np.where(seen, area, 0.0), 50)
    paths = {y: folder / f"20221006_HILDA_UK_LUC_{y - 1}_{y}.tif" for y in (2010, 2011, 2012)}
    off = {}
    for merge in (False, True):
        coarse = open_change(paths, base=of_array(maps[2009]), base_year=2009, legend=LEGEND, grid=grid, merge=merge)
        np.testing.assert_allclose(np.nan_to_num(coarse.values[0]) * land, start, atol=1)
        off[merge] = np.abs(np.nan_to_num(coarse.values[3].astype(np.float64)) * land - truth).sum() / 2 / land.sum()
    # Of the 4.7 % net change between the maps; merging the slivers brings the scenario closer to the map it was made from.
    assert off[True] < 0.01 < off[False] < 0.015
