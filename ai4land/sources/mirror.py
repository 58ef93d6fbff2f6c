"""A mirror: a folder of files with its own static STAC catalogue, which can be copied to a place without a network.

Each source has a folder with ``collection.json``, one folder per item, and ``manifest.json`` with the size, SHA-256 and
origin of every file. All hrefs are relative, and file names are sanitised so that nothing is written outside the mirror.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import rasterio.warp

from ai4land.errors import DataError
from ai4land.places import Unlockable, lock, write_atomically
from ai4land.sources.check import open_raster_file
from ai4land.sources.download import Stored

FILE = "https://stac-extensions.github.io/file/v2.1.0/schema.json"
PROJECTION = "https://stac-extensions.github.io/projection/v2.0.0/schema.json"
_KEPT_LINKS = ("license", "cite-as", "about", "via", "describedby", "derived_from")
_OWN = ("collection.json", "manifest.json", "catalog.json")
_LONGEST_NAME = 100
_ID = "ai4land-mirror"
_log = logging.getLogger(__name__)


def safe_name(text: str) -> str:
    """Turn an id into a file name of letters, digits, ``.-_``, without a leading dot; different ids give different names.

    >>> safe_name("S2_31UFS.2020"), safe_name("../../etc/passwd")
    ('S2_31UFS.2020', 'etc_passwd-3754d6cb')
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", text)[:_LONGEST_NAME].lstrip("._-")
    if name and name == text and name not in _OWN:
        return name
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}-{mark}.{suffix}" if dot and re.fullmatch(r"[A-Za-z0-9]{1,6}", suffix) else f"{name}-{mark}"


def plain_href(href: str) -> str:
    """Strip user, query and fragment from a URL, because they may hold secrets.

    >>> plain_href("https://me:secret@a.org/b.tif?sig=secret")
    'https://a.org/b.tif'
    """
    parts = urlsplit(href)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def inside(folder: Path, name: str) -> Path:
    """Return the path of ``name`` in a folder; raise DataError if a symbolic link leads out of the folder."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{path} leads to {path.resolve()}, expected a place below {folder}; remove the link")
    return path


def check_ours(mirror: Path, folder: Path) -> None:
    """Raise DataError if the mirror or a source's folder in it holds a catalogue that AI4Land did not write."""
    catalog = mirror / "catalog.json"
    if catalog.is_file() and f'"id": "{_ID}"' not in catalog.read_text(encoding="utf-8", errors="replace"):
        raise DataError(f"{catalog} is another catalogue, expected that of a mirror or none; choose another folder")
    if (folder / "collection.json").is_file() and not (folder / "manifest.json").is_file():
        raise DataError(f"{folder} holds a collection that is not of a mirror, expected none; choose another folder")


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Lock a folder for this process; warn and continue if the file system has no locks.

    Raises DataError if another process holds the lock and ``wait`` is false.
    """
    try:
        file = lock(folder / ".lock", wait=wait)
    except BlockingIOError as error:
        raise DataError(f"{folder} is being filled by another process, expected none; wait until that ends") from error
    except Unlockable as error:
        _log.warning("%s; fill it by one process at a time", error)
        yield
        return
    with file:
        yield


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Read href, size and SHA-256 of a source's files by path below its folder; empty if there is no valid manifest."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        return {str(name): dict(entry) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def file_item(
    key: str, *, path: Path, bbox: tuple[float, float, float, float], years: tuple[int, int], media_type: str, title: str
) -> dict[str, Any]:
    """Describe one file as a STAC item with the asset ``data``; a GeoTIFF gives its own place, types and nodata.

    Raises DataError if a GeoTIFF cannot be read.
    """
    asset: dict[str, Any] = {"type": media_type, "title": title, "roles": ["data"]}
    extensions = []
    if media_type.startswith("image/tiff"):
        with open_raster_file(path, trusted=False) as file:
            nodata = [None if v is None else "nan" if v != v else v for v in file.nodatavals]
            asset["bands"] = [
                {"name": d or f"band_{n}", "data_type": t, **({} if v is None else {"nodata": v})}
                for n, (d, t, v) in enumerate(zip(file.descriptions, file.dtypes, nodata, strict=True), 1)
            ]
            if file.crs is not None:
                epsg = file.crs.to_epsg()
                place = {"proj:code": f"EPSG:{epsg}"} if epsg else {"proj:code": None, "proj:wkt2": file.crs.to_wkt()}
                asset |= {**place, "proj:shape": list(file.shape), "proj:transform": list(file.transform)[:6]}
                west, south, east, north = rasterio.warp.transform_bounds(file.crs, "EPSG:4326", *file.bounds)
                bbox = (max(west, -180.0), max(south, -90.0), min(east, 180.0), min(north, 90.0))
                extensions.append(PROJECTION)
    west, south, east, north = bbox
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    first, last = (f"{years[0]:04d}-01-01T00:00:00Z", f"{years[1]:04d}-12-31T23:59:59Z")
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": extensions,
        "id": key,
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "bbox": list(bbox),
        "properties": {"title": title, "datetime": first, "start_datetime": first, "end_datetime": last},
        "assets": {"data": asset},
        "links": [],
    }


def write_item(folder: Path, item: Mapping[str, Any], files: Mapping[str, tuple[str, Stored]], *, collection: str) -> None:
    """Write an item into a source's folder, replacing its links.

    ``files`` maps asset keys to paths below the folder, sizes and checksums. Only assets in ``files``, or written before and
    still there, are kept.
    """
    name = safe_name(str(item["id"]))
    place = inside(folder, f"{name}/{name}.json")
    assets = _assets_before(place)
    for key, (path, stored) in files.items():
        href = path.removeprefix(f"{name}/") if path.startswith(f"{name}/") else f"../{path}"
        assets[key] = {**item["assets"][key], "href": f"./{href}", "file:size": stored.size, "file:checksum": stored.multihash}
    links = [
        {"rel": "root", "href": "../../catalog.json", "type": "application/json"},
        {"rel": "parent", "href": "../collection.json", "type": "application/json"},
        {"rel": "collection", "href": "../collection.json", "type": "application/json"},
    ]
    extensions = sorted({*item.get("stac_extensions", []), FILE})
    content = {**item, "stac_extensions": extensions, "collection": collection, "assets": assets, "links": links}
    write_json(place, content)


def _assets_before(place: Path) -> dict[str, Any]:
    """Return the assets of a previously written item whose files still exist."""
    try:
        assets = json.loads(place.read_text(encoding="utf-8"))["assets"]
        return {k: a for k, a in assets.items() if (place.parent / a["href"]).is_file()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_collection(folder: Path, collection: Mapping[str, Any]) -> None:
    """Write a source's collection, with a link to every item in its folder."""
    items = sorted(p.parent.name for p in folder.glob("*/*.json") if p.stem == p.parent.name)
    kept = [k for k in collection.get("links", []) if k.get("rel") in _KEPT_LINKS and str(k.get("href", "")).startswith("http")]
    links = [
        {"rel": "root", "href": "../catalog.json", "type": "application/json"},
        {"rel": "parent", "href": "../catalog.json", "type": "application/json"},
        *kept,
        *({"rel": "item", "href": f"./{name}/{name}.json", "type": "application/geo+json"} for name in items),
    ]
    extensions = [e for e in collection.get("stac_extensions", []) if e != FILE]
    write_json(
        folder / "collection.json",
        {**{k: v for k, v in collection.items() if k != "assets"}, "stac_extensions": extensions, "links": links},
    )


def write_catalog(mirror: Path) -> Path:
    """Write a mirror's catalogue, with a link to every source in it; return its path."""
    with locked(mirror, wait=True):
        sources = sorted(p.parent.name for p in mirror.glob("*/collection.json"))
        links = [{"rel": "root", "href": "./catalog.json", "type": "application/json"}]
        links += [{"rel": "child", "href": f"./{name}/collection.json", "type": "application/json"} for name in sources]
        content = {
            "type": "Catalog",
            "stac_version": "1.1.0",
            "id": _ID,
            "title": "Mirror of inputs",
            "description": "Files fetched by AI4Land, with the catalogue that they are read by.",
            "links": links,
        }
        write_json(mirror / "catalog.json", content)
    return mirror / "catalog.json"
