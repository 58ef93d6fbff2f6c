"""Pictures and values of a cube by place and zoom: map tiles, the value under a point, the years of a point.

Tiles are those of the web (``WebMercatorQuad``: 256 x 256 pixels, zoom *z*, column *x* from 180°W, row *y* from the north). They
are warped by rio-tiler's ``XarrayReader``, which titiler-xarray is built on, from the coarsest overview whose cells are no larger
than a pixel, so that the world of a cube of any size reads little. Codes are never mixed: the nearest cell gives the colour.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import Any

import numpy as np
import rasterio.warp
from rasterio.errors import RasterioError
from rio_tiler.errors import RioTilerError
from rio_tiler.io.xarray import XarrayReader
from rio_tiler.models import ImageData
from rioxarray.exceptions import RioXarrayError

from ai4land.atlas import EQUATOR, MAX_ZOOM, METRES, WORLD, Level, Part

warnings.filterwarnings("ignore", message="Adjusting dataset latitudes")  # rio-tiler cuts at 85.06°, where the tiles end


def tile(part: Part, *, year: int, z: int, x: int, y: int) -> bytes:
    """Draw a tile in the colours of the legend; transparent where nothing is mapped.

    Parameters
    ----------
    part
        Of the cube.
    year, z, x, y
        Which map, and which tile.

    Returns
    -------
    bytes
        A PNG image of 256 x 256 pixels, red, green, blue, alpha.

    Raises
    ------
    KeyError
        If there is no such year or tile.
    """
    if year not in part.years or not part.zooms[0] <= z <= MAX_ZOOM or not (0 <= x < 2**z and 0 <= y < 2**z):
        raise KeyError((year, z, x, y))
    level = choose(part, year=year, z=z, y=y)
    table = {entry.code: (*bytes.fromhex(entry.colour[1:]), 255) for entry in part.legend}
    with XarrayReader(level.codes[level.index[year]]) as reader, contextlib.suppress(RioTilerError, RioXarrayError):
        image = reader.tile(x, y, z, nodata=part.fill.code)
        return bytes(image.render(img_format="PNG", colormap=table))
    return blank()


def choose(part: Part, *, year: int, z: int, y: int) -> Level:
    """Choose the coarsest level that has the year and whose cells are no larger than a pixel of a tile of this row."""
    side = EQUATOR / 2**z
    north, south = (math.atan(math.sinh(math.pi * (1 - 2 * row / 2**z))) for row in (y, y + 1))
    least = min(side, math.degrees(north - south) / 256)
    if not part.crs.is_geographic:
        least *= METRES
    fitting = [level for level in part.levels if year in level.index and level.cell <= least * 1.001]
    return fitting[-1] if fitting else part.levels[0]


def blank() -> bytes:
    """Give a transparent tile."""
    return bytes(ImageData(np.zeros((4, 256, 256), np.uint8)).render(img_format="PNG", add_mask=False))


def point(part: Part, *, lon: float, lat: float, year: int) -> dict[str, Any]:
    """Read the class and the shares of the cell at a place.

    Returns
    -------
    dict
        ``code`` (None outside the map and where nothing is mapped), the shares (0..1 or None), and ``cell``: longitude and
        latitude of the cell's centre.

    Raises
    ------
    KeyError
        If there is no such year.
    """
    if year not in part.years:
        raise KeyError(year)
    found = _cell(part, lon, lat)
    if found is None:
        return {"code": None, "cell": None, **dict.fromkeys(part.shares)}
    row, col = found
    time = part.levels[0].index[year]
    code = int(part.levels[0].codes[time, row, col].values)
    shares = {name: float(data[time, row, col].values) for name, data in part.shares.items()}
    return {
        "code": None if code == part.fill.code else code,
        "cell": _centre(part, row, col),
        **{name: round(value, 4) if math.isfinite(value) else None for name, value in shares.items()},
    }


def series(part: Part, *, lon: float, lat: float) -> dict[str, Any]:
    """Read the class of the cell at a place in every year: ``years`` and ``codes`` (None where nothing is mapped)."""
    found = _cell(part, lon, lat)
    if found is None:
        return {"years": list(part.years), "codes": [None] * len(part.years)}
    level = part.levels[0]
    values = level.codes[:, found[0], found[1]].values
    codes = [int(values[level.index[year]]) for year in part.years]
    return {"years": list(part.years), "codes": [None if c == part.fill.code else c for c in codes]}


def _cell(part: Part, lon: float, lat: float) -> tuple[int, int] | None:
    """Row and column of the cell at a place, None outside; longitudes are taken round the globe."""
    if not (math.isfinite(lon) and math.isfinite(lat) and abs(lat) <= 90):
        return None
    level = part.levels[0]
    x, y = (lon + 180) % 360 - 180, lat
    if not part.crs.is_geographic:
        try:
            (x,), (y,), *_ = rasterio.warp.transform(WORLD, part.crs, [x], [y])
        except RasterioError:
            return None
        if not (math.isfinite(x) and math.isfinite(y)):
            return None
    col, row = (math.floor(v) for v in ~level.transform * (x, y))
    rows, cols = level.codes.shape[1:]
    row -= row == rows and lat == -90
    return (row, col) if 0 <= row < rows and 0 <= col < cols else None


def _centre(part: Part, row: int, col: int) -> tuple[float, float]:
    x, y = part.levels[0].transform * (col + 0.5, row + 0.5)
    if not part.crs.is_geographic:
        (x,), (y,), *_ = rasterio.warp.transform(part.crs, WORLD, [x], [y])
    return round(x, 6), round(y, 6)
