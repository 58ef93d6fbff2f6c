"""Find the items of a STAC collection.

:func:`find_items` walks a static catalogue (a JSON file, by path or URL) or searches an API. :mod:`ai4land.sources.hrefs`
limits what a catalogue may point to.
"""

from __future__ import annotations

import datetime as dt
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pystac
from pystac_client import Client
from pystac_client.exceptions import APIError
from pystac_client.warnings import FallbackToPystac

from ai4land.errors import ConfigError, DataError
from ai4land.grid import Bounds
from ai4land.sources.hrefs import Beyond, CatalogIO, Reach, local_path

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
        Path or URL of a catalog.json or collection.json, or URL of an API's landing page.
    collection
        Collection id.
    bbox
        West, south, east, north in degrees; selects items that touch it. A box across the dateline has ``west > east`` or
        extends beyond 180 or -180.
    years
        Selects items whose time overlaps one of these years, and items without a time.
    modifier
        Signs each item, in place or by returning a new one.
    headers
        HTTP headers, such as a bearer token, sent only to the catalogue's origin.
    timeout
        Seconds per request.
    beyond
        How far links and assets of a trusted catalogue may reach. A local one stays below the parent of its folder, unless
        ``hosts`` (also the web) or ``all`` (also any file). A remote one may name local files only with ``all``.

    Returns
    -------
    list of pystac.Item
        Unique, sorted by id, with absolute asset hrefs (``file://`` or a URL).

    Raises
    ------
    DataError
        If the catalogue cannot be read or has no such collection, no item matches box and years, or a link or asset is out
        of the catalogue's reach.
    ConfigError
        If south is above north in ``bbox``.
    """
    boxes = [] if bbox is None else split_bbox(bbox)
    wanted = None if years is None else sorted({int(y) for y in years})
    reach = Reach.of(catalog, beyond=beyond)
    with _reading(catalog):
        found = _search(str(catalog), collection, boxes, wanted, CatalogIO(reach, headers=headers, timeout=timeout))
        kept = {i.id: i for i in found if meets(i, boxes) and _within(i, wanted)}
        items = [item for _, item in sorted(kept.items())]
        for item in items:
            _absolute(item, reach)
    if not items:
        raise DataError(
            f"collection {collection} of {catalog} has no item that meets bbox {bbox} and years {_span(wanted)} "
            f"({len(found)} in all), expected some; change them"
        )
    _log.info("%s: %d items of %s", catalog, len(items), collection)
    return items if modifier is None else [modifier(item) or item for item in items]


def find_collection(
    catalog: str | Path,
    *,
    collection: str,
    headers: Mapping[str, str] | None = None,
    timeout: float | None = 60.0,
    beyond: Beyond = "none",
) -> dict[str, Any]:
    """Read the description of a collection, with its links unchanged; parameters as in :func:`find_items`.

    Raises DataError if the catalogue cannot be read or has no such collection.
    """
    io = CatalogIO(Reach.of(catalog, beyond=beyond), headers=headers, timeout=timeout)
    with _reading(catalog), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackToPystac)
        found = _collection(*_open(str(catalog), io), str(catalog), collection)
        return found.to_dict(include_self_link=False, transform_hrefs=False)


def split_bbox(bbox: Bounds) -> list[Bounds]:
    """Split a box in degrees at the dateline into boxes within -180..180; ConfigError if south is above north.

    >>> split_bbox((170, -5, -170, 5)), split_bbox((-190, -5, -170, 5))
    ([(170, -5, 180.0, 5), (-180.0, -5, -170, 5)], [(170, -5, 180.0, 5), (-180.0, -5, -170, 5)])
    """
    west, south, east, north = bbox
    if south > north:
        raise ConfigError(f"bbox is {bbox}, expected south < north; swap them")
    if west <= east:
        if east - west >= 360:
            return [(-180.0, south, 180.0, north)]
        turns = math.floor((west + 180) / 360) * 360
        west, east = west - turns, east - turns
        if east <= 180:
            return [(west, south, east, north)]
        east -= 360
    return [(west, south, 180.0, north), (-180.0, south, east, north)]


@contextmanager
def _reading(catalog: str | Path) -> Iterator[None]:
    """Turn errors of reading a catalogue into a DataError that names it."""
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
        # pystac-client warns that it walks a static catalogue, which is intended.
        warnings.simplefilter("ignore", FallbackToPystac)
        found = _collection(root, api, catalog, collection)
        if not api:
            return list(found.get_items(recursive=True))
    when = None if years is None else f"{years[0]:04d}-01-01T00:00:00Z/{years[-1]:04d}-12-31T23:59:59Z"
    areas: list[Bounds | None] = [*boxes] or [None]
    client: Any = root
    return [i for box in areas for i in client.search(collections=[collection], bbox=box, datetime=when).items()]


def _open(catalog: str, io: CatalogIO) -> tuple[pystac.Catalog, bool]:
    """Open a catalogue; also return whether it is an API."""
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


def meets(item: pystac.Item, boxes: list[Bounds]) -> bool:
    """Whether an item touches any of the boxes; true if the item has no box or there are no boxes."""
    if not boxes or item.bbox is None:
        return True
    box = item.bbox if len(item.bbox) == 4 else [*item.bbox[:2], *item.bbox[3:5]]
    parts = split_bbox((box[0], box[1], box[2], box[3]))
    return any(a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3] for a in boxes for b in parts)


def years_of_item(item: pystac.Item) -> tuple[int | None, int | None]:
    """Return an item's first and last year, or None; an end at the first instant of a year counts as the year before."""
    start = item.common_metadata.start_datetime or item.datetime
    end = item.common_metadata.end_datetime or item.datetime or start
    if start is not None and end is not None and end > start and (end.month, end.day, end.time()) == (1, 1, dt.time()):
        end -= dt.timedelta(microseconds=1)
    return None if start is None else start.year, None if end is None else end.year


def _within(item: pystac.Item, years: list[int] | None) -> bool:
    start, end = years_of_item(item)
    if years is None or start is None or end is None:
        return True
    return any(start <= y <= end for y in years)


def _span(years: list[int] | None) -> str:
    return "any" if years is None else ", ".join(map(str, years[:20]))


def _absolute(item: pystac.Item, reach: Reach) -> None:
    """Make asset hrefs absolute URLs and check them; odc-stac would resolve a bare path against an API's URL."""
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
