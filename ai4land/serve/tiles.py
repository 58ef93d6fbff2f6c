"""Draw map tiles of a cube, and read the values at a point.

Tiles follow ``WebMercatorQuad``: 256 x 256 pixels, zoom *z*, column *x* from 180°W, row *y* from the north. A pixel has the
colour of the cell at its centre, from the coarsest overview whose cells are no larger than a pixel: codes are never mixed,
and a tile reads little from a cube of any size.

titiler-xarray was measured and rejected. Its application opens any URL that a visitor names, ignores overviews, and draws
images of any size. Its reader (rio-tiler, with GDAL's warper) gives the same pixels in several times the time, and divides
by zero in tiles at 85° that are smaller than a cell.
"""

from __future__ import annotations

import io
import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pyproj import CRS, Transformer

from ai4land.serve.atlas import EQUATOR, MAX_ZOOM, METRES, WORLD, Level, Part

SIDE = 256


def tile(part: Part, *, year: int, z: int, x: int, y: int) -> bytes:
    """Draw a tile, transparent where nothing is mapped: a 256 x 256 PNG of class codes with the legend as palette.

    Raises
    ------
    KeyError
        If there is no such year or tile.
    """
    if year not in part.years or not part.zooms[0] <= z <= MAX_ZOOM or not (0 <= x < 2**z and 0 <= y < 2**z):
        raise KeyError((year, z, x, y))
    level = choose(part, year=year, z=z, y=y)
    rows, cols, inside = _cells(part, level, *_middles(z, x, y))
    codes = np.full((SIDE, SIDE), part.fill.code, np.uint8)
    if inside.any():
        (top, bottom), (left, right) = (_span(at, inside) for at in (rows, cols))
        window: Any = level.codes[level.index[year], top : bottom + 1, left : right + 1]
        found = window[np.clip(rows, top, bottom) - top, np.clip(cols, left, right) - left]
        codes = np.where(inside, found, codes)
    return picture(part, codes)


def _span(at: NDArray[np.int64], inside: NDArray[np.bool_]) -> tuple[int, int]:
    """First and last row, or column, of the positions inside."""
    those = np.broadcast_to(at, inside.shape)[inside]
    return int(those.min()), int(those.max())


def picture(part: Part, codes: NDArray[np.uint8]) -> bytes:
    """Encode class codes as a PNG image with the legend as palette; all other codes are transparent."""
    palette, alpha = bytearray(768), bytearray(256)
    for entry in part.legend:
        palette[3 * entry.code : 3 * entry.code + 3] = bytes.fromhex(entry.colour[1:])
        alpha[entry.code] = 255
    image = Image.fromarray(codes)
    image.putpalette(bytes(palette))
    file = io.BytesIO()
    image.save(file, "PNG", transparency=bytes(alpha))
    return file.getvalue()


def _middles(z: int, x: int, y: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Longitudes ``(1, 256)`` and latitudes ``(256, 1)`` of the pixel centres of a tile."""
    step = (np.arange(SIDE) + 0.5) / SIDE
    lat = np.degrees(np.arctan(np.sinh(np.pi * (1 - 2 * (y + step) / 2**z))))
    return (360 * (x + step) / 2**z - 180)[None, :], lat[:, None]


def _cells(
    part: Part, level: Level, lon: NDArray[np.float64], lat: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Rows and columns of the cells at positions, and whether these lie inside; the three broadcast against each other."""
    x, y = lon, lat
    if not part.crs.is_geographic:
        wide, high = np.broadcast_arrays(lon, lat)
        x, y = _into(part.crs).transform(wide, high)
    back = ~level.transform
    col, row = back.a * x + back.c, back.e * y + back.f
    rows, cols = level.codes.shape[1:]
    row = np.where((row == rows) & (lat == -90), rows - 1, row)  # the pole belongs to the last row
    with np.errstate(invalid="ignore"):
        inside = (col >= 0) & (col < cols) & (row >= 0) & (row < rows)  # False where the projection is undefined
    return (*(np.nan_to_num(np.floor(at), nan=-1, posinf=-1, neginf=-1).astype(np.int64) for at in (row, col)), inside)


@lru_cache(maxsize=16)
def _into(crs: CRS) -> Transformer:
    return Transformer.from_crs(WORLD, crs, always_xy=True)


def choose(part: Part, *, year: int, z: int, y: int) -> Level:
    """Choose the coarsest level that has the year and whose cells are no larger than a pixel in this row of tiles."""
    side = EQUATOR / 2**z
    north, south = (math.atan(math.sinh(math.pi * (1 - 2 * row / 2**z))) for row in (y, y + 1))
    least = min(side, math.degrees(north - south) / SIDE)
    if not part.crs.is_geographic:
        least *= METRES
    fitting = [level for level in part.levels if year in level.index and level.cell <= least * 1.001]
    return fitting[-1] if fitting else part.levels[0]


def point(part: Part, *, lon: float, lat: float, year: int) -> dict[str, Any]:
    """Read the class and the shares of the cell at a point.

    Returns
    -------
    dict
        ``code`` (None if not mapped or outside), the shares (0..1 or None), and ``cell``: longitude and latitude of its
        centre.

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
    code = int(_value(part.levels[0].codes, time, row, col))
    stored = {name: (_value(array, time, row, col), scale, empty) for name, (array, scale, empty) in part.shares.items()}
    return {
        "code": None if code == part.fill.code else code,
        "cell": _centre(part, row, col),
        **{name: None if value == empty else round(float(value * scale), 4) for name, (value, scale, empty) in stored.items()},
    }


def _value(array: Any, time: int, row: int, col: int) -> Any:
    return np.asarray(array[time, row, col])[()]


def series(part: Part, *, lon: float, lat: float) -> dict[str, Any]:
    """Read the class of the cell at a point in every year: ``years`` and ``codes`` (None if not mapped)."""
    found = _cell(part, lon, lat)
    if found is None:
        return {"years": list(part.years), "codes": [None] * len(part.years)}
    level = part.levels[0]
    values = np.asarray(level.codes[:, found[0], found[1]])
    codes = [int(values[level.index[year]]) for year in part.years]
    return {"years": list(part.years), "codes": [None if c == part.fill.code else c for c in codes]}


def _cell(part: Part, lon: float, lat: float) -> tuple[int, int] | None:
    """Row and column of the cell at a point, None if outside; longitudes wrap around the globe."""
    if not (math.isfinite(lon) and math.isfinite(lat) and abs(lat) <= 90):
        return None
    place = np.array([(lon + 180) % 360 - 180]), np.array([lat], dtype=np.float64)
    row, col, inside = _cells(part, part.levels[0], *place)
    return (int(row[0]), int(col[0])) if inside[0] else None


def _centre(part: Part, row: int, col: int) -> tuple[float, float]:
    """Longitude and latitude of a cell's centre."""
    x, y = part.levels[0].transform @ (col + 0.5, row + 0.5)
    if not part.crs.is_geographic:
        x, y = _into(part.crs).transform(x, y, direction="INVERSE")
    return round(x, 6), round(y, 6)
