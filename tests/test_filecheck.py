from __future__ import annotations

import json
import os
import pickle
from datetime import UTC, datetime

import netCDF4
import numpy as np
import pystac
import pytest
import rasterio
import torch
import zarr
from affine import Affine

from ai4land import lattice
from ai4land.assets import load_asset
from ai4land.checkpoint import load_state
from ai4land.errors import DataError
from ai4land.filecheck import MOST_BYTES, check_file
from ai4land.grid import make_grid
from ai4land.lattice import check_cells
from ai4land.raster import open_raster
from ai4land.rasterfile import open_dataset, open_layer

GRID = make_grid((-180, -90, 180, 90), coarse_cell=10, factor=2, shard=18)


class Evil:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path):
    """Where a pickle that is loaded leaves its mark."""
    place = tmp_path / "loaded"
    yield place
    assert not place.exists()


def test_the_mark_would_be_left(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "loaded")))
    assert (tmp_path / "loaded").is_dir()


@pytest.mark.parametrize("suffix", [".pkl", ".tif", ".nc", ".npy", ".h5"])
@pytest.mark.parametrize("protocol", [2, 5])
def test_pickles_are_refused_under_any_name(tmp_path, mark, suffix, protocol):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(pickle.dumps(Evil(mark), protocol=protocol))
    for read in (lambda: open_layer(path).__enter__(), lambda: open_dataset(path), lambda: check_file(path)):
        with pytest.raises(DataError, match=rf"a\{suffix} is a Python pickle, expected a raster file, and is not loaded"):
            read()


def test_old_pickles_and_numpy_files_are_refused_too(tmp_path, mark):
    (tmp_path / "a.nc").write_bytes(pickle.dumps(Evil(mark), protocol=0))
    with pytest.raises(DataError, match="truncated or not NetCDF"):
        open_dataset(tmp_path / "a.nc")
    np.save(tmp_path / "b.npy", np.array([Evil(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="is a NumPy file"):
        open_layer(tmp_path / "b.npy")


@pytest.mark.parametrize("place", ["filters", "compressor"])
def test_a_zarr_array_of_pickles_is_refused(tmp_path, mark, place):
    group = tmp_path / "a.zarr"
    (group / "latitude").mkdir(parents=True)
    codec = {"id": "pickle", "protocol": 5}
    array = {
        "zarr_format": 2,
        "shape": [2],
        "chunks": [2],
        "dtype": "<f8",
        "fill_value": 0.0,
        "order": "C",
        "compressor": None,
        "filters": None,
    }
    array |= {"filters": [codec]} if place == "filters" else {"compressor": codec}
    (group / ".zgroup").write_text('{"zarr_format": 2}')
    (group / "latitude" / ".zarray").write_text(json.dumps(array))
    (group / "latitude" / ".zattrs").write_text('{"_ARRAY_DIMENSIONS": ["latitude"]}')
    (group / "latitude" / "0").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(DataError, match="not NetCDF or Zarr"):
        open_dataset(group)


def test_a_training_state_that_is_a_pickle_is_refused(tmp_path, mark):
    path = tmp_path / "state.pt"
    torch.save({"step": Evil(mark)}, path)
    with pytest.raises(DataError, match="expected tensors and plain values"):
        load_state(path)


def write_empty(path, side, **options):
    """Write a GeoTIFF of the globe that declares its cells and holds none."""
    transform = Affine(360 / side, 0, -180, 0, -180 / side, 90)
    profile = {
        "driver": "GTiff",
        "height": side,
        "width": side,
        "count": 1,
        "dtype": "uint8",
        "crs": "EPSG:4326",
        "transform": transform,
    }
    with rasterio.open(path, "w", **profile, SPARSE_OK=True, BIGTIFF="YES", compress="deflate", **options):
        pass
    return path


def test_a_tiff_with_giant_blocks_is_refused_unread(tmp_path):
    path = write_empty(tmp_path / "bomb.tif", 2**16, tiled=True, blockxsize=2**15, blockysize=2**16)
    assert path.stat().st_size < 2000
    for read in (lambda: open_raster(path, grid=GRID, resampling="average"), lambda: check_file(path)):
        with pytest.raises(
            DataError, match=r"bomb\.tif is stored in blocks of 65536 x 32768 cells \(2 GiB\), expected at most 1 GiB"
        ):
            read()


def test_a_tiff_that_declares_a_million_by_a_million_cells_is_refused_unread(tmp_path):
    path = write_empty(tmp_path / "bomb.tif", 10**6, blockysize=10**6)
    assert path.stat().st_size < 2000
    with pytest.raises(DataError, match=r"bomb\.tif has 3.*e\+10 cells under a row of the grid"):
        open_raster(path, grid=GRID, resampling="average")
    asset = pystac.Asset(
        path.as_uri(), extra_fields={"proj:code": "EPSG:4326", "proj:shape": [36, 72], "proj:transform": [5, 0, -180, 0, -5, 90]}
    )
    item = pystac.Item("liar", None, None, datetime.now(tz=UTC), {}, assets={"a": asset})
    with pytest.raises(DataError, match=r"a of item liar has 1\.25e\+11 cells under a shard"):
        load_asset([item], asset="a", grid=GRID, resampling="nearest")


def test_a_file_with_too_many_cells_under_a_row_is_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "wide.tif"
    profile = {"driver": "GTiff", "height": 9000, "width": 18000, "count": 1, "dtype": "uint8", "crs": "EPSG:4326", "tiled": True}
    with rasterio.open(
        path, "w", **profile, transform=Affine(0.02, 0, -180, 0, -0.02, 90), SPARSE_OK=True, blockxsize=2048, blockysize=2048
    ):
        pass
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(lattice, "MOST_CELLS", 10**6)
    with pytest.raises(DataError, match=r"wide.tif has 4.* cells under a row of the grid, expected at most 1e\+06"):
        open_raster(path, grid=GRID, resampling="average")


def test_a_catalogue_that_declares_too_many_cells_is_refused():
    side = 10**6
    fine = Affine(360 / side, 0, -180, 0, -180 / side, 90)
    with pytest.raises(DataError, match=r"x has 1.25e\+11 cells under a shard of 18 x 18 cells of the grid"):
        check_cells(fine, (side, side), GRID.fine.crs, GRID, source="x")
    check_cells(GRID.fine.affine, (36, 72), GRID.fine.crs, GRID, source="x")


def test_giant_chunks_and_axes_of_netcdf_are_refused_unread(tmp_path):
    path = tmp_path / "a.nc"
    with netCDF4.Dataset(path, "w") as file:
        file.createDimension("y", 2**15)
        file.createDimension("x", 2**16)
        file.createVariable("v", "u1", ("y", "x"), zlib=True, chunksizes=(2**15, 2**16))
    assert path.stat().st_size < 10_000 and MOST_BYTES < 2**31
    with pytest.raises(DataError, match=r"v of .*a.nc is stored in blocks of 32768 x 65536 cells \(2 GiB\)"):
        open_dataset(path)
    with netCDF4.Dataset(tmp_path / "b.nc", "w") as file:
        file.createDimension("lat", 2**27)
        file.createVariable("lat", "f8", ("lat",), zlib=True, chunksizes=(2**20,))
    with pytest.raises(DataError, match=r"lat of .*b.nc has an axis of 134217728 cells"):
        open_dataset(tmp_path / "b.nc")


def test_giant_chunks_of_zarr_are_refused_unread(tmp_path):
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    group.create_array("v", shape=(2**16, 2**16), chunks=(2**16, 2**16), dtype="u1")
    with pytest.raises(DataError, match=r"v of .*a.zarr is stored in blocks of 65536 x 65536 cells \(4 GiB\)"):
        open_dataset(tmp_path / "a.zarr")


def test_virtual_rasters_and_broken_files_of_a_catalogue_are_refused(tmp_path):
    (tmp_path / "a.tif").write_text('<?xml version="1.0"?>\n<VRTDataset rasterXSize="1" rasterYSize="1"></VRTDataset>')
    with pytest.raises(DataError, match=r"a\.tif is a virtual raster"):
        check_file(tmp_path / "a.tif")
    (tmp_path / "b.tif").write_bytes(b"II*\0" + b"\xff" * 20)
    with pytest.raises(DataError, match=r"b\.tif is truncated or not a GeoTIFF"):
        check_file(tmp_path / "b.tif")
    with pytest.raises(DataError, match=r"none\.tif does not exist"):
        check_file(tmp_path / "none.tif")
