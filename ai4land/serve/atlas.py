"""Open a cube for viewing: its parts, legend and overviews.

An :class:`Atlas` holds metadata and coordinates only; maps are read as they are shown.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from affine import Affine
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from pyproj.exceptions import CRSError

from ai4land.cube.describe import Flag
from ai4land.errors import DataError
from ai4land.grid import FINE_DIMS
from ai4land.places import folder_of, open_place

WORLD = CRS.from_epsg(4326)  # longitude and latitude in degrees
EQUATOR = 360 / 256  # degrees per pixel at the equator at zoom 0
MAX_ZOOM = 22
MOST_CELLS = 40_000_000  # most cells that a tile may read; sets the first zoom of a cube without overviews
PATIENCE = dt.timedelta(seconds=5)  # limit for a request to a remote cube, including retries: a visitor is waiting
SHARES = ("confidence", "change_probability")  # variables that give the certainty of a class
METRES = 111_320.0  # metres per degree along the equator
_OVERVIEW = re.compile(r"[A-Za-z0-9_]+(?:/[A-Za-z0-9_]+)*/land_cover")
_MAKE = "make one with: ai4land reconstruct RUN.yaml"
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")


@dataclass(frozen=True)
class Level:
    """Class codes ``(time, latitude, longitude)`` at full or overview resolution; ``index`` maps years to positions."""

    codes: zarr.Array[Any]
    index: dict[int, int]
    transform: Affine

    @property
    def cell(self) -> float:
        """Cell side in units of the reference system."""
        return min(abs(self.transform.a), abs(self.transform.e))


@dataclass(frozen=True)
class Part:
    """One series of maps, such as a scenario.

    Attributes
    ----------
    name
        Of the group in the cube; empty for a cube without parts.
    years
        Visible years, ascending.
    legend, fill
        Classes without the fill; code and name of cells that are not mapped.
    levels
        Finest first.
    bounds
        West, south, east, north in degrees.
    zooms
        First and last zoom of tiles; beyond the last, tiles only enlarge cells.
    shares
        Variables in 0..1, such as the confidence: array of stored numbers, scale, and the number for missing values.
    """

    name: str
    attrs: dict[str, Any]
    years: tuple[int, ...]
    legend: tuple[Flag, ...]
    fill: Flag
    levels: tuple[Level, ...]
    crs: CRS
    bounds: tuple[float, float, float, float]
    zooms: tuple[int, int]
    shares: dict[str, tuple[zarr.Array[Any], float, int | None]]


@dataclass(frozen=True, eq=False)
class Atlas:
    """An open cube and its parts by name."""

    path: str
    version: str
    attrs: dict[str, Any]
    parts: dict[str, Part]


def remote(path: str) -> bool:
    """Whether a path is a remote URL and not a folder.

    >>> remote("https://example.org/cube.zarr"), remote("runs/demo/cube.zarr")
    (True, False)
    """
    return folder_of(path) is None


def open_atlas(path: str) -> Atlas:
    """Open a cube (folder or URL) with its parts and overviews, without reading maps.

    Raises
    ------
    DataError
        If there is no cube, it has no finished year, or its legend or grid is invalid.
    ConfigError
        If the kind of URL is unknown or its library is missing.
    """
    root = _root(path)
    names = [""] if "land_cover" in root else sorted(name for name, group in root.groups() if "land_cover" in group)
    if not names:
        raise DataError(f"{path} is a Zarr group without a variable land_cover, expected a cube; {_MAKE}")
    begun = {name: root[name] if name else root for name in names}
    shown = [name for name, group in begun.items() if _years(group, path)]  # type: ignore[arg-type]
    if not shown:
        raise DataError(f"cube {path} has 0 finished years, expected at least one; serve it when a year is whole")
    parts = {name: _open_part(path, name, root) for name in shown}
    return Atlas(path, _version(root), dict(root.attrs), parts)


def version_of(path: str) -> str:
    """Checksum of the metadata of a cube; it changes when years are added or the cube is remade."""
    return _version(_root(path))


def _version(root: zarr.Group) -> str:
    about = json.dumps(root.metadata.to_dict(), sort_keys=True, default=str)
    return hashlib.blake2b(about.encode(), digest_size=6).hexdigest()


def _root(path: str) -> zarr.Group:
    store = open_place(path, read_only=True, give_up=PATIENCE)
    try:
        root = zarr.open_group(store, mode="r", zarr_format=3)
    except (FileNotFoundError, NotADirectoryError, KeyError, ValueError) as error:
        raise DataError(f"no cube at {path}; {_MAKE}") from error
    except Exception as error:  # remote stores raise errors without a common class
        if not remote(path):
            raise
        said = " ".join(str(error).split())
        raise DataError(f"no cube at {path}; {_MAKE} (the address answered: {said[:300]})") from error
    if root.metadata.consolidated_metadata is None:
        raise DataError(f"no whole cube at {path}: its metadata are not consolidated; {_MAKE}")
    return root


def _open_part(path: str, name: str, root: zarr.Group) -> Part:
    group: zarr.Group = root[name] if name else root  # type: ignore[assignment]
    label = f"{path}/{name}" if name else path
    levels = [_level(group, label)]
    shape = levels[0].codes.shape
    layout = group.attrs.get("multiscales", {})
    for entry in layout.get("layout", []) if isinstance(layout, dict) else []:
        asset = str(entry.get("asset", "")) if isinstance(entry, dict) else ""
        if _OVERVIEW.fullmatch(asset) and asset in group:
            inner: Any = group[asset.removesuffix("/land_cover")]
            levels.append(_level(inner, f"{label}/{inner.basename}"))
    levels.sort(key=lambda level: level.cell)
    fill, legend = _legend(levels[0].codes, label)
    shares = {key: _share(_array(group, key, label), shape, f"{key} of {label}") for key in SHARES if key in group}
    crs = _crs(group, label)
    bounds = _bounds(levels[0], crs)
    shown = tuple(sorted(levels[0].index))
    return Part(name, dict(group.attrs), shown, legend, fill, tuple(levels), crs, bounds, _zooms(levels, crs, bounds), shares)


def _array(group: zarr.Group, name: str, label: str) -> zarr.Array[Any]:
    array = group.get(name)
    if not isinstance(array, zarr.Array):
        raise DataError(f"{label} has no variable {name}, expected land_cover, year, latitude and longitude; write it as a cube")
    return array


def _years(group: zarr.Group, label: str) -> list[int]:
    return [int(year) for year in np.ravel(_array(group, "year", label)[...])]


def _level(group: zarr.Group, label: str) -> Level:
    """Read the codes of one group as stored, with their position."""
    codes = _array(group, "land_cover", label)
    names = codes.metadata.dimension_names if codes.metadata.zarr_format == 3 else None
    if names != ("time", *FINE_DIMS):
        raise DataError(f"land_cover of {label} has the dimensions {names}, expected {('time', *FINE_DIMS)}; write it as Zarr v3")
    index = {year: i for i, year in enumerate(_years(group, label))}
    (north, down), (west, right) = (_axis(np.asarray(_array(group, d, label)[...]), f"{d} of {label}") for d in FINE_DIMS)
    return Level(codes, index, Affine(right, 0, west, 0, down, north))


def _share(array: zarr.Array[Any], shape: tuple[int, ...], label: str) -> tuple[zarr.Array[Any], float, int | None]:
    if array.shape != shape:
        raise DataError(f"{label} has the shape {array.shape}, expected that of land_cover {shape}")
    scale, empty = array.attrs.get("scale_factor", 1.0), array.attrs.get("_FillValue")
    return array, float(scale) if isinstance(scale, int | float) else 1.0, empty if isinstance(empty, int) else None


def _axis(centres: NDArray[np.float64], label: str) -> tuple[float, float]:
    """Derive the start and the step of an axis from cell centres."""
    if centres.size < 2:
        raise DataError(f"{label} has {centres.size} cells, expected at least 2")
    step = float(centres[-1] - centres[0]) / (centres.size - 1)
    if step == 0 or not np.allclose(np.diff(centres), step, rtol=0.01, atol=0):
        raise DataError(f"{label} is not evenly spaced, expected cells of one size; bring the maps onto a regular grid")
    return float(centres[0]) - step / 2, step


def _crs(group: zarr.Group, label: str) -> CRS:
    """Read the reference system of a cube; longitude and latitude if none is given."""
    attrs = group["spatial_ref"].attrs if "spatial_ref" in group else {}
    text = attrs.get("crs_wkt") or attrs.get("spatial_ref")
    try:
        return CRS.from_user_input(text) if text else WORLD
    except CRSError as error:
        raise DataError(f"spatial_ref of {label} is not readable, expected a reference system as WKT: {error}") from error


def _bounds(level: Level, crs: CRS) -> tuple[float, float, float, float]:
    """West, south, east, north in degrees."""
    (_, rows, cols), t = level.codes.shape, level.transform
    (west, east), (south, north) = sorted((t.c, t.c + cols * t.a)), sorted((t.f, t.f + rows * t.e))
    if not crs.is_geographic:
        into = Transformer.from_crs(crs, WORLD, always_xy=True)
        west, south, east, north = into.transform_bounds(west, south, east, north)
    return max(west, -180.0), max(south, -90.0), min(east, 180.0), min(north, 90.0)


def _legend(codes: zarr.Array[Any], label: str) -> tuple[Flag, tuple[Flag, ...]]:
    """Read the CF flags as fill and classes; inconsistent ones are refused because a wrong colour would go unnoticed."""
    if codes.dtype != np.uint8:
        raise DataError(f"land_cover of {label} is {codes.dtype}, expected class codes as uint8")
    flags: Any = codes.attrs.get("flag_values", [])
    values = [int(v) for v in np.atleast_1d(flags)]
    names = str(codes.attrs.get("flag_meanings", "")).split()
    colours = str(codes.attrs.get("flag_colors", "")).split()
    if not values or not len(values) == len(names) == len(colours):
        raise DataError(
            f"land_cover of {label} has {len(values)} flag_values, {len(names)} flag_meanings and {len(colours)} flag_colors, "
            "expected one of each for every class; write these attributes"
        )
    bad = [c for c in colours if not _COLOUR.fullmatch(c)]
    if bad:
        raise DataError(f"flag_colors of {label} has {bad[0][:40]!r}, expected colours as #rrggbb; write them so")
    entries = [Flag(v, n.replace("_", " "), c.lower()) for v, n, c in zip(values, names, colours, strict=True)]
    code = int(codes.fill_value)
    fill = next((e for e in entries if e.code == code), Flag(code, "not mapped", "#000000"))
    return Flag(code, fill.name, fill.colour), tuple(e for e in entries if e.code != code)


def _zooms(levels: list[Level], crs: CRS, bounds: tuple[float, float, float, float]) -> tuple[int, int]:
    """First zoom at which a tile reads at most ``MOST_CELLS``; zoom at which a cell is about four pixels wide."""
    unit = 1.0 if crs.is_geographic else 1 / METRES
    fine, coarse = levels[0].cell * unit, levels[-1].cell * unit
    first = 0
    while first < MAX_ZOOM:
        width = min(360 / 2**first, bounds[2] - bounds[0])
        height = min(max(width, 170 / 2**first), bounds[3] - bounds[1])
        if (width / coarse) * (height / coarse) <= MOST_CELLS:
            break
        first += 1
    last = math.ceil(math.log2(EQUATOR / fine)) + 2
    return first, min(max(last, first), MAX_ZOOM)
