"""A cube opened to be looked at: its parts, legend and overviews, each map as it is stored.

An :class:`Atlas` holds what a map and a page need and nothing that is read later than its metadata; maps stay where they are.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import rasterio.warp
import rioxarray  # noqa: F401  gives arrays their reference system: .rio
import xarray as xr
import zarr
from affine import Affine
from rasterio.crs import CRS

from ai4land.cube import open_cube
from ai4land.errors import ConfigError, DataError
from ai4land.grid import FINE_DIMS

WORLD = CRS.from_epsg(4326)
EQUATOR = 360 / 256
"""Degrees along a pixel at the equator at zoom 0."""
MAX_ZOOM = 22
MOST_CELLS = 40_000_000
"""Cells that a tile may read: where a cube has no overviews, the zoom begins where tiles read no more."""
METRES = 111_320.0
"""Along a degree of the equator."""
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")


@dataclass(frozen=True)
class Entry:
    """A class of the legend."""

    code: int
    name: str
    colour: str


@dataclass(frozen=True)
class Level:
    """Class codes ``(time, y, x)`` at one resolution: the cube's own or an overview."""

    codes: xr.DataArray
    index: dict[int, int]
    transform: Affine

    @property
    def cell(self) -> float:
        """Side of a cell in units of the reference system."""
        return min(abs(self.transform.a), abs(self.transform.e))


@dataclass(frozen=True)
class Part:
    """One series of maps, such as a scenario.

    Attributes
    ----------
    name
        Of the group in the cube; empty where the cube has no parts.
    attrs
        Attributes of the group.
    years
        That can be shown, ascending.
    legend
        Classes, the fill left out.
    fill
        Code and name of cells that are not mapped.
    levels
        Finest first.
    crs
        Reference system of the cells.
    bounds
        West, south, east, north in degrees.
    zooms
        First and last zoom of tiles; beyond the last one a tile only enlarges cells.
    shares
        Variables of 0..1 by year, such as the confidence.
    """

    name: str
    attrs: dict[str, Any]
    years: tuple[int, ...]
    legend: tuple[Entry, ...]
    fill: Entry
    levels: tuple[Level, ...]
    crs: CRS
    bounds: tuple[float, float, float, float]
    zooms: tuple[int, int]
    shares: dict[str, xr.DataArray]


@dataclass(frozen=True, eq=False)
class Atlas:
    """An open cube with its parts, by name."""

    path: str
    version: str
    attrs: dict[str, Any]
    parts: dict[str, Part]


def remote(path: str) -> bool:
    """Say whether a cube lies behind an address instead of in a folder.

    >>> remote("https://example.org/cube.zarr"), remote("runs/demo/cube.zarr")
    (True, False)
    """
    return "://" in path


def open_atlas(path: str) -> Atlas:
    """Open a cube with its parts and overviews; no map is read.

    Parameters
    ----------
    path
        Folder of the cube, or its address (http, https, s3, gs, az); credentials come from the environment.

    Raises
    ------
    DataError
        If there is no cube, a year to show is lacking, or the legend is not usable.
    ConfigError
        If an address is given and the library for it is lacking.
    """
    missing = f"no cube at {path}; make one with: ai4land reconstruct RUN.yaml"
    store = _remote_store(path) if remote(path) else Path(path)
    try:
        root = zarr.open_group(store, mode="r")
        names = [""] if "land_cover" in root else sorted(name for name, group in root.groups() if "land_cover" in group)
    except (OSError, KeyError, ValueError, zarr.errors.GroupNotFoundError) as error:
        raise DataError(missing) from error
    except Exception as error:  # what a remote store raises is no class of its own
        if not remote(path):
            raise
        raise DataError(f"{missing} (the address answered: {error})") from error
    if not names:
        raise DataError(f"{path} is a Zarr group without a variable land_cover, expected a cube; {missing}")
    parts = {name: _open_part(path, store, name, root) for name in names}
    return Atlas(path, _version(store), dict(root.attrs), parts)


def version_of(path: str) -> str:
    """Digest of the metadata of a cube: another one when years were added or it was made again."""
    return _version(_remote_store(path) if remote(path) else Path(path))


def _version(store: Any) -> str:
    raw = (store / "zarr.json").read_bytes() if isinstance(store, Path) else bytes(store.store.get("zarr.json").bytes())
    return hashlib.blake2b(raw, digest_size=6).hexdigest()


def _remote_store(path: str) -> Any:
    try:
        from obstore.store import from_url
        from zarr.storage import ObjectStore
    except ImportError as error:
        raise ConfigError(
            f'cube is {path}, which is read with obstore, and it is missing; run: pip install "ai4land[s3]"'
        ) from error
    scheme = urlsplit(path).scheme
    if scheme not in ("http", "https", "s3", "gs", "az", "abfs"):
        raise ConfigError(f"cube is at {scheme}://, expected a folder or http(s), s3, gs or az; copy it to one of them")
    again: Any = {"max_retries": 2}
    options: Any = {"timeout": "30s", "connect_timeout": "5s"}
    if scheme == "http":
        options["allow_http"] = True
    try:
        return ObjectStore(from_url(path.rstrip("/"), client_options=options, retry_config=again), read_only=True)
    except Exception as error:  # obstore raises classes that are private to it
        raise ConfigError(f"cube is {path}, expected an address that can be opened: {error}") from error


def _open_part(path: str, store: Any, name: str, root: zarr.Group) -> Part:
    group: zarr.Group = root[name] if name else root  # type: ignore[assignment]
    label = f"{path}/{name}" if name else path
    if isinstance(store, Path):
        data = open_cube(store / name)
    else:
        data = xr.open_zarr(store, group=name or None, chunks=None, decode_times=False, decode_coords="all")
    years = tuple(sorted(int(year) for year in data["year"].values.ravel()))
    if not years:
        raise DataError(f"cube {label} has 0 finished years, expected at least one; serve it when a year is whole")
    if not set(FINE_DIMS) <= set(data["land_cover"].dims):
        raise DataError(f"land_cover of {label} has the dimensions {data['land_cover'].dims}, expected time and {FINE_DIMS}")
    main = _level(store, name)
    crs = main.codes.rio.crs or WORLD
    levels = [main]
    layout = dict(group.attrs).get("multiscales", {})
    for entry in layout.get("layout", []) if isinstance(layout, dict) else []:
        asset = str(entry.get("asset", ""))
        if asset.endswith("/land_cover") and asset in group:
            levels.append(_level(store, f"{name}/{asset}".strip("/").removesuffix("/land_cover"), crs))
    levels.sort(key=lambda level: level.cell)
    fill, legend = _legend(main.codes, label)
    shares = {key: data[key] for key in ("confidence", "change_probability") if key in data}
    for key, share in shares.items():
        if share.dims != ("time", *FINE_DIMS) or share.shape != main.codes.shape:
            raise DataError(f"{key} of {label} is {share.dims} {share.shape}, expected that of land_cover {main.codes.shape}")
    rows, cols = main.codes.shape[1:]
    box = (
        main.transform.c,
        main.transform.f + rows * main.transform.e,
        main.transform.c + cols * main.transform.a,
        main.transform.f,
    )
    west, south, east, north = rasterio.warp.transform_bounds(crs, WORLD, *box) if crs != WORLD else box
    bounds = (max(west, -180.0), max(south, -90.0), min(east, 180.0), min(north, 90.0))
    shown = tuple(year for year in years if year in main.index)
    return Part(name, dict(group.attrs), shown, legend, fill, tuple(levels), crs, bounds, _zooms(levels, crs, bounds), shares)


def _level(store: Any, group: str, crs: CRS | None = None) -> Level:
    """Open the codes of one group as they are stored, with the dimensions that rio-tiler knows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Variable.s. referenced in")  # an overview need not have bounds of its years
        ds: xr.Dataset = xr.open_zarr(
            store, group=group or None, chunks=None, decode_times=False, decode_coords="all", mask_and_scale=False
        )
    codes = ds["land_cover"]
    index = {int(year): i for i, year in enumerate(ds["year"].values)}
    codes = codes.rename(dict(zip(FINE_DIMS, ("y", "x"), strict=True))).transpose("time", "y", "x")
    codes = codes.drop_vars([str(c) for c in codes.coords if c not in ("y", "x", "spatial_ref")])
    if crs is not None or codes.rio.crs is None:
        codes = codes.rio.write_crs(crs or WORLD)
    return Level(codes, index, codes.rio.transform(recalc=True))


def _legend(codes: xr.DataArray, label: str) -> tuple[Entry, tuple[Entry, ...]]:
    """Read the CF flags; what does not fit together is refused, as a wrong colour would not be seen."""
    if codes.dtype != np.uint8:
        raise DataError(f"land_cover of {label} is {codes.dtype}, expected class codes as uint8")
    values = [int(v) for v in np.atleast_1d(codes.attrs.get("flag_values", []))]
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
    entries = [Entry(v, n.replace("_", " "), c.lower()) for v, n, c in zip(values, names, colours, strict=True)]
    stored = codes.attrs.get("_FillValue", codes.encoding.get("_FillValue", codes.encoding.get("fill_value")))
    code = int(stored) if stored is not None else 0
    fill = next((e for e in entries if e.code == code), Entry(code, "not mapped", "#000000"))
    return Entry(code, fill.name, fill.colour), tuple(e for e in entries if e.code != code)


def _zooms(levels: list[Level], crs: CRS, bounds: tuple[float, float, float, float]) -> tuple[int, int]:
    """First zoom at which a tile reads no more than ``MOST_CELLS``, and the zoom at which a cell is about four pixels wide."""
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
