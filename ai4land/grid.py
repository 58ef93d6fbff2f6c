"""The target grid: fine cells nested exactly in coarse cells, cut into shards.

A :class:`Grid` is a value. It wraps the fine ``odc.geo.GeoBox`` with the number of fine cells along one side of a
coarse cell (``factor``) and of a shard (``shard``); everything else (coarse GeoBox, shards, windows, coordinates, true
cell areas) follows. Only this module knows the sphere, the dateline and the poles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import xarray as xr
from affine import Affine
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

from ai4land.errors import ConfigError

WGS84_A = 6378137.0
"""Semi-major axis of the WGS 84 ellipsoid in metres."""
WGS84_E2 = 6.69437999014e-3
"""First eccentricity squared of the WGS 84 ellipsoid."""

FINE_DIMS = ("latitude", "longitude")
COARSE_DIMS = ("coarse_latitude", "coarse_longitude")

Bounds = tuple[float, float, float, float]
"""West, south, east, north."""
WIDE, DEEP = 512, 256
"""Largest side of a chunk in cells, for arrays with one year and with several years per chunk."""


class Readable(Protocol):
    """An array that slices into numpy: numpy, zarr or dask."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Array shape."""
        ...

    def __getitem__(self, key: Any) -> Any:
        """Read a part."""
        ...


@dataclass(frozen=True, order=True)
class Window:
    """A rectangle of fine cells: first row and column, height and width. It may reach beyond the grid.

    >>> Window(0, 0, 4, 8).pad(2)
    Window(row=-2, col=-2, height=8, width=12)
    """

    row: int
    col: int
    height: int
    width: int

    def pad(self, margin: int) -> Window:
        """Grow by ``margin`` cells on each side."""
        return Window(self.row - margin, self.col - margin, self.height + 2 * margin, self.width + 2 * margin)

    @property
    def slices(self) -> tuple[slice, slice]:
        """Row and column slices, for a window inside the grid."""
        return slice(self.row, self.row + self.height), slice(self.col, self.col + self.width)

    def inside(self, other: Window) -> tuple[slice, slice]:
        """Row and column slices of this window in an array that holds ``other``, a window around it."""
        return Window(self.row - other.row, self.col - other.col, self.height, self.width).slices

    def union(self, other: Window) -> Window:
        """Smallest window around both.

        >>> Window(0, 0, 4, 8).union(Window(-2, 2, 3, 3))
        Window(row=-2, col=0, height=6, width=8)
        """
        row, col = min(self.row, other.row), min(self.col, other.col)
        bottom = max(self.row + self.height, other.row + other.height)
        right = max(self.col + self.width, other.col + other.width)
        return Window(row, col, bottom - row, right - col)


@dataclass(frozen=True)
class Grid:
    """Fine cells nested in coarse cells.

    Parameters
    ----------
    fine
        GeoBox of the fine cells, north up.
    factor
        Fine cells along one side of a coarse cell.
    shard
        Fine cells along one side of a shard, the unit of writing and inference: a multiple of ``factor``. The grid
        is whole shards.
    """

    fine: GeoBox
    factor: int
    shard: int

    def __post_init__(self) -> None:
        """Check that cells, coarse cells and shards nest."""
        if self.factor < 1 or self.shard < 1 or self.shard % self.factor:
            raise ConfigError(
                f"shard is {self.shard} fine cells, expected a multiple of the coarse cell ({self.factor} fine cells); "
                f"try shard={self.factor * max(1, round(self.shard / self.factor))}"
            )
        if any(n % self.shard for n in self.fine.shape):
            raise ConfigError(
                f"grid is {tuple(self.fine.shape)} fine cells, expected whole shards of {self.shard}; build it with make_grid()"
            )
        a = self.fine.affine
        if a.e >= 0 or a.a <= 0 or a.b or a.d:
            raise ConfigError("grid is not north up; rows must run from north to south and columns from west to east")

    @property
    def shape(self) -> tuple[int, int]:
        """Fine rows and columns."""
        return int(self.fine.shape[0]), int(self.fine.shape[1])

    @cached_property
    def coarse(self) -> GeoBox:
        """GeoBox of the coarse cells."""
        rows, cols = self.shape
        a, f = self.fine.affine, self.factor
        return GeoBox((rows // f, cols // f), Affine(a.a * f, 0.0, a.c, 0.0, a.e * f, a.f), self.fine.crs)

    def coarse_centres(self, cells: Window) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Centres of rows and columns of coarse cells, also beyond the grid; a global grid wraps at the dateline."""
        a, cols = self.coarse.affine, cells.col + np.arange(cells.width, dtype=np.float64)
        if self.wraps:
            cols %= self.coarse.shape[1]
        rows = cells.row + np.arange(cells.height, dtype=np.float64)
        return a.f + (rows + 0.5) * a.e, a.c + (cols + 0.5) * a.a

    @property
    def geographic(self) -> bool:
        """Whether the coordinates are degrees."""
        return bool(self.fine.crs is not None and self.fine.crs.geographic)

    @cached_property
    def wraps(self) -> bool:
        """Whether the grid spans all longitudes, so that its west and east edges meet."""
        return self.geographic and math.isclose(self.shape[1] * self.fine.affine.a, 360.0, abs_tol=1e-6)

    @property
    def bounds(self) -> Bounds:
        """West, south, east, north."""
        return edges(self.fine)

    def coords(self) -> dict[str, Any]:
        """Cell centres of the fine and of the coarse grid, computed from integers so that they are bit-equal in every region."""
        return {
            **dict(zip(FINE_DIMS, centres(self.fine), strict=True)),
            **dict(zip(COARSE_DIMS, centres(self.coarse), strict=True)),
        }

    def shards(self) -> list[Window]:
        """List all shards, row by row from the north-west."""
        return list(tiles(self.shape, self.shard))

    def cell_areas(self) -> NDArray[np.float64]:
        """Area of one fine cell of each row in square metres, shape ``(rows,)``."""
        return cell_areas(self.fine)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for :meth:`from_dict`."""
        return {
            "crs": str(self.fine.crs),
            "shape": list(self.shape),
            "transform": [float(v) for v in self.fine.affine[:6]],
            "factor": self.factor,
            "shard": self.shard,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Grid:
        """Make a grid from the values of :meth:`to_dict`."""
        fine = GeoBox(tuple(values["shape"]), Affine(*values["transform"]), values["crs"])
        return cls(fine, int(values["factor"]), int(values["shard"]))


def make_grid(
    bbox: Bounds,
    *,
    coarse_cell: float,
    factor: int,
    shard: int,
    origin: tuple[float, float] = (-180.0, 90.0),
    crs: str = "EPSG:4326",
) -> Grid:
    """Cover a region with whole shards of a fixed lattice.

    Parameters
    ----------
    bbox
        West, south, east, north in the units of ``crs``.
    coarse_cell
        Side of a coarse cell in the units of ``crs``.
    factor, shard
        As in :class:`Grid`.
    origin
        Upper-left corner of the lattice of shards; regions made with the same origin share their shards.

    Raises
    ------
    ConfigError
        If the box is empty, or the lattice of shards reaches beyond a pole or spans more than 360 degrees.

    Examples
    --------
    >>> grid = make_grid((9.0, 47.3, 13.8, 50.5), coarse_cell=100 / 360, factor=100, shard=400)
    >>> grid.shape, [round(v, 3) for v in grid.bounds]
    ((1600, 2000), [8.889, 46.667, 14.444, 51.111])
    >>> make_grid((-180, -90, 180, 90), coarse_cell=0.25, factor=25, shard=1200).shape
    (18000, 36000)
    """
    west, south, east, north = bbox
    if not (west < east and south < north):
        raise ConfigError(f"bbox is {bbox}, expected west < east and south < north; split a box that crosses the dateline")
    if coarse_cell <= 0:
        raise ConfigError(f"coarse cell is {coarse_cell} units of {crs}, expected more than 0; give the side of a coarse cell")
    if factor < 1 or shard < 1 or shard % factor:
        raise ConfigError(
            f"shard is {shard} fine cells, expected a multiple of the coarse cell ({factor} fine cells); "
            f"try shard={factor * max(1, round(shard / max(factor, 1)))}"
        )
    side = coarse_cell * shard / factor
    tiny = 1e-9
    first_col = math.floor((west - origin[0]) / side + tiny)
    last_col = math.ceil((east - origin[0]) / side - tiny)
    first_row = math.floor((origin[1] - north) / side + tiny)
    last_row = math.ceil((origin[1] - south) / side - tiny)
    res = coarse_cell / factor
    transform = Affine(res, 0.0, origin[0] + first_col * side, 0.0, -res, origin[1] - first_row * side)
    grid = Grid(GeoBox(((last_row - first_row) * shard, (last_col - first_col) * shard), transform, crs), factor, shard)
    if grid.geographic:
        w, s, e, n = grid.bounds
        if n > 90 + 1e-6 or s < -90 - 1e-6 or e - w > 360 + 1e-6:
            raise ConfigError(
                f"whole shards of {side:g} degrees reach from {s:g} to {n:g} degrees of latitude and over {e - w:g} of longitude, "
                "expected at most -90..90 and 360; choose a shard that divides the globe, or another origin"
            )
    return grid


def edges(box: GeoBox) -> Bounds:
    """West, south, east and north edge of a north-up GeoBox."""
    a = box.affine
    rows, cols = box.shape
    return a.c, a.f + rows * a.e, a.c + cols * a.a, a.f


def centres(box: GeoBox) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centres of the rows and columns of a north-up GeoBox, bit-equal for every box of a lattice."""
    a = box.affine
    rows, cols = box.shape
    return _centres(a.f, a.e, rows), _centres(a.c, a.a, cols)


def _centres(start: float, step: float, count: int) -> NDArray[np.float64]:
    """Count steps from 0: the edge, rounded to 2^-20 of a cell, is exact in every box of the lattice."""
    first = round(start / step * 2**20) / 2**20
    return (first + np.arange(count, dtype=np.float64) + 0.5) * step


def cell_areas(box: GeoBox) -> NDArray[np.float64]:
    """Area of one cell of each row in square metres, on the WGS 84 ellipsoid for a geographic grid.

    The zone between the equator and latitude φ has, per radian of longitude, the area
    b²/2 · (sin φ / (1 − e² sin² φ) + artanh(e sin φ) / e)  (Snyder 1987, Map Projections, eq. 3-12).

    >>> whole = make_grid((-180, -90, 180, 90), coarse_cell=5, factor=1, shard=36)
    >>> round(float(whole.cell_areas().sum()) * 72 / 1e12, 3)
    510.066
    """
    a = box.affine
    rows = box.shape[0]
    if box.crs is None or not box.crs.geographic:
        return np.full(rows, abs(a.a * a.e))
    lat = np.deg2rad(np.clip(a.f + np.arange(rows + 1) * a.e, -90, 90))
    e = math.sqrt(WGS84_E2)
    sin = np.sin(lat)
    zone = 0.5 * WGS84_A**2 * (1 - WGS84_E2) * (sin / (1 - WGS84_E2 * sin**2) + np.arctanh(e * sin) / e)
    areas: NDArray[np.float64] = -np.diff(zone) * math.radians(a.a)
    return areas


def tiles(shape: tuple[int, int], size: int) -> Iterator[Window]:
    """Cut ``shape`` into squares of ``size``; the last row and column may be smaller."""
    for row in range(0, shape[0], size):
        for col in range(0, shape[1], size):
            yield Window(row, col, min(size, shape[0] - row), min(size, shape[1] - col))


def read_window(array: Readable, window: Window, *, fill: float, wrap: bool) -> NDArray[Any]:
    """Read a window of the last two dimensions that may reach beyond the array.

    Rows and columns outside hold ``fill``; with ``wrap``, columns continue on the other side (the dateline).

    >>> read_window(np.arange(8).reshape(2, 4), Window(-1, 3, 2, 3), fill=-9, wrap=True)
    array([[-9, -9, -9],
           [ 3,  0,  1]])
    """
    rows, cols = array.shape[-2:]
    lead = array.shape[:-2]
    top, bottom = max(window.row, 0), min(window.row + window.height, rows)
    out: NDArray[Any] | None = None
    for shift in range(window.col // cols * cols, window.col + window.width, cols) if wrap else (0,):
        left, right = max(window.col, shift), min(window.col + window.width, shift + cols)
        if top >= bottom or left >= right:
            continue
        part = np.asarray(array[..., top:bottom, left - shift : right - shift])
        if part.shape[-2:] == (window.height, window.width):
            return part
        if out is None:
            out = np.full((*lead, window.height, window.width), fill, dtype=part.dtype)
        out[..., top - window.row : bottom - window.row, left - window.col : right - window.col] = part
    if out is None:
        dtype = getattr(array, "dtype", np.float32)
        out = np.full((*lead, window.height, window.width), fill, dtype=dtype)
    return out


def coarse_slices(window: Window, factor: int) -> tuple[slice, slice]:
    """Coarse rows and columns of a window of whole coarse cells."""
    rows, cols = window.slices
    return slice(rows.start // factor, rows.stop // factor), slice(cols.start // factor, cols.stop // factor)


def coarse_window(window: Window, factor: int) -> tuple[Window, tuple[int, int]]:
    """Find the coarse cells needed to interpolate to a fine window.

    Returns
    -------
    window
        Coarse cells: one more on each side than the fine window touches. Its size depends only on that of the
        fine window, so that windows of one size form a batch.
    offset
        Row and column of the first fine cell of ``window``, counted in fine cells from the upper-left corner of the
        coarse window.

    >>> coarse_window(Window(30, 0, 32, 32), 16)
    (Window(row=0, col=-1, height=5, width=5), (30, 16))
    """
    row, col = window.row // factor - 1, window.col // factor - 1
    size = [-(-n // factor) + 3 for n in (window.height, window.width)]
    return Window(row, col, size[0], size[1]), (window.row - row * factor, window.col - col * factor)


def read_coarse(array: Readable, window: Window, *, wrap: bool) -> NDArray[Any]:
    """Read coarse cells of the last two dimensions; repeat the edge beyond the grid or, with ``wrap``, cross the dateline."""
    rows, cols = array.shape[-2:]
    r = np.clip(np.arange(window.row, window.row + window.height), 0, rows - 1)
    c = np.arange(window.col, window.col + window.width)
    c = c % cols if wrap else np.clip(c, 0, cols - 1)
    part = np.asarray(array[..., int(r.min()) : int(r.max()) + 1, :])
    return part[..., r - int(r.min()), :][..., c]


def block_sum(values: NDArray[Any], factor: int) -> NDArray[Any]:
    """Sum fine cells into coarse cells over the last two dimensions.

    >>> block_sum(np.ones((4, 4), int), 2).tolist()
    [[4, 4], [4, 4]]
    """
    *lead, rows, cols = values.shape
    return values.reshape(*lead, rows // factor, factor, cols // factor, factor).sum(axis=(-3, -1))


def spatial_ref(box: GeoBox) -> xr.DataArray:
    """Make the scalar CF grid-mapping coordinate that xarray, GDAL and rioxarray read."""
    if box.crs is None:
        raise ConfigError("grid has no coordinate reference system; give one, for example crs=EPSG:4326")
    attrs = {**box.crs.proj.to_cf(), "spatial_ref": box.crs.to_wkt()}
    attrs["GeoTransform"] = " ".join(repr(float(v)) for v in box.affine.to_gdal())
    return xr.DataArray(np.int32(0), attrs=attrs)


def chunk_side(grid: Grid, *, limit: int = WIDE) -> int:
    """Side of a chunk in fine cells: whole coarse cells that divide the shard, at most ``limit`` if possible.

    >>> chunk_side(make_grid((-180, -90, 180, 90), coarse_cell=0.25, factor=30, shard=1440))
    480
    """
    cells = grid.shard // grid.factor
    sides = [grid.shard // n for n in range(1, cells + 1) if cells % n == 0]
    return max((side for side in sides if side <= limit), default=grid.factor)
