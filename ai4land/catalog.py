"""Layers from STAC: find the items of a collection, and bring one of their assets onto the fine grid.

:func:`find_items` is the same for a static catalogue (a JSON file, by path or URL, that is walked) and for an API (that is
searched). :func:`load_asset` merges the items of one collection into one lazy layer with odc-stac, without overviews: those
of a COG are nearest-neighbour and would shift an average. What odc-stac takes without a word is refused: a layer half a cell
off, longitudes of 0..360, a nodata value that only the catalogue knows, a file that is none of a raster. What a catalogue may
point to is decided by :mod:`ai4land.hrefs`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import odc.stac
import pystac
import rasterio
import xarray as xr
from affine import Affine
from numpy.typing import DTypeLike
from odc.geo.crs import CRS
from pystac_client import Client
from pystac_client.exceptions import APIError
from pystac_client.warnings import FallbackToPystac

from ai4land.errors import ConfigError, DataError
from ai4land.filecheck import check_blocks, check_file
from ai4land.grid import FINE_DIMS, Grid
from ai4land.hrefs import Beyond, CatalogIO, Reach, local_path
from ai4land.raster import Bounds, Resampling, check_cells, check_lattice, check_longitudes, same_crs
from ai4land.rasterfile import reading

_log = logging.getLogger(__name__)

_UNREADABLE = (
    OSError,
    pystac.STACError,
    pystac.STACTypeError,
    APIError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
)

Modifier = Callable[[pystac.Item], pystac.Item | None]


def find_items(
    catalog: str | Path,
    *,
    collection: str,
    bbox: Bounds | None = None,
    years: Iterable[int] | None = None,
    modifier: Modifier | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float | None = 60.0,
    beyond: Beyond = "none",
) -> list[pystac.Item]:
    """Find the items of a collection in a static catalogue or an API.

    Parameters
    ----------
    catalog
        Path or URL of a catalog.json or collection.json, or URL of the landing page of an API.
    collection
        Its id.
    bbox
        West, south, east, north in degrees; items that touch it are found. A box that crosses the dateline has
        ``west > east``, or reaches beyond 180.
    years
        Items whose time touches one of these years, and items without time.
    modifier
        Called with each item, for signing; changes it in place or gives another.
    headers
        HTTP headers, such as a bearer token, for the host of the catalogue.
    timeout
        Of one request, in seconds.
    beyond
        How far links and assets of a catalogue may reach that you trust: those of a local one stay below the folder above
        its own, if not ``hosts`` (the web as well) or ``all`` (any file as well); those of a remote one name no local file, if not ``all``.

    Returns
    -------
    list of pystac.Item
        Each once, sorted by id, with absolute asset hrefs (``file://`` or a URL).

    Raises
    ------
    DataError
        If the catalogue can not be read, has no such collection, no item meets the box and the years, or a link or an
        asset leads where the catalogue may not reach.
    """
    boxes = [] if bbox is None else split_bbox(bbox)
    wanted = None if years is None else sorted({int(y) for y in years})
    reach = Reach.of(catalog, beyond=beyond)
    with _reading(catalog):
        found = _search(str(catalog), collection, boxes, wanted, CatalogIO(reach, headers=headers, timeout=timeout))
    kept = {i.id: i for i in found if _meets(i, boxes) and _within(i, wanted)}
    if not kept:
        raise DataError(
            f"collection {collection} of {catalog} has no item that meets bbox {bbox} and years {_span(wanted)} "
            f"({len(found)} in all), expected some; change them"
        )
    items = []
    for _, item in sorted(kept.items()):
        _absolute(item, reach)
        items.append((modifier(item) if modifier else None) or item)
    _log.info("%s: %d items of %s", catalog, len(items), collection)
    return items


def find_collection(
    catalog: str | Path,
    *,
    collection: str,
    headers: Mapping[str, str] | None = None,
    timeout: float | None = 60.0,
    beyond: Beyond = "none",
) -> dict[str, Any]:
    """Read what a catalogue or an API says about a collection, with its links as they are.

    Parameters
    ----------
    catalog, collection, headers, timeout, beyond
        As in :func:`find_items`.

    Raises
    ------
    DataError
        If the catalogue can not be read or has no such collection.
    """
    io = CatalogIO(Reach.of(catalog, beyond=beyond), headers=headers, timeout=timeout)
    with _reading(catalog), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackToPystac)
        found = _collection(*_open(str(catalog), io), str(catalog), collection)
        return found.to_dict(include_self_link=False, transform_hrefs=False)


def load_asset(
    items: Sequence[pystac.Item],
    *,
    asset: str,
    grid: Grid,
    resampling: Resampling,
    dtype: DTypeLike = "float32",
    nodata: float | None = None,
    patch_url: Callable[[str], str] | None = None,
) -> xr.DataArray:
    """Merge one asset of all items into one layer on the fine cells of the grid.

    Where items overlap, the first valid value by time and id is taken. Scale and offset that the catalogue states are
    applied to floats; those that only the files state are not.

    Parameters
    ----------
    items
        Of one collection, from :func:`find_items`.
    asset
        Key of the asset.
    grid
        The target.
    resampling
        As in :func:`ai4land.raster.open_raster`.
    dtype
        Of the result.
    nodata
        Of the result for whole numbers; of the files for floats, where the catalogue does not say. NaN is no value.
    patch_url
        Called with the href of every asset before it is read, for signing.

    Returns
    -------
    xarray.DataArray
        ``(latitude, longitude)`` with the coordinates of the grid, lazy, one chunk a shard; NaN or ``nodata`` (also in
        ``attrs``) where there is no value. :func:`ai4land.raster.check_any` tells an empty one once it is computed.

    Raises
    ------
    DataError
        If there is no item or no such asset, the cells do not lie on the lattice (``exact``) or lie half a cell off it,
        longitudes run over 0..360, or interpolation would mix in a nodata value that the files do not state.
    ConfigError
        If codes are to be averaged, or the nodata value of codes is not known.
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
        _check_item(item, asset, grid, resampling, patch_url)
    given = None if nodata is None or np.isnan(nodata) else float(nodata)
    stated = _stated(items[0], asset, "nodata")
    mark = given if stated is None else stated
    if mark is None and kind.kind != "f":
        raise ConfigError(f"nodata value of {asset} is not known, expected one for whole numbers ({kind}); give nodata")
    if mark is not None and resampling not in ("exact", "nearest"):
        _check_marked(items[0], asset, mark, patch_url)
    fill = float("nan") if mark is None or kind.kind == "f" else mark if given is None else given
    names = [str(d) for d in grid.fine.dimensions]
    loaded = odc.stac.load(
        items,
        bands=[asset],
        geobox=grid.fine,
        resampling="nearest" if resampling == "exact" else resampling,
        dtype=kind.name,
        nodata=fill,
        chunks=dict.fromkeys(names, grid.shard),
        groupby=_one_layer,
        patch_url=patch_url,
        use_overviews=False,
    )
    field = loaded[asset].isel(time=0, drop=True)
    if field.odc.geobox != grid.fine or field.dims != tuple(names):
        raise DataError(f"{asset} was loaded on {field.odc.geobox}, expected the grid {grid.fine}; report this with the items")
    attrs: dict[str, str | int] = {k: str(field.attrs[k]) for k in ("units",) if k in field.attrs}
    if mark is not None:
        field = field.where(field != mark, np.full((), fill, dtype=kind))
    if kind.kind == "f":
        field = _scaled(field, items, asset)
    else:
        attrs["nodata"] = int(fill)
    coords = {d: grid.coords()[d] for d in FINE_DIMS}
    return xr.DataArray(field.data, dims=FINE_DIMS, coords=coords, name=asset, attrs=attrs)


def split_bbox(bbox: Bounds) -> list[Bounds]:
    """Cut a box in degrees at the dateline.

    >>> split_bbox((170, -5, -170, 5)), split_bbox((170, -5, 190, 5))
    ([(170, -5, 180.0, 5), (-180.0, -5, -170, 5)], [(170, -5, 180.0, 5), (-180.0, -5, -170, 5)])
    """
    west, south, east, north = bbox
    if south > north:
        raise ConfigError(f"bbox is {bbox}, expected south < north; swap them")
    if east > 180 and west < 180:
        east -= 360
        if east >= west:
            return [(-180.0, south, 180.0, north)]
    if west <= east:
        return [bbox]
    return [(west, south, 180.0, north), (-180.0, south, east, north)]


# -- finding ------------------------------------------------------------------------------------------------------------


@contextmanager
def _reading(catalog: str | Path) -> Iterator[None]:
    """Turn the errors of reading a catalogue into a DataError that names it."""
    try:
        yield
    except _UNREADABLE as error:
        cause: BaseException = error
        while not isinstance(cause, DataError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, DataError):
            raise cause from None
        told = error if cause is error else f"{error}: {cause}"
        raise DataError(
            f"STAC catalogue {catalog} can not be read ({told}), expected a STAC JSON or API; check its address"
        ) from error


def _search(catalog: str, collection: str, boxes: list[Bounds], years: list[int] | None, io: CatalogIO) -> list[pystac.Item]:
    root, api = _open(catalog, io)
    with warnings.catch_warnings():
        # A static catalogue is walked: that is what pystac-client warns about.
        warnings.simplefilter("ignore", FallbackToPystac)
        found = _collection(root, api, catalog, collection)
        if not api:
            return list(found.get_items(recursive=True))
    when = None if years is None else f"{years[0]:04d}-01-01T00:00:00Z/{years[-1]:04d}-12-31T23:59:59Z"
    areas: list[Bounds | None] = [*boxes] or [None]
    client: Any = root
    return [i for box in areas for i in client.search(collections=[collection], bbox=box, datetime=when).items()]


def _open(catalog: str, io: CatalogIO) -> tuple[pystac.Catalog, bool]:
    """Open a catalogue, and tell whether it is an API."""
    local = local_path(catalog)
    href = catalog if local is None else str(local.resolve())
    landing = io.read_json(href)
    rels = {link.get("rel") for link in landing.get("links", [])}
    if "conformsTo" in landing or "search" in rels:
        return Client.open(href, stac_io=io), True
    root = pystac.read_dict(landing, href=href, stac_io=io)
    if not isinstance(root, pystac.Catalog):
        raise DataError(f"{catalog} is a STAC {type(root).__name__}, expected a catalogue or a collection; give its catalog.json")
    return root, False


def _collection(root: pystac.Catalog, api: bool, catalog: str, collection: str) -> pystac.Collection:
    below = [root] if isinstance(root, pystac.Collection) else []
    every = {c.id: c for c in (*below, *(root.get_collections() if api else root.get_all_collections()))}
    if collection not in every:
        raise DataError(f"collection is {collection!r}, expected one of {sorted(every)} of {catalog}; choose one")
    return every[collection]


def _meets(item: pystac.Item, boxes: list[Bounds]) -> bool:
    if not boxes or item.bbox is None:
        return True
    box = item.bbox if len(item.bbox) == 4 else [*item.bbox[:2], *item.bbox[3:5]]
    parts = split_bbox((box[0], box[1], box[2], box[3]))
    return any(a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3] for a in boxes for b in parts)


def _within(item: pystac.Item, years: list[int] | None) -> bool:
    start = item.common_metadata.start_datetime or item.datetime
    end = item.common_metadata.end_datetime or item.datetime or start
    if years is None or start is None or end is None:
        return True
    return any(start.year <= y <= end.year for y in years)


def _span(years: list[int] | None) -> str:
    return "any" if years is None else ", ".join(map(str, years[:20]))


def _absolute(item: pystac.Item, reach: Reach) -> None:
    """Make asset hrefs absolute URLs that the catalogue may point to; odc-stac would resolve a bare path against the URL of an API."""
    for key, entry in item.assets.items():
        href: str | None = entry.href
        if "://" not in entry.href and not Path(entry.href).is_absolute():
            href = entry.get_absolute_href()
            if href is None:
                raise DataError(
                    f"asset {entry.href} of item {item.id} is relative and the item has no address; write absolute hrefs"
                )
        reach.check(str(href), what=f"asset {key} of item {item.id}")
        path = None if href is None or "://" in href else Path(href).as_posix()
        entry.href = str(href) if path is None else f"file://{path}"


# -- loading ------------------------------------------------------------------------------------------------------------


def _one_layer(item: pystac.Item, parsed: Any, index: int) -> int:
    """Group all items into one layer, whatever their times."""
    return 0


def _stated(item: pystac.Item, asset: str, key: Literal["nodata", "scale", "offset"]) -> float | None:
    """Value that the catalogue states for the first band of an asset (STAC 1.1 ``bands``, or the raster extension)."""
    fields = item.assets[asset].extra_fields
    for place in (*fields.get("bands", [])[:1], *fields.get("raster:bands", [])[:1], fields):
        for name in (key, f"raster:{key}"):
            value = place.get(name)
            if value is not None and not np.isnan(float(value)):
                return float(value)
    return None


def _lattice(item: pystac.Item, asset: str) -> tuple[CRS, Affine, tuple[int, int] | None] | None:
    """Reference system, transform and shape that the catalogue states."""
    fields = {**item.properties, **item.assets[asset].extra_fields}
    code = fields.get("proj:code") or fields.get("proj:wkt2") or fields.get("proj:epsg")
    if code is None or "proj:transform" not in fields:
        return None
    shape = fields.get("proj:shape")
    return CRS(code), Affine(*fields["proj:transform"][:6]), None if shape is None else (int(shape[0]), int(shape[1]))


def _check_item(item: pystac.Item, asset: str, grid: Grid, resampling: str, patch_url: Callable[[str], str] | None) -> None:
    name = f"{asset} of item {item.id}"
    path = local_path(item.assets[asset].href)
    header = None if path is None else check_file(path)
    if header is not None:
        check_cells(header.transform, header.shape, header.crs, grid, source=name)
    box = item.bbox
    if box is not None and grid.geographic:
        east = box[2] if len(box) == 4 else box[3]
        check_longitudes((box[0], box[1], east, 0.0), grid, cell=1e-6, source=name)
    lattice = _lattice(item, asset)
    if lattice is None and resampling == "exact":
        with _opened(item, asset, patch_url) as file:
            lattice = CRS(file.crs.to_wkt()), file.transform, file.shape
    if lattice is None:
        return
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


def _opened(item: pystac.Item, asset: str, patch_url: Callable[[str], str] | None) -> Any:
    href = item.assets[asset].href
    with reading(href):
        file = rasterio.open(patch_url(href) if patch_url else href)
    check_blocks(file, href)
    return file


def _check_marked(item: pystac.Item, asset: str, mark: float, patch_url: Callable[[str], str] | None) -> None:
    """Check that the file itself states its nodata value: odc-stac does not hand the catalogue's on to interpolation."""
    with _opened(item, asset, patch_url) as file:
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
