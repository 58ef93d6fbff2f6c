"""Measure how an analysis-ready store is made from files: for ``benchmarks/run.py``, and for a globe of 30 arc seconds.

    .venv/bin/python benchmarks/aligning.py FOLDER      # 933 million cells per layer; takes minutes and gigabytes

writes GeoTIFFs of the whole globe into FOLDER, aligns them with ``ai4land.run.align.align`` on the workers of this machine,
and prints the time, the size of one layer and the peak memory of each process.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import rasterio
import xarray as xr
import zarr
from affine import Affine
from distributed import Client
from numpy.typing import NDArray
from rasterio.windows import Window as Box

from ai4land.grid import COARSE_DIMS, FINE_DIMS, Grid, Window, tiles
from ai4land.legend import load_legend
from ai4land.rasters.gaps import fill_near
from ai4land.rasters.landcover import find_maps
from ai4land.rasters.read import open_raster
from ai4land.run.align import align
from ai4land.run.config import RunConfig
from ai4land.run.practice import practice_grid
from ai4land.store.shard import Layer
from ai4land.store.write import write_store

LEGEND = load_legend("hildaplus")
YEARS = (2000, 2001)
LAYERS: dict[str, tuple[str, float, str]] = {
    "elevation": ("int16", 1, "exact"),
    "temperature": ("float32", 10, "bilinear"),
    "zone": ("uint8", 0.5, "mode"),
}
"""Static maps: dtype, side of a cell in cells of the grid, resampling."""


def make_files(folder: Path, grid: Grid) -> None:
    """Write maps and static layers of a grid, tile by tile: smooth values with some noise, no value at sea."""
    for year in YEARS:
        _write(folder / f"map_{year}.tif", grid, "uint8", 1, partial(_classes, year=year))
    for name, (dtype, side, _) in LAYERS.items():
        _write(folder / f"{name}.tif", grid, dtype, side, partial(_values, dtype=dtype))
    coords = grid.coords()
    shares = np.full((len(YEARS), LEGEND.n, *grid.coarse.shape), 1 / LEGEND.n, dtype=np.float32)
    axes = {"year": list(YEARS), "class_code": LEGEND.codes, "lat": coords[COARSE_DIMS[0]], "lon": coords[COARSE_DIMS[1]]}
    field = xr.DataArray(shares, dims=tuple(axes), coords=axes, attrs={"units": "1"})
    field.to_dataset(name="share").to_netcdf(folder / "shares.nc")


def _write(path: Path, grid: Grid, dtype: str, side: float, values: Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]) -> None:
    rows, cols = (int(n / side) for n in grid.shape)
    t = grid.fine.affine * Affine.scale(side)
    profile = {"driver": "GTiff", "tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate", "zlevel": 1}
    profile |= {"height": rows, "width": cols, "count": 1, "dtype": dtype, "crs": "EPSG:4326", "transform": t, "nodata": 0}
    with rasterio.open(path, "w", **profile, num_threads=os.cpu_count(), bigtiff="if_safer") as file:
        for w in tiles((rows, cols), 2048):
            lat = t.f + t.e * (np.arange(w.row, w.row + w.height) + 0.5)
            lon = t.c + t.a * (np.arange(w.col, w.col + w.width) + 0.5)
            made = values(np.deg2rad(lat)[:, None], np.deg2rad(lon)[None]).astype(dtype)
            file.write(made, 1, window=Box(w.col, w.row, w.width, w.height))


def _land(lat: NDArray[Any], lon: NDArray[Any]) -> NDArray[np.bool_]:
    return np.asarray(np.sin(2 * lon) * np.cos(3 * lat) + 0.3 * np.sin(40 * lon) * np.sin(31 * lat) > 0.1)


def _values(lat: NDArray[Any], lon: NDArray[Any], *, dtype: str) -> NDArray[Any]:
    top = 20 if dtype == "uint8" else 1000
    field = 1 + top * (1.1 + np.sin(13 * lon) * np.cos(11 * lat) + 0.1 * np.sin(997 * lon + 499 * lat)) / 3
    return np.where(_land(lat * 1.01, lon * 1.01), field, 0)  # a coastline that differs slightly from that of the maps


def _classes(lat: NDArray[Any], lon: NDArray[Any], *, year: int) -> NDArray[Any]:
    index = (LEGEND.n * (1 + np.sin((year - 1990) * 0.01 + 29 * lon) * np.cos(23 * lat)) / 2.001).astype(int)
    return np.where(_land(lat, lon), LEGEND.codes[index], LEGEND.fill.code)


# -- rows of the benchmarks ---------------------------------------------------------------------------------------------


def _read(w: Window, *, path: Path, grid: Grid, resampling: Any) -> NDArray[np.float32]:
    return np.asarray(open_raster(path, grid=grid, resampling=resampling, window=w).values)


def _mapped(w: Window, *, folder: Path, grid: Grid) -> NDArray[np.bool_]:
    return find_maps(str(folder / "map_{year}.tif"), grid=grid, legend=LEGEND)[YEARS[0]].read(w) != LEGEND.fill.code


def shard_by_shard(folder: Path, grid: Grid, client: Client | None = None) -> None:
    """Align the files as the package does."""
    coords = grid.coords()
    coarse = xr.open_dataset(folder / "shares.nc")["share"].values
    maps = find_maps(str(folder / "map_{year}.tif"), grid=grid, legend=LEGEND)
    write_store(
        folder / "store.zarr",
        grid=grid,
        legend=LEGEND,
        mask=partial(_mapped, folder=folder, grid=grid),
        maps={year: m.read for year, m in maps.items()},
        coarse=xr.DataArray(
            coarse,
            dims=("year", "state", *COARSE_DIMS),
            coords={"year": list(YEARS), "state": [str(c) for c in LEGEND.codes], **{d: coords[d] for d in COARSE_DIMS}},
        ),
        layers=[
            Layer(name, name == "zone", partial(_read, path=folder / f"{name}.tif", grid=grid, resampling=how))
            for name, (_, _, how) in LAYERS.items()
        ],
        identity={},
        client=client,
        progress=lambda _: None,
    )


def layer_by_layer(folder: Path, grid: Grid) -> None:
    """Align the files in the plain way: read every layer and map whole, hold all layers in one array."""
    group = zarr.open_group(folder / "plain.zarr", mode="w")
    store: Any = zarr.open_group(folder / "store.zarr", mode="r")
    for name in ("static", "land_cover"):
        like = store[name]
        options = {"chunks": like.chunks, "shards": like.shards, "fill_value": like.fill_value, "compressors": like.compressors}
        group.create_array(name, shape=like.shape, dtype=like.dtype, **options)
    maps = [m.read() for m in find_maps(str(folder / "map_{year}.tif"), grid=grid, legend=LEGEND).values()]
    mask = maps[0] != LEGEND.fill.code
    for index, codes in enumerate(maps):
        group["land_cover"][index] = codes  # type: ignore[index]
    fields = np.empty((len(LAYERS), *grid.shape), dtype=np.float32)
    for field, (name, (_, _, how)) in zip(fields, LAYERS.items(), strict=True):
        how_: Any = how
        field[:] = fill_near(np.asarray(open_raster(folder / f"{name}.tif", grid=grid, resampling=how_).values), mask=mask)
    group["static"][...] = fields  # type: ignore[index]


def measure(
    folder: Path,
    *,
    shard: int,
    rounds: int,
    workers: Callable[[int], Any],
    peak: Callable[[], float],
    alternate: Callable[..., dict[str, list[float]]],
) -> tuple[Grid, dict[str, list[float]], dict[str, list[float]]]:
    """Time both ways, and one and two workers; measure the peak memory of a worker on 2 and on 8 shards."""
    grids = {
        name: practice_grid(factor=30 if shard > 300 else 8, shard=shard, shards=s)
        for name, s in (("small", (1, 2)), ("large", (2, 4)))
    }
    for name, grid in grids.items():
        (folder / name).mkdir(parents=True)
        make_files(folder / name, grid)
    peaks: dict[str, list[float]] = {name: [] for name in grids}
    for _ in range(rounds):
        for name, grid in grids.items():
            with workers(1) as client:
                shard_by_shard(folder / name, grid, client)
                peaks[name] += client.run(peak).values()
    place, grid = folder / "large", grids["large"]
    with workers(1) as one, workers(2) as two:
        arms = {
            "shards": partial(shard_by_shard, place, grid),
            "layers": partial(layer_by_layer, place, grid),
            "one": partial(shard_by_shard, place, grid, one),
            "two": partial(shard_by_shard, place, grid, two),
        }
        for arm in arms.values():
            arm()
        seconds = alternate({name: partial(lambda arm: arm, arm) for name, arm in arms.items()}, rounds=rounds)
    stored: Any = [zarr.open_group(place / f"{name}.zarr", mode="r") for name in ("store", "plain")]
    if not np.array_equal(stored[0]["land_cover"][...], stored[1]["land_cover"][...]):
        raise AssertionError("the maps of the two ways differ, expected equal ones")
    return grid, seconds, peaks


# -- a globe ------------------------------------------------------------------------------------------------------------


@contextmanager
def watched() -> Iterator[dict[int, float]]:
    """Record the peak memory of this process and its children, in bytes by process id."""
    peaks: dict[int, float] = {}
    over = threading.Event()

    def look() -> None:
        me = psutil.Process()
        while not over.wait(0.1):
            for process in (me, *me.children(recursive=True)):
                try:
                    peaks[process.pid] = max(peaks.get(process.pid, 0), process.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        over.set()
        thread.join()


def globe_run(folder: Path) -> RunConfig:
    """Configure the run that aligns the globe."""
    ways: dict[str, dict[str, Any]] = {
        "exact": {"resampling": "exact"},
        "bilinear": {"resampling": "bilinear"},
        "mode": {"categorical": True},
    }
    return RunConfig.model_validate(
        {
            "name": "globe",
            "runs": str(folder / "runs"),
            "data": str(folder),
            "grid": {"bbox": [-180, -90, 180, 90], "coarse_cell": 0.25, "factor": 30, "shard": 1440},
            "landcover": {"source": "map_{year}.tif", "legend": "hildaplus"},
            "scenario": {"kind": "shares", "path": "shares.nc", "variable": "share"},
            "static": [{"name": n, "path": f"{n}.tif", **ways[how]} for n, (_, _, how) in LAYERS.items()],
            "split": {"train": list(YEARS), "space": {"block": 8, "validation": 0.1, "test": 0.1}},
            "train": {"patch": 96},
            "reconstruct": {"reference": YEARS[0], "years": list(YEARS)},
        }
    )


def main() -> None:
    """Align the globe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    from ai4land.run.inputs import Inputs

    run = globe_run(folder)
    grid = Inputs.of(run).grid
    if not (folder / "shares.nc").exists():
        make_files(folder, grid)
    with watched() as peaks:
        began = time.perf_counter()
        align(run, tell=print)
        seconds = time.perf_counter() - began
    cells = grid.shape[0] * grid.shape[1]
    print(
        f"{len(LAYERS)} layers and {len(YEARS)} maps of {cells / 1e6:.0f} million cells ({FINE_DIMS}: {grid.shape}) in {seconds:.0f} s"
    )
    print(
        f"a layer: {4 * cells / 1e9:.2f} GB; peak memory of each process: {', '.join(f'{p / 1e9:.2f}' for p in peaks.values())} GB"
    )


if __name__ == "__main__":
    main()
