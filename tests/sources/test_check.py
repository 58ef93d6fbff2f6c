from __future__ import annotations

import json
import os
import pickle
import socket
from datetime import UTC, datetime

import netCDF4
import numpy as np
import pystac
import pytest
import rasterio
import torch
import xarray as xr
import zarr
from affine import Affine

from ai4land.errors import DataError
from ai4land.grid import make_grid
from ai4land.model.checkpoint import load_state
from ai4land.rasters import lattice
from ai4land.rasters.file import open_dataset, open_layer
from ai4land.rasters.items import load_asset
from ai4land.rasters.lattice import check_cells
from ai4land.rasters.read import open_raster
from ai4land.sources.check import MOST_BYTES, check_file, open_raster_file

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
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickles_are_refused_under_any_name_and_never_loaded(tmp_path, mark, suffix, protocol):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(pickle.dumps(Evil(mark), protocol=protocol) + bytes(100))
    for read in (lambda: open_layer(path).__enter__(), lambda: open_dataset(path), lambda: check_file(path)):
        with pytest.raises(DataError, match=rf"a\{suffix} is (truncated or )?not a|a\{suffix} is truncated or not NetCDF"):
            read()


@pytest.mark.parametrize("dtype", ["<f8", "|O"])
@pytest.mark.parametrize("place", ["filters", "compressor"])
def test_a_zarr_array_of_pickles_is_refused(tmp_path, mark, place, dtype):
    group = tmp_path / "a.zarr"
    (group / "latitude").mkdir(parents=True)
    codec = {"id": "pickle", "protocol": 5}
    array = {
        "zarr_format": 2,
        "shape": [2],
        "chunks": [2],
        "dtype": dtype,
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


# -- formats ------------------------------------------------------------------------------------------------------------

VRT = """<VRTDataset rasterXSize="72" rasterYSize="36"><SRS>EPSG:4326</SRS><GeoTransform>-180,5,0,90,0,-5</GeoTransform>
<VRTRasterBand dataType="Byte" band="1"><SimpleSource><SourceFilename>{secret}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>
</VRTRasterBand></VRTDataset>"""
GTI = "<GDALTileIndexDataset><IndexDataset>{secret}</IndexDataset><LocationField>location</LocationField></GDALTileIndexDataset>"
WMS = """<GDAL_WMS><Service name="TMS"><ServerUrl>{host}/${{z}}/${{x}}/${{y}}.png</ServerUrl></Service><DataWindow><UpperLeftX>-180</UpperLeftX>
<UpperLeftY>90</UpperLeftY><LowerRightX>180</LowerRightX><LowerRightY>-90</LowerRightY><TileLevel>1</TileLevel></DataWindow></GDAL_WMS>"""
WCS = "<WCS_GDAL><ServiceURL>{host}/wcs?</ServiceURL><Version>1.0.0</Version><CoverageName>a</CoverageName></WCS_GDAL>"
WMTS = "<GDAL_WMTS><GetCapabilitiesUrl>{host}/wmts</GetCapabilitiesUrl><Layer>a</Layer></GDAL_WMTS>"
STACIT = """{{"type": "FeatureCollection", "stac_version": "1.0.0", "features": [{{"type": "Feature", "stac_version": "1.0.0", "id": "a",
"stac_extensions": ["https://stac-extensions.github.io/projection/v1.1.0/schema.json"], "collection": "c", "links": [],
"properties": {{"datetime": "2020-01-01T00:00:00Z", "proj:epsg": 4326}}, "assets": {{"a": {{"href": "{secret}", "roles": ["data"],
"proj:shape": [36, 72], "proj:transform": [5, 0, -180, 0, -5, 90]}}}}}}]}}"""
POINTING = {"VRT": VRT, "GTI": GTI, "WMS": WMS, "WCS": WCS, "WMTS": WMTS, "STACIT": STACIT}


@pytest.fixture
def host():
    """A server on this machine; fails the test if anybody connects to it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("kind", sorted(POINTING))
@pytest.mark.parametrize("suffix", [".tif", ".xml", ".nc", ".json", ""])
def test_formats_that_name_other_files_or_hosts_are_refused_and_reach_neither(tmp_path, host, kind, suffix):
    secret = write_empty(tmp_path / "secret.tif", 72)
    path = tmp_path / f"a{suffix}"
    path.write_text(POINTING[kind].format(secret=secret, host=host))
    with pytest.raises(DataError, match=rf"a{suffix} is not a binary raster"):
        check_file(path)
    expected = "NetCDF" if suffix == ".nc" else "is truncated or not a raster that holds its own values"
    with pytest.raises(DataError, match=expected), open_layer(path):
        pass
    with (
        pytest.raises(DataError, match="convert virtual rasters, tile indices and web services"),
        open_raster_file(path, trusted=False),
    ):
        pass


def test_the_formats_would_reach_the_file_they_name(tmp_path):
    secret = write_empty(tmp_path / "secret.tif", 72)
    for kind in ("VRT", "STACIT"):
        (tmp_path / kind).write_text(POINTING[kind].format(secret=secret, host=""))
        with rasterio.open(tmp_path / kind) as file:
            assert file.driver == kind and file.shape == (36, 72)


def test_a_tile_index_is_refused_whatever_it_is_stored_in(tmp_path):
    secret = write_empty(tmp_path / "secret.tif", 72)
    feature = {
        "type": "Feature",
        "properties": {"location": str(secret)},
        "geometry": {"type": "Polygon", "coordinates": [[[-180, -90], [180, -90], [180, 90], [-180, 90], [-180, -90]]]},
    }
    (tmp_path / "i.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    index = GTI.format(secret=tmp_path / "i.geojson")
    (tmp_path / "a.tif").write_text(index)
    for name in (tmp_path / "a.tif", f"GTI:{tmp_path / 'i.geojson'}"):
        with pytest.raises(DataError, match="holds its own values"):
            open_raster_file(name, trusted=False)


def test_the_user_may_name_a_virtual_raster_by_its_suffix_and_a_stranger_may_not(tmp_path):
    (tmp_path / "a.vrt").write_text(VRT.format(secret=write_empty(tmp_path / "own.tif", 72)))
    with open_layer(tmp_path / "a.vrt") as layer:
        assert layer.shape == (36, 72)
    with pytest.raises(DataError, match=r"a\.vrt is not a binary raster"):
        check_file(tmp_path / "a.vrt")


def test_a_text_in_front_of_a_binary_file_does_not_hide_a_virtual_raster(tmp_path):
    text = VRT.format(secret=write_empty(tmp_path / "secret.tif", 72)).encode()
    with netCDF4.Dataset(tmp_path / "b.nc", "w") as file:
        file.createDimension("x", 2)
    size = 1 << (len(text) - 1).bit_length()
    (tmp_path / "a.nc").write_bytes(text.ljust(size, b"\0") + (tmp_path / "b.nc").read_bytes())
    with rasterio.open(tmp_path / "a.nc") as file:
        assert file.driver == "VRT"
    with pytest.raises(DataError, match=r"a\.nc is not a binary raster"):
        check_file(tmp_path / "a.nc")


@pytest.mark.parametrize(
    ("driver", "suffix"), [("GTiff", "tif"), ("netCDF", "nc"), ("PNG", "png"), ("JP2OpenJPEG", "jp2"), ("HFA", "img")]
)
def test_ordinary_formats_are_read(tmp_path, driver, suffix):
    path = tmp_path / f"a.{suffix}"
    profile = {"driver": driver, "height": 36, "width": 72, "count": 1, "dtype": "uint8", "crs": "EPSG:4326"}
    values = np.full((36, 72), 7, "uint8")
    if driver == "netCDF":
        coords = {"lat": 87.5 - 5 * np.arange(36), "lon": -177.5 + 5 * np.arange(72)}
        xr.DataArray(values, dims=("lat", "lon"), coords=coords, name="v").to_netcdf(path)
    else:
        with rasterio.open(path, "w", **profile, transform=Affine(5, 0, -180, 0, -5, 90)) as file:
            file.write(values, 1)
    with open_raster_file(path) as file:
        assert file.driver == driver and np.abs(file.read(1) - 7.0).max() <= (driver == "JP2OpenJPEG")
    if driver != "HFA":
        header = check_file(path)
        assert driver in ("netCDF", "PNG") or (header is not None and header.shape == (36, 72))


def test_broken_and_absent_files_of_a_catalogue_are_refused(tmp_path):
    (tmp_path / "b.tif").write_bytes(b"II*\0" + b"\xff" * 20)
    with pytest.raises(DataError, match=r"b\.tif is truncated or not a raster"):
        check_file(tmp_path / "b.tif")
    with pytest.raises(DataError, match=r"none\.tif does not exist"):
        check_file(tmp_path / "none.tif")
