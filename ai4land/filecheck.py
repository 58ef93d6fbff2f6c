"""What a small file can do harm with, refused before it is read: pickles, virtual rasters, blocks and axes that fill the memory."""

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

from ai4land.errors import DataError

MOST_BYTES = 2**30
"""Bytes of one stored block (strip, tile or chunk), which is always read as a whole."""
LONGEST_AXIS = 2**26
"""Cells of an axis, which is read as a whole when a file is opened."""
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True)
class Header:
    """What the header of a GeoTIFF says: rows and columns, from column and row to coordinates, and their reference system."""

    shape: tuple[int, int]
    transform: Affine
    crs: CRS


def check_file(path: Path) -> Header | None:
    """Check a local file that the catalogue of a stranger names, before anything of it is read.

    Returns
    -------
    Header or None
        Of a GeoTIFF with a reference system.

    Raises
    ------
    DataError
        If it is absent, a pickle, a virtual raster (which could name any other file), or a GeoTIFF that is truncated or whose
        blocks fill the memory.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist, expected a raster file; fetch it again, or correct the catalogue")
    refuse_pickle(path)
    with path.open("rb") as stream:
        head = stream.read(2**12)
    if b"<VRTDataset" in head:
        raise DataError(f"{path} is a virtual raster, expected the raster itself; write it: gdal_translate {path} out.tif")
    if head[:4] not in _TIFF:
        return None
    try:
        with rasterio.open(path) as file:
            check_blocks(file, str(path))
            return None if file.crs is None else Header(file.shape, file.transform, CRS(file.crs.to_wkt()))
    except rasterio.errors.RasterioError as error:
        raise DataError(f"{path} is truncated or not a GeoTIFF ({error}), expected a whole file; fetch it again") from error


def check_blocks(file: Any, name: str) -> None:
    """Check that the blocks of an open raster fit into memory.

    Raises
    ------
    DataError
        If they do not.
    """
    together = file.count if str(file.profile.get("interleave", "")) == "pixel" else 1
    for block, dtype in zip(file.block_shapes, file.dtypes, strict=True):
        check_block(name, file.shape, block, together * np.dtype(dtype).itemsize)


def check_block(name: str, shape: tuple[int, ...], block: tuple[int, ...], itemsize: int) -> None:
    """Check the size of the blocks that an array is stored in, and the length of an axis.

    Parameters
    ----------
    name
        The array, for the message.
    shape, block
        Cells of the array, and of a block; a block without dimensions is none.
    itemsize
        Bytes of a cell.

    Raises
    ------
    DataError
        If a block, or an array of one dimension, fills the memory.
    """
    size = math.prod(block) * itemsize
    if size > MOST_BYTES:
        raise DataError(
            f"{name} is stored in blocks of {' x '.join(map(str, block))} cells ({size / 2**30:.3g} GiB), expected at most "
            f"{MOST_BYTES // 2**30} GiB; write it in tiles: gdal_translate -co TILED=YES, or nccopy -c"
        )
    if len(shape) == 1 and shape[0] > LONGEST_AXIS:
        raise DataError(f"{name} has an axis of {shape[0]} cells, expected at most {LONGEST_AXIS}; cut it")


def refuse_pickle(path: str | Path) -> None:
    """Refuse a Python pickle or NumPy file, whatever its name: no library is given the chance to load it.

    Raises
    ------
    DataError
        If it is one.
    """
    if not Path(path).is_file():
        return
    with Path(path).open("rb") as stream:
        head = stream.read(6)
    pickled = head[:1] == b"\x80" and b"\x02" <= head[1:2] <= b"\x05"
    kind = "a NumPy file" if head == b"\x93NUMPY" else "a Python pickle" if pickled else ""
    if kind:
        raise DataError(f"{path} is {kind}, expected a raster file, and is not loaded; write it as GeoTIFF, NetCDF or Zarr")
