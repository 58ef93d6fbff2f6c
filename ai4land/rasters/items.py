"""One asset of STAC items on the fine grid.

:func:`load_asset` merges the items of one collection into one lazy layer with odc-stac. It ignores overviews: a COG's are
often nearest-neighbour and would shift an average. It refuses what odc-stac accepts silently: a half-cell shift, longitudes
of 0..360, interpolation across a nodata value that only the catalogue states, and files that are not rasters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from threading import Lock
from typing import Any, Literal

import numpy as np
import odc.stac
import pystac
import xarray as xr
from affine import Affine
from numpy.typing import DTypeLike
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox
from pyproj.exceptions import CRSError
from rasterio.errors import RasterioError

from ai4land.errors import ConfigError, DataError
from ai4land.grid import FINE_DIMS, Bounds, Grid, Window, edges
from ai4land.rasters.lattice import check_cells, check_lattice, check_longitudes, crs_of, same_crs, transform_bounds
from ai4land.rasters.read import Resampling
from ai4land.sources.check import Header, check_file, open_raster_file
from ai4land.sources.hrefs import local_path
from ai4land.sources.search import find_items, meets, split_bbox


def load_asset(
    items: Sequence[pystac.Item],
    *,
    asset: str,
    grid: Grid,
    resampling: Resampling,
    dtype: DTypeLike = "float32",
    nodata: float | None = None,
    patch_url: Callable[[str], str] | None = None,
    window: Window | None = None,
) -> xr.DataArray:
    """Merge one asset of all items into one layer on the fine cells of the grid.

    Where items overlap, the first valid value by time and id wins. The catalogue's scale and offset are applied to floats;
    a scale or offset stated only in the files is not.

    Parameters
    ----------
    items
        Items of one collection, from :func:`ai4land.sources.search.find_items`.
    resampling
        As in :func:`ai4land.rasters.read.open_raster`.
    nodata
        Nodata value of the files if the catalogue states none. An integer result uses it too, or else the catalogue's.
    patch_url
        Signs each asset's href before it is read.
    window
        Cells of the grid to load; the whole grid if None.

    Returns
    -------
    xarray.DataArray
        Lazy, ``(latitude, longitude)`` on the grid, one chunk per shard; NaN or ``nodata`` (for integers also in ``attrs``)
        where there is no value. Check the computed result with :func:`ai4land.rasters.gaps.check_any`.

    Raises
    ------
    DataError
        If there is no item or no such asset, cells are off the lattice (``exact``) or shifted by half a cell, longitudes run
        over 0..360, or interpolation would mix in a nodata value that the files do not state.
    ConfigError
        If integers are to be averaged, or their nodata value is unknown.
    """
    kind = np.dtype(dtype)
    if not items:
        raise DataError("list of STAC items is empty, expected one or more; see find_items")
    if kind.kind != "f" and resampling in ("bilinear", "average"):
        raise ConfigError(
            f"resampling of {asset} is {resampling}, expected exact, nearest, mode, min or max for whole numbers ({kind}); choose one"
        )
    for item in items:
        if asset not in item.assets:
            raise DataError(f"asset is {asset!r}, expected one of {sorted(item.assets)} of item {item.id}; choose one")
    extents = [_check_item(item, asset, grid, resampling, patch_url) for item in items]
    given = None if nodata is None or np.isnan(nodata) else float(nodata)
    stated = _stated(items[0], asset, "nodata")
    mark = given if stated is None else stated
    if mark is None and kind.kind != "f":
        raise ConfigError(f"nodata value of {asset} is not known, expected one for whole numbers ({kind}); give nodata")
    if mark is not None and resampling not in ("exact", "nearest"):
        _check_marked(items[0], asset, mark, patch_url)
    fill = float("nan") if mark is None or kind.kind == "f" else mark if given is None else given
    box = grid.fine if window is None else grid.fine[window.slices]
    method = "nearest" if resampling == "exact" else resampling
    load = partial(
        _load, asset=asset, dtype=kind, resampling=method, nodata=fill, mark=mark, side=grid.shard, patch_url=patch_url
    )
    field = load(items, box=box)
    attrs: dict[str, str | int] = {k: str(field.attrs[k]) for k in ("units",) if k in field.attrs}
    for turn, others in _across(items, extents, box):
        beyond = load(others, box=GeoBox(box.shape, Affine.translation(turn, 0) * box.affine, box.crs))
        empty = np.isnan(field) if kind.kind == "f" else field == fill
        field = field.where(~empty, beyond.data)
    if kind.kind == "f":
        field = _scaled(field, items, asset)
    else:
        attrs["nodata"] = int(fill)
    along = (slice(None), slice(None)) if window is None else window.slices
    coords = {d: grid.coords()[d][a] for d, a in zip(FINE_DIMS, along, strict=True)}
    return xr.DataArray(field.data, dims=FINE_DIMS, coords=coords, name=asset, attrs=attrs)


def _load(
    items: Sequence[pystac.Item],
    *,
    asset: str,
    box: GeoBox,
    dtype: np.dtype[Any],
    resampling: str,
    nodata: float,
    mark: float | None,
    side: int,
    patch_url: Callable[[str], str] | None,
) -> xr.DataArray:
    """Load one asset lazily onto a box with odc-stac, replacing ``mark`` (missing cells in the files) with ``nodata``."""
    names = [str(d) for d in box.dimensions]
    loaded = odc.stac.load(
        items,
        bands=[asset],
        geobox=box,
        resampling=resampling,
        dtype=dtype.name,
        nodata=nodata,
        chunks=dict.fromkeys(names, side),
        groupby=_one_layer,
        patch_url=patch_url,
        use_overviews=False,
    )
    field = loaded[asset].isel(time=0, drop=True)
    if field.odc.geobox != box or field.dims != tuple(names):
        raise DataError(f"{asset} was loaded on {field.odc.geobox}, expected the grid {box}; report this with the items")
    return field if mark is None else field.where(field != mark, np.full((), nodata, dtype=dtype))


def _across(
    items: Sequence[pystac.Item], extents: Sequence[tuple[float, float] | None], box: GeoBox
) -> Iterator[tuple[float, list[pystac.Item]]]:
    """Yield turns of a box, in degrees, and the items that it then meets beyond the dateline."""
    west, _, east, _ = edges(box)
    for turn in (-360.0, 360.0):
        others = [i for i, e in zip(items, extents, strict=True) if e and e[0] < east + turn - 1e-9 and e[1] > west + turn + 1e-9]
        if others:
            yield turn, others


def items_in(catalog: str, *, collection: str, grid: Grid, window: Window) -> list[pystac.Item]:
    """List the items of a collection that touch a window of the grid, plus a margin of one coarse cell for interpolation.

    Searches the catalogue for the whole grid once per process, and raises what
    :func:`ai4land.sources.search.find_items` raises.
    """
    with _searching:
        every = _found(catalog, collection, _degrees(grid, Window(0, 0, *grid.shape)))
    box = _degrees(grid, window)
    return [item for item in every if meets(item, [] if box is None else split_bbox(box))]


def forget_items() -> None:
    """Clear the cached searches, because catalogues grow."""
    _found.cache_clear()


_searching = Lock()
"""Lets one thread search while the others wait for its cached result."""


@lru_cache
def _found(catalog: str, collection: str, bbox: Bounds | None) -> list[pystac.Item]:
    return find_items(catalog, collection=collection, bbox=bbox)


def _degrees(grid: Grid, window: Window) -> Bounds | None:
    """Return a window's box in degrees with a coarse-cell margin (may cross the dateline); None if it has no finite box."""
    box = edges(grid.fine[window.slices].buffered(grid.coarse.affine.a))
    try:
        west, south, east, north = transform_bounds(crs_of(grid), CRS("EPSG:4326"), box)
    except RasterioError:
        return None
    if not all(map(math.isfinite, (west, south, east, north))):
        return None
    return west, max(south, -90.0), east, min(north, 90.0)


def _one_layer(item: pystac.Item, parsed: Any, index: int) -> int:
    """Group all items into one layer, whatever their times."""
    return 0


@contextmanager
def _described(item: pystac.Item, asset: str) -> Iterator[None]:
    """Turn errors in the fields of an asset into a DataError that names it."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError, CRSError) as error:
        raise DataError(
            f"fields of {asset} of item {item.id} can not be read ({error}), expected those of STAC 1.1; correct the catalogue"
        ) from error


def _stated(item: pystac.Item, asset: str, key: Literal["nodata", "scale", "offset"]) -> float | None:
    """Return what the catalogue states for an asset's first band (STAC 1.1 ``bands`` or the raster extension)."""
    fields = item.assets[asset].extra_fields
    with _described(item, asset):
        for place in (*fields.get("bands", [])[:1], *fields.get("raster:bands", [])[:1], fields):
            for name in (key, f"raster:{key}"):
                value = place.get(name)
                if value is not None and not np.isnan(float(value)):
                    return float(value)
    return None


def _lattice(item: pystac.Item, asset: str) -> tuple[CRS, Affine, tuple[int, int] | None] | None:
    """Return the reference system, transform and shape that the catalogue states; None if it does not."""
    fields = {**item.properties, **item.assets[asset].extra_fields}
    code = fields.get("proj:code") or fields.get("proj:wkt2") or fields.get("proj:epsg")
    if code is None or "proj:transform" not in fields:
        return None
    shape = fields.get("proj:shape")
    with _described(item, asset):
        transform = Affine(*(float(v) for v in fields["proj:transform"][:6]))
        return CRS(code), transform, None if shape is None else (int(shape[0]), int(shape[1]))


def _check_item(
    item: pystac.Item, asset: str, grid: Grid, resampling: str, patch_url: Callable[[str], str] | None
) -> tuple[float, float] | None:
    """Check an item against the grid; return the west and east edges of its cells if both are in degrees."""
    name = f"{asset} of item {item.id}"
    header = _checked(item, asset, patch_url)
    if header is not None:
        check_cells(header.transform, header.shape, header.crs, grid, source=name)
    box = item.bbox
    if box is not None and grid.geographic:
        east = box[2] if len(box) == 4 else box[3]
        check_longitudes((box[0], box[1], east, 0.0), grid, cell=1e-6, source=name)
    lattice = _lattice(item, asset)
    if lattice is None and header is not None and resampling == "exact":
        lattice = header.crs, header.transform, header.shape
    extent = None
    place = lattice if header is None else (header.crs, header.transform, header.shape)
    if place is not None and place[2] is not None and place[0].geographic and grid.geographic:
        extent = place[1].c, place[1].c + place[2][1] * place[1].a
    if lattice is None:
        return extent
    crs, transform, shape = lattice
    if shape is not None:
        check_cells(transform, shape, crs, grid, source=name)
    if crs.geographic and grid.geographic and shape is not None:
        west, east = transform.c, transform.c + shape[1] * transform.a
        check_longitudes((west, -90.0, east, 90.0), grid, cell=transform.a, source=name)
    if grid.fine.crs is not None and same_crs(crs, grid.fine.crs):
        check_lattice(transform, grid, source=name, exact=resampling == "exact")
    elif resampling == "exact":
        raise DataError(
            f"reference system of {name} is {crs.proj.name}, expected {grid.fine.crs} for resampling exact; choose nearest or bilinear"
        )
    return extent


def _checked(item: pystac.Item, asset: str, patch_url: Callable[[str], str] | None) -> Header | None:
    """Check the file of an asset, because odc-stac opens anything that GDAL can."""
    href = item.assets[asset].href
    path = local_path(href)
    if path is not None:
        return check_file(path)
    return check_file(patch_url(href) if patch_url else href)


def _check_marked(item: pystac.Item, asset: str, mark: float, patch_url: Callable[[str], str] | None) -> None:
    """Check that the file states its nodata value; odc-stac ignores the catalogue's when it interpolates."""
    href = item.assets[asset].href
    with open_raster_file(patch_url(href) if patch_url else href, trusted=False) as file:
        if file.nodata is None:
            raise DataError(
                f"nodata value {mark:g} of {asset} is not in the files ({item.assets[asset].href}), expected it there for "
                "interpolation; set it: gdal_edit.py -a_nodata, or choose resampling nearest"
            )


def _scaled(field: xr.DataArray, items: Sequence[pystac.Item], asset: str) -> xr.DataArray:
    """Apply the catalogue's scale and offset."""
    scaling = {(_stated(i, asset, "scale") or 1.0, _stated(i, asset, "offset") or 0.0) for i in items}
    if len(scaling) > 1:
        raise DataError(f"scale and offset of {asset} are {sorted(scaling)}, expected one pair in all items; load them apart")
    ((scale, offset),) = scaling
    return field if (scale, offset) == (1.0, 0.0) else (field * scale + offset).astype(field.dtype)
