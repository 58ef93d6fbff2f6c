from __future__ import annotations

import os
import signal
import socket
import subprocess
import tracemalloc
from functools import partial

import numpy as np
import pytest
import rasterio
import xarray as xr
import zarr
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from ai4land.cube.template import chunk_side
from ai4land.errors import DataError, MismatchError
from ai4land.grid import COARSE_DIMS, Grid, Window, make_grid
from ai4land.legend import load_legend
from ai4land.rasters.read import open_raster
from ai4land.store.read import check_identity, open_store
from ai4land.store.shard import Layer, of_array
from ai4land.store.write import write_store
from ai4land.workers.cluster import local
from tests.stores import write_tiny_store

YEARS = [2001, 2003]
LEGEND = load_legend("hildaplus")
STATES = ["primf", "urban"]


def parts(*, shard: int = 16, height=None, mask=None) -> dict:
    """What a small global store (32 x 64 cells, 8 x 16 coarse cells) is written from."""
    grid = make_grid((-180, -90, 180, 90), coarse_cell=22.5, factor=4, shard=shard)
    rng = np.random.default_rng(0)
    if mask is None:
        mask = np.zeros(grid.shape, bool)
        mask[4:20, 10:50] = True
    maps = {y: of_array(np.where(mask, rng.choice(LEGEND.codes, grid.shape), 0).astype(np.uint8)) for y in YEARS}
    height = rng.normal(size=grid.shape) if height is None else height
    coords = {d: grid.coords()[d] for d in COARSE_DIMS}
    coarse = xr.DataArray(
        rng.random((3, 2, *grid.coarse.shape)).astype(np.float32),
        dims=("year", "state", *COARSE_DIMS),
        coords={"year": [2000, 2001, 2003], "state": STATES, **coords},
    )
    layers = [Layer("height", False, of_array(height.astype(np.float32))), Layer("zone", True, of_array(mask + np.float32(1)))]
    given = {"grid": grid, "legend": LEGEND, "mask": of_array(mask), "maps": maps, "coarse": coarse}
    return {**given, "layers": layers, "identity": {"grid": "a", "static": "b"}}


@pytest.mark.parametrize("shard", [8, 16, 32])
def test_fine_arrays_are_sharded_like_the_grid(tmp_path, shard):
    made = parts(shard=shard)
    write_store(tmp_path / "s.zarr", **made)
    group = zarr.open_group(tmp_path / "s.zarr", mode="r")
    assert group.metadata.zarr_format == 3
    side = chunk_side(made["grid"])
    expected = {"mask": ((), ()), "static": ((2,), (2,)), "land_cover": ((1,), (1,))}
    for name, (chunks, shards) in expected.items():
        assert group[name].chunks == (*chunks, side, side) and group[name].shards == (*shards, shard, shard)
    assert group["mask"].dtype == np.uint8 and group["land_cover"].fill_value == 0


def test_store_holds_what_it_was_given(tmp_path):
    made = parts()
    lines: list[str] = []
    write_store(tmp_path / "s.zarr", **made, progress=lines.append)
    store, grid = open_store(tmp_path / "s.zarr"), made["grid"]
    whole = Window(0, 0, *grid.shape)
    for name, values in grid.coords().items():
        assert np.array_equal(store[name].values, values)
    assert Grid.from_dict(store.attrs["grid"]) == grid
    assert np.array_equal(store["mask"].values.astype(bool), made["mask"](whole))
    for year, read in made["maps"].items():
        assert np.array_equal(store["land_cover"].sel(observed_year=year).values, read(whole))
    assert store["feature"].values.tolist() == ["height", "zone"] and store["categorical"].values.tolist() == [False, True]
    assert np.array_equal(store["static"][0].values, made["layers"][0].read(whole))
    assert len(lines) == 1 + 2 + len(YEARS)


def test_coarse_states_stay_coarse(tmp_path):
    made = parts()
    write_store(tmp_path / "s.zarr", **made)
    coarse, grid = open_store(tmp_path / "s.zarr")["coarse"], made["grid"]
    assert coarse.dims == ("year", "state", *COARSE_DIMS) and coarse.shape[2:] == grid.coarse.shape
    xr.testing.assert_identical(coarse.drop_attrs().rename(None), made["coarse"])


def distance(rows, cols, width):
    """Distance in cells on a globe of so many columns."""
    return np.hypot(rows, np.minimum(np.abs(cols), width - np.abs(cols)))


def filled_by_definition(field, mask, factor: int) -> np.ndarray:
    """Fill gaps of a globe cell by cell: from the nearest value within a coarse cell, else from the nearest coarse cell's stand-in."""
    valid, rows, cols = np.isfinite(field), field.shape[0] // factor, field.shape[1] // factor
    values, own = np.argwhere(valid), np.argwhere(valid & mask)
    middle = np.floor_divide(own, factor) * factor + (factor - 1) / 2
    near = np.hypot(*(own - middle).T)
    options: dict[tuple[int, int], set[float]] = {}
    for row, col in np.ndindex(rows, cols):
        here = (own // factor == (row, col)).all(axis=1)
        if here.any():
            options[row, col] = set(field[tuple(own[here & np.isclose(near, near[here].min())].T)].tolist())
    out = np.empty(field.shape, dtype=object)
    for cell in np.ndindex(field.shape):
        out[cell] = {float(field[cell])}
        if valid[cell] or not mask[cell]:
            continue
        away = distance(*(values - cell).T, field.shape[1])
        if away.min() <= factor:
            out[cell] = set(field[tuple(values[np.isclose(away, away.min())].T)].tolist())
        else:
            far = {c: distance(c[0] - cell[0] // factor, c[1] - cell[1] // factor, cols) for c in options}
            out[cell] = set().union(*(options[c] for c, d in far.items() if np.isclose(d, min(far.values()))))
    return out


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), lost=st.sampled_from([0.05, 0.5, 0.9, 0.99]), bad=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_gaps_are_filled_alike_however_the_grid_is_cut(tmp_path_factory, seed, lost, bad):
    folder, rng = tmp_path_factory.mktemp("cut"), np.random.default_rng(seed)
    height = rng.permutation(32 * 64).reshape(32, 64).astype(np.float32)
    blobs = ndimage.gaussian_filter(rng.random(height.shape), rng.choice([0, 1, 4]))
    height[blobs < np.quantile(blobs, lost)] = bad
    mask = ndimage.gaussian_filter(rng.random(height.shape), 2) > 0.5
    mask[tuple(np.argwhere(np.isfinite(height))[0])] = True
    stored = []
    for shard in (8, 16, 32):
        write_store(folder / f"{shard}.zarr", **parts(shard=shard, height=height, mask=mask))
        stored.append(open_store(folder / f"{shard}.zarr")["static"][0].values)
    for other in stored[1:]:
        np.testing.assert_array_equal(stored[0], other)
    assert np.isfinite(stored[0][mask]).all()
    want = filled_by_definition(height, mask, 4)
    assert all(float(stored[0][cell]) in want[cell] or np.isnan(stored[0][cell]) for cell in np.ndindex(height.shape))


def test_what_was_filled_is_told(tmp_path):
    height = np.ones((32, 64), np.float32)
    height[4:20, 10:26] = np.nan
    lines: list[str] = []
    write_store(tmp_path / "s.zarr", **parts(height=height), progress=lines.append)
    # Of 16 x 40 mapped cells 16 x 16 lack a value; those within four rows or columns of one take it, which leaves 8 x 8.
    assert "static layer: height, 40.00% of the cells filled from the nearest, 10.00% from farther than a coarse cell" in lines


def test_workers_make_the_same_store(tmp_path):
    rng = np.random.default_rng(1)
    height = np.where(rng.random((32, 64)) < 0.97, np.nan, rng.random((32, 64))).astype(np.float32)
    write_store(tmp_path / "here.zarr", **parts(shard=8, height=height))
    with local(2, dashboard=False) as client:
        write_store(tmp_path / "there.zarr", **parts(shard=8, height=height), client=client)
        empty = parts(shard=8, height=np.full((32, 64), np.nan))
        with pytest.raises(DataError, match="static layer height is all nodata"):
            write_store(tmp_path / "empty.zarr", **empty, client=client)
        wrong = [Layer("wrong", False, refuse), *empty["layers"]]
        with pytest.raises(DataError, match="nothing to read"):
            write_store(tmp_path / "empty.zarr", **{**empty, "layers": wrong}, client=client)
    here, there = ({p.relative_to(s): p.read_bytes() for p in s.rglob("*") if p.is_file()} for s in sorted(tmp_path.iterdir()))
    assert here == there and len(here) > 40


def test_a_worker_that_dies_changes_nothing(tmp_path):
    height = np.arange(32 * 64, dtype=np.float32).reshape(32, 64)
    height[5:9, 20:30] = np.nan

    def dying(window: Window) -> np.ndarray:
        if window.row < 16 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return height[window.slices]

    write_store(tmp_path / "here.zarr", **parts(shard=8, height=height))
    made = parts(shard=8, height=height)
    with local(2, dashboard=False) as client:
        layers = [Layer("height", False, dying), made["layers"][1]]
        write_store(tmp_path / "there.zarr", **{**made, "layers": layers}, client=client)
    assert (tmp_path / "died").exists()
    here, there = (
        {p.relative_to(s): p.read_bytes() for p in s.rglob("*") if p.is_file()} for s in sorted(tmp_path.glob("*.zarr"))
    )
    assert here == there and not list(tmp_path.glob(".*"))


def refuse(window: Window) -> np.ndarray:
    raise DataError("nothing to read, expected a file")


def test_a_layer_is_never_in_memory_whole(tmp_path):
    grid = make_grid((0, 0, 64, 32), coarse_cell=0.5, factor=16, shard=128, origin=(0, 32))
    layer_bytes = 4 * grid.shape[0] * grid.shape[1]
    coords = grid.coords()
    coarse = np.ones((1, 1, *grid.coarse.shape), np.float32)
    dims = ("year", "state", *COARSE_DIMS)
    coarse = xr.DataArray(coarse, dims=dims, coords={"year": [2001], "state": ["a"], **{d: coords[d] for d in COARSE_DIMS}})

    def height(w: Window) -> np.ndarray:
        field = np.add.outer(np.arange(w.row, w.row + w.height), np.arange(w.col, w.col + w.width)).astype(np.float32)
        field[np.abs(field - 900) < 300] = np.nan
        return field

    tracemalloc.start()
    try:
        write_store(
            tmp_path / "s.zarr",
            grid=grid,
            legend=LEGEND,
            mask=lambda w: np.ones((w.height, w.width), bool),
            maps={2001: lambda w: np.full((w.height, w.width), 11, np.uint8)},
            coarse=coarse,
            layers=[Layer("height", False, height)],
            identity={},
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert layer_bytes == 8 * 2**20 and peak < layer_bytes / 2
    assert np.isfinite(open_store(tmp_path / "s.zarr")["static"]).all()


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 10**6), shard=st.sampled_from([16, 32]))
def test_a_planet_rolled_by_half_has_the_same_static_layers_rolled(tmp_path_factory, seed, shard):
    folder, rng = tmp_path_factory.mktemp("planet"), np.random.default_rng(seed)
    coarser, finer = rng.random((16, 32)).astype("float32"), rng.random((128, 256)).astype("float32")
    coarser[rng.random(coarser.shape) < 0.6] = np.nan
    finer[rng.random((8, 16)).repeat(16, 0).repeat(16, 1) < 0.7] = np.nan
    mask = rng.random((32, 64)) < 0.8
    found = {}
    for turn in (0, 1):
        made = parts(shard=shard, mask=np.roll(mask, 32 * turn, axis=1))
        layers = []
        for name, values, resampling in (
            ("coarser", coarser, "bilinear"),
            ("finer", finer, "average"),
            ("code", finer, "nearest"),
        ):
            rolled = np.roll(values, values.shape[1] // 2 * turn, axis=1)
            rows, cols = values.shape
            path = folder / f"{name}{turn}.tif"
            place = {"crs": "EPSG:4326", "transform": Affine(360 / cols, 0, -180, 0, -180 / rows, 90), "nodata": np.nan}
            with rasterio.open(path, "w", "GTiff", height=rows, width=cols, count=1, dtype="float32", **place) as file:
                file.write(rolled, 1)
            read = partial(open_raster, path, grid=made["grid"], resampling=resampling)
            layers.append(Layer(name, False, lambda window, read=read: read(window=window).values))
        write_store(folder / f"{turn}.zarr", **{**made, "layers": layers})
        found[turn] = open_store(folder / f"{turn}.zarr")["static"].values
        assert np.isfinite(found[turn][:, made["mask"](Window(0, 0, 32, 64))]).all()
    np.testing.assert_allclose(np.roll(found[0], 32, axis=2), found[1], rtol=2e-6)


def test_layer_without_a_value_on_the_mask_leaves_no_store(tmp_path):
    made = parts()
    height = np.where(made["mask"](Window(0, 0, *made["grid"].shape)), np.nan, 1.0)
    with pytest.raises(DataError, match="static layer height is all nodata on the mapped cells"):
        write_store(tmp_path / "s.zarr", **parts(height=height))
    assert not list(tmp_path.iterdir())


def test_maps_in_the_wrong_order_leave_no_store(tmp_path):
    made = parts()
    with pytest.raises(DataError, match=r"maps come in the order \[2003, 2001\], expected ascending years"):
        write_store(tmp_path / "s.zarr", **{**made, "maps": dict(reversed(made["maps"].items()))})
    assert not list(tmp_path.iterdir())


def test_grid_without_a_mapped_cell_leaves_no_store(tmp_path):
    with pytest.raises(DataError, match=r"no cell is mapped in \(-180"):
        write_store(tmp_path / "s.zarr", **parts(mask=np.zeros((32, 64), bool)))
    assert not list(tmp_path.iterdir())


def test_map_without_land_leaves_no_store(tmp_path):
    made = parts()
    mask = made["mask"](Window(0, 0, *made["grid"].shape))
    maps = {2001: made["maps"][2001], 2003: of_array(np.where(mask, 0, 11).astype(np.uint8))}
    with pytest.raises(DataError, match="map of 2003 has no class on any mapped cell"):
        write_store(tmp_path / "s.zarr", **{**made, "maps": maps})
    assert not list(tmp_path.iterdir())


def test_failed_writing_keeps_the_old_store(tmp_path):
    made = parts()
    write_store(tmp_path / "s.zarr", **made)
    with pytest.raises(DataError):
        write_store(tmp_path / "s.zarr", **{**made, "maps": dict(reversed(made["maps"].items())), "identity": {}})
    assert [p.name for p in tmp_path.iterdir()] == ["s.zarr"] and check_identity(tmp_path / "s.zarr", made["identity"])


def stamps(folder):
    """Every file with its inode and time of change: equal if nothing was written, moved or deleted."""
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_second_of_two_runs_keeps_the_finished_store_of_the_first(tmp_path):
    made, path, lines, seen = parts(), tmp_path / "s.zarr", [], []

    def other_run_first(window):
        if not path.exists():  # the other run finishes while this one reads its maps
            write_store(tmp_path / "other.zarr", **made)
            (tmp_path / "other.zarr").replace(path)
            seen.append(stamps(path))
        return made["maps"][2001](window)

    write_store(path, **{**made, "maps": {**made["maps"], 2001: other_run_first}, "progress": lines.append})
    assert seen and stamps(path) == seen[0]
    assert any("made meanwhile by another process from the same inputs, and is kept" in line for line in lines)
    assert [p.name for p in tmp_path.iterdir()] == ["s.zarr"]


@pytest.mark.parametrize("change", ["identity", "contents", "years"])
def test_a_store_that_appeared_and_differs_is_neither_deleted_nor_taken(tmp_path, change):
    made, path = parts(), tmp_path / "s.zarr"
    write_store(path, **made)
    before = stamps(path)
    other = dict(made)
    if change == "identity":
        other["identity"] = {"grid": "a", "static": "c"}
    elif change == "contents":
        other["layers"] = [made["layers"][1], made["layers"][0]]
    else:
        other["maps"] = {**made["maps"], 2005: made["maps"][2003]}
    expected = {"identity": r"differs in static", "contents": "its static differ", "years": "its land_cover differ"}[change]
    with pytest.raises(MismatchError, match=expected):
        write_store(path, **other)
    assert stamps(path) == before and [p.name for p in tmp_path.iterdir()] == ["s.zarr"]


def test_a_store_of_more_years_serves_a_run_of_fewer(tmp_path):
    made, path = parts(), tmp_path / "s.zarr"
    write_store(path, **made)
    before = stamps(path)
    write_store(path, **{**made, "maps": {2003: made["maps"][2003]}})
    assert stamps(path) == before


def test_a_folder_that_is_no_store_is_not_deleted(tmp_path):
    (tmp_path / "s.zarr").mkdir()
    (tmp_path / "s.zarr" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="expected no folder, or an analysis-ready store; delete what is there"):
        write_store(tmp_path / "s.zarr", **parts())
    assert (tmp_path / "s.zarr" / "thesis.txt").read_text() == "years of work"


def test_identity_tells_what_differs(tmp_path):
    made = parts()
    assert check_identity(tmp_path / "s.zarr", made["identity"]) is False
    write_store(tmp_path / "s.zarr", **made)
    assert check_identity(tmp_path / "s.zarr", {"static": "b", "grid": "a"}) is True
    with pytest.raises(MismatchError, match=r"differs in extra, static\)"):
        check_identity(tmp_path / "s.zarr", {"grid": "a", "static": "x", "extra": 1})


def test_absent_store_is_named(tmp_path):
    with pytest.raises(DataError, match="no analysis-ready store at"):
        open_store(tmp_path / "none.zarr")


def test_what_a_killed_process_left_is_removed(tmp_path):
    dead, alive = subprocess.Popen(["true"]), subprocess.Popen(["sleep", "60"])
    dead.wait()
    try:
        host = socket.gethostname()
        left = {n: tmp_path / f".store.zarr.{n}.part" for n in (f"{host}.{dead.pid}", f"{host}.{alive.pid}", f"else.{dead.pid}")}
        for folder in left.values():
            (folder / "static").mkdir(parents=True)
        write_tiny_store(tmp_path / "store.zarr")
        assert [folder.exists() for folder in left.values()] == [False, True, True]
        assert len(list(tmp_path.glob(".*.part"))) == 2
    finally:
        alive.kill()
        alive.wait()
