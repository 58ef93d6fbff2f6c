"""Refuse harmful files before they are read.

Harmful are rasters that refer to other files or hosts, and files whose blocks or axes would fill the memory. Pickles need no
guard: GDAL, netCDF4 and zarr never unpickle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.errors
from affine import Affine
from odc.geo.crs import CRS
from rasterio.env import ensure_env_with_credentials
from rasterio.io import DatasetReader

from ai4land.errors import DataError

MOST_BYTES = 2**30
"""Most bytes in one stored block (strip, tile or chunk), because a block is always read whole."""
LONGEST_AXIS = 2**26
"""Most cells along a 1-D axis, because opening a file reads its axes whole."""
_OF_STRANGERS = ("GTiff", "netCDF", "HDF5", "HDF5Image", "JP2OpenJPEG", "PNG", "JPEG")
"""GDAL drivers of self-contained binary formats."""
_OF_USERS = (
    *_OF_STRANGERS,
    *("AAIGrid", "BMP", "DTED", "EHdr", "ENVI", "GIF", "GRASSASCIIGrid", "GRIB", "GS7BG", "GSAG", "GSBG", "GTX", "HFA"),
    *("ILWIS", "PCIDSK", "PCRaster", "RRASTER", "RST", "SAGA", "SRTMHGT", "USGSDEM", "XYZ"),
)


@dataclass(frozen=True)
class Header:
    """Rows and columns of a raster, its transform from column and row to coordinates, and its reference system."""

    shape: tuple[int, int]
    transform: Affine
    crs: CRS


_open = ensure_env_with_credentials(lambda name, drivers: DatasetReader(name, driver=drivers))


def open_raster_file(path: str | Path, *, trusted: bool = True) -> Any:
    """Open a raster (path or URL) with rasterio, allowing only formats that refer to no other files or hosts.

    Parameters
    ----------
    trusted
        Whether the user chose the file. If so, allow more formats, and a virtual raster if its name ends in ``.vrt``.

    Raises
    ------
    DataError
        If the file is damaged, in another format, or stored in blocks larger than ``MOST_BYTES``.
    """
    name = str(path)
    drivers = [*_OF_USERS, *(["VRT"] if name.lower().endswith(".vrt") else [])] if trusted else [*_OF_STRANGERS]
    try:
        with rasterio.Env(
            **({} if trusted else {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR"})
        ):  # untrusted: do not look for sidecar files
            file = _open(name, drivers)
    except rasterio.errors.RasterioError as error:
        kinds = (
            "GeoTIFF, NetCDF, HDF5, JPEG 2000, PNG or JPEG" if not trusted else "GeoTIFF, NetCDF or another plain raster format"
        )
        raise DataError(
            f"{name} is truncated or not a raster that holds its own values ({error}), expected {kinds}; write or download it "
            "again, and convert virtual rasters, tile indices and web services (VRT, GTI, STACIT, WMS, WCS): gdal_translate"
        ) from error
    try:
        check_blocks(file, name)
    except DataError:
        file.close()
        raise
    return file


def check_file(place: str | Path) -> Header | None:
    """Check an untrusted raster (path or URL) and read its header; None if it has no reference system.

    Raises
    ------
    DataError
        If the file is missing or not binary, or :func:`open_raster_file` refuses it as untrusted.
    """
    path = None if "://" in str(place) else Path(place)
    if path is not None:
        if not path.is_file():
            raise DataError(f"{path} does not exist, expected a raster file; fetch it again, or correct the catalogue")
        with path.open("rb") as stream:
            start = stream.read(16)
        if b"\0" not in start:  # a text file, which GDAL could open as a virtual raster if no drivers were listed
            raise DataError(
                f"{path} is not a binary raster (it begins with {start!r}), expected GeoTIFF, NetCDF, HDF5, JPEG 2000, PNG or JPEG; "
                "convert it: gdal_translate"
            )
    with open_raster_file(place, trusted=False) as file:
        return None if file.crs is None else Header(file.shape, file.transform, CRS(file.crs.to_wkt()))


def check_blocks(file: Any, name: str) -> None:
    """Raise DataError if an open raster is stored in blocks larger than ``MOST_BYTES``."""
    together = file.count if str(file.profile.get("interleave", "")) == "pixel" else 1
    for block, dtype in zip(file.block_shapes, file.dtypes, strict=True):
        check_block(name, file.shape, block, together * np.dtype(dtype).itemsize)


def check_block(name: str, shape: tuple[int, ...], block: tuple[int, ...], itemsize: int) -> None:
    """Raise DataError if a stored block exceeds ``MOST_BYTES``, or a 1-D array exceeds ``LONGEST_AXIS`` cells.

    ``shape`` and ``block`` are in cells of ``itemsize`` bytes; ``block`` is ``()`` for unchunked arrays.
    """
    size = math.prod(block) * itemsize
    if size > MOST_BYTES:
        raise DataError(
            f"{name} is stored in blocks of {' x '.join(map(str, block))} cells ({size / 2**30:.3g} GiB), expected at most "
            f"{MOST_BYTES // 2**30} GiB; write it in tiles: gdal_translate -co TILED=YES, or nccopy -c"
        )
    if len(shape) == 1 and shape[0] > LONGEST_AXIS:
        raise DataError(f"{name} has an axis of {shape[0]} cells, expected at most {LONGEST_AXIS}; cut it")
