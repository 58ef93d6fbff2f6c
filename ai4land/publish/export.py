"""Export maps of a cube as thumbnails and cloud-optimised GeoTIFFs.

Both read a Zarr array ``(time, rows, columns)`` of class codes piece by piece; a global map is never in memory as a whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
import zarr
from affine import Affine
from matplotlib.image import imsave
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from rasterio.enums import Resampling
from rasterio.windows import Window

from ai4land.cube.describe import Flag

SIDE = 1024  # longest side of a thumbnail in pixels
_CACHE = 128  # MB of GDAL's block cache


def thumbnail(group: zarr.Group, *, year: int, box: GeoBox, flags: Sequence[Flag], path: Path) -> Path:
    """Draw the land cover of a year as a PNG with true relative areas.

    The codes come from the coarsest overview that fills the picture, or are every n-th of the map; they are never averaged.
    A map in degrees is drawn in a cylindrical equal-area projection, true to scale at the area-weighted mean of the absolute
    latitude of the map (33° for the globe; Snyder 1987, USGS Professional Paper 1395, p. 76).
    """
    codes = _small(group, year)
    rows, cols = equal_area(box, codes.shape, side=min(SIDE, max(SIDE // 2, *codes.shape)))
    table = np.full((256, 3), 255, dtype=np.uint8)
    for flag in flags:
        table[flag.code] = [int(flag.colour[i : i + 2], 16) for i in (1, 3, 5)]
    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(path, table[codes[np.ix_(rows, cols)]], metadata={"Software": "ai4land"})
    return path


def _small(group: zarr.Group, year: int) -> NDArray[np.uint8]:
    """Read the class codes of a year, thinned to about the size of a thumbnail."""
    found: list[tuple[int, str]] = []
    layout = dict(group.attrs).get("multiscales", {})
    for entry in layout.get("layout", []) if isinstance(layout, dict) else []:
        name = str(entry.get("asset", "")) if isinstance(entry, dict) else ""
        if re.fullmatch(r"overviews/\w+/land_cover", name) and name in group:
            found.append((max(_array(group, name).shape[-2:]), name))
    fitting = [pair for pair in found if pair[0] >= SIDE // 2]
    name = min(fitting)[1] if fitting else "land_cover"
    array = _array(group, name)
    above, _, _ = name.rpartition("/")
    years = np.asarray(_array(group, f"{above}/year" if above else "year")[...]).tolist()
    step = max(1, max(array.shape[-2:]) // SIDE)
    cut = tuple(slice(min(step - 1, n - 1) // 2, None, step) for n in array.shape[-2:])
    return np.asarray(array[(years.index(year), *cut)], dtype=np.uint8)


def _array(group: zarr.Group, name: str) -> Any:
    return group[name]


def equal_area(box: GeoBox, shape: tuple[int, ...], *, side: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Choose the rows and columns of a map thinned to ``shape`` that make an equal-area picture.

    ``side`` is the longest side of the picture in pixels. Cells of a grid that is not in degrees count as equal.

    >>> globe = GeoBox((180, 360), Affine(1, 0, -180, 0, -1, 90), "EPSG:4326")
    >>> rows, cols = equal_area(globe, (180, 360), side=360)
    >>> len(rows), len(cols), f"{(rows < 60).mean():.0%}"  # a quarter of the sphere lies north of 30° N
    (162, 360, '25%')
    """
    left, bottom, right, top = box.boundingbox
    if box.crs is not None and box.crs.geographic:
        south, north = math.radians(max(bottom, -90)), math.radians(min(top, 90))
        low, high = math.sin(south), math.sin(north)
        mean = _moment(south, north) / (high - low)
        ratio = (high - low) / (math.radians(right - left) * math.cos(mean) ** 2)
    else:
        low, high, ratio = bottom, top, (top - bottom) / (right - left)
    height, width = (max(1, round(side * ratio)), side) if ratio < 1 else (side, max(1, round(side / ratio)))
    across = high - (np.arange(height) + 0.5) / height * (high - low)
    if box.crs is not None and box.crs.geographic:
        across = np.degrees(np.arcsin(across.clip(-1, 1)))
    rows = ((top - across) / (top - bottom) * shape[0]).astype(np.intp).clip(0, shape[0] - 1)
    cols = ((np.arange(width) + 0.5) / width * shape[1]).astype(np.intp).clip(0, shape[1] - 1)
    return rows, cols


def _moment(south: float, north: float) -> float:
    """Integral of ``|latitude| cos(latitude)`` between two latitudes in radians."""

    def upto(angle: float) -> float:
        return math.copysign(abs(angle) * math.sin(abs(angle)) + math.cos(angle) - 1, angle)

    return upto(north) - upto(south)


def write_cog(
    array: Any, *, time: int, box: GeoBox, flags: Sequence[Flag], fill: int, path: Path, name: str = "land_cover"
) -> Path:
    """Write one year of class codes as a cloud-optimised GeoTIFF with a colour table and overviews by majority.

    ``array`` is a Zarr array of codes, uint8 ``(time, rows, columns)``; ``time`` a position in it; ``fill`` the code of
    cells that are not mapped. The map is copied block by block into a temporary tiled file, from which GDAL makes the COG.
    """
    rows, cols = array.shape[1:]
    side = array.shards[-1] if array.shards else array.chunks[-1]
    side = max(512, side // 16 * 16)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tiles.tif")
    profile = {"driver": "GTiff", "dtype": "uint8", "count": 1, "height": rows, "width": cols, "nodata": fill}
    place = {"crs": str(box.crs), "transform": Affine(*box.affine[:6])}
    layout = {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "zstd", "bigtiff": "if_safer", "sparse_ok": True}
    # GDAL's default cache is a twentieth of the machine's memory.
    with rasterio.Env(GDAL_CACHEMAX=_CACHE):
        try:
            with rasterio.open(scratch, "w", **profile, **place, **layout) as file:
                file.write_colormap(1, {f.code: (*(int(f.colour[i : i + 2], 16) for i in (1, 3, 5)), 255) for f in flags})
                file.set_band_description(1, name)
                for row in range(0, rows, side):
                    for col in range(0, cols, side):
                        block = np.asarray(array[time, row : row + side, col : col + side])
                        if (block != fill).any():
                            file.write(block, 1, window=Window(col, row, block.shape[1], block.shape[0]))
            rasterio.shutil.copy(
                scratch,
                path,
                driver="COG",
                compress="deflate",
                blocksize=512,
                overview_resampling=Resampling.mode.name,
                bigtiff="if_safer",
                num_threads=1,
            )
        finally:
            scratch.unlink(missing_ok=True)
    return path
