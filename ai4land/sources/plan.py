"""Plan a fetch: the files of a source, and the STAC items that describe them.

:func:`plan_known` plans a known source, :func:`plan_stac` a collection of any STAC catalogue or API. Nothing is downloaded
here; :mod:`ai4land.sources.fetch` does that.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlparse

import pystac
import requests

from ai4land.errors import ConfigError, DataError
from ai4land.grid import Bounds
from ai4land.sources.hrefs import Beyond, origin
from ai4land.sources.known import InputSource, SourceFile, catalog_path
from ai4land.sources.mirror import file_item, safe_name
from ai4land.sources.search import Modifier, find_collection, find_items

_TYPES = {".tif": "image/tiff; application=geotiff", ".tiff": "image/tiff; application=geotiff", ".nc": "application/netcdf"}


@dataclass(frozen=True)
class Wanted:
    """One file to fetch.

    ``name`` is its path below the source's folder, ``href`` its path or URL in the catalogue; ``address`` returns the URL,
    signed if necessary. ``size`` is in bytes and ``checksum`` a hexadecimal multihash; None if unknown.
    """

    name: str
    href: str
    address: Callable[[], str]
    size: int | None
    checksum: str | None


@dataclass(frozen=True)
class Thing:
    """One item: its ``files`` by asset key; ``item`` takes the source's folder, with the files in it, and describes them."""

    item: Callable[[Path], dict[str, Any]]
    files: dict[str, Wanted]


@dataclass(frozen=True)
class Plan:
    """A source's id, collection and items, and the origin that may receive the user's token."""

    source: str
    collection: dict[str, Any]
    things: list[Thing]
    origin: str = ""


def plan_known(
    source: InputSource,
    *,
    folder: Path,
    years: Iterable[int] | None,
    bbox: Bounds | None,
    headers: Mapping[str, str],
    modifier: Modifier | None,
    timeout: float,
) -> Plan:
    """List the files of a known source.

    Raises DataError if the source has nothing in these years, its API cannot be read, or files to be added by hand are
    missing, and ConfigError if its signing service is unknown or that service's package is not installed.

    Parameters
    ----------
    folder
        The source's folder in the mirror, which holds files added by hand.
    years
        Select STAC items, and files with years. Files without years and files added by hand are always taken.
    bbox, headers, modifier, timeout
        For a STAC API; as in :func:`ai4land.sources.search.find_items`.
    """
    own = json.loads((catalog_path().parent / source.id / "collection.json").read_text(encoding="utf-8"))
    span = range(source.years[0], source.years[1] + 1)
    wanted = sorted(span if years is None else set(years) & set(span))
    if not wanted:
        raise DataError(
            f"years of {source.id} are {source.years[0]}-{source.years[1]}, expected some of those asked for; change them"
        )
    access = source.access
    if access.kind == "stac":
        sign = modifier or signer(access.signing)
        options: dict[str, Any] = {"years": wanted, "bbox": bbox, "headers": headers, "modifier": sign, "timeout": timeout}
        plan = plan_stac(source.id, catalog=access.api, collection=access.collection, assets=[access.asset], **options)
        return Plan(source.id, own, plan.things, plan.origin)
    if access.kind == "manual":
        return Plan(source.id, own, _by_hand(source, folder))
    files = [f for f in access.files if f.years is None or any(f.years[0] <= y <= f.years[1] for y in wanted)]
    leaves = Counter(_leaf(f.href) for f in access.files)
    things = [_thing_of(source, f, _leaf(f.href) if leaves[_leaf(f.href)] == 1 else f.key + _suffix(f.href)) for f in files]
    if not things:
        raise DataError(f"{source.id} has no file of the years asked for, expected some; change them")
    return Plan(source.id, own, things)


def _thing_of(source: InputSource, file: SourceFile, name: str) -> Thing:
    name = safe_name(name)
    describe = partial(_describe, source, file.key, name, file.years or source.years, file.media_type, file.title)
    return Thing(describe, {"data": Wanted(name, file.href, lambda: file.href, file.size, file.checksum)})


def _describe(
    source: InputSource, key: str, name: str, years: tuple[int, int], media_type: str, title: str, folder: Path
) -> dict[str, Any]:
    return file_item(key, path=folder / name, bbox=source.bbox, years=years, media_type=media_type, title=title)


def _by_hand(source: InputSource, folder: Path) -> list[Thing]:
    """List the files that a user has put into a source's folder."""
    access = source.access
    things = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        matches = any(fnmatch.fnmatch(path.name, p) for p in access.patterns)
        if not matches or path.is_symlink() or not path.is_file() or path.suffix in (".part", ".json"):
            continue
        numbers = {int(n) for n in re.findall(r"(?<!\d)\d{3,4}(?!\d)", path.name)}
        found = [n for n in numbers if source.years[0] <= n <= source.years[1]]
        years = (found[0], found[0]) if len(found) == 1 else source.years
        kind = _TYPES.get(path.suffix.lower(), "application/octet-stream")
        key = relative.rpartition(".")[0]
        describe = partial(_describe, source, key, relative, years, kind, path.name)
        things.append(Thing(describe, {"data": Wanted(relative, str(path), lambda: "", None, None)}))
    if not things:
        raise DataError(
            f"{source.id} is got by hand, and no file {' or '.join(access.patterns)} is in {folder}; put it there and fetch again:\n"
            f"  {access.steps}"
        )
    return things


def plan_stac(
    source: str,
    *,
    catalog: str,
    collection: str,
    years: Iterable[int] | None,
    bbox: Bounds | None,
    assets: Sequence[str],
    headers: Mapping[str, str],
    modifier: Modifier | None,
    timeout: float,
    beyond: Beyond = "none",
) -> Plan:
    """List the files of a collection of a STAC catalogue or API.

    Raises DataError if the catalogue cannot be read, nothing is found, or an item lacks one of the assets.

    Parameters
    ----------
    source
        Collection id in the mirror.
    catalog, collection, years, bbox, headers, timeout, beyond
        As in :func:`ai4land.sources.search.find_items`.
    assets
        Asset keys; if empty, those with the role ``data``, or all if none has it.
    modifier
        Signs an item; called before each attempt to download one of its assets.
    """
    about = find_collection(catalog, collection=collection, headers=headers, timeout=timeout, beyond=beyond)
    items = find_items(catalog, collection=collection, bbox=bbox, years=years, headers=headers, timeout=timeout, beyond=beyond)
    things = []
    for item in items:
        keys = (
            list(assets)
            or [k for k, a in item.assets.items() if isinstance(a.roles, list) and "data" in a.roles]
            or list(item.assets)
        )
        lacking = sorted(set(keys) - set(item.assets))
        if lacking:
            raise DataError(f"assets are {lacking}, expected some of {sorted(item.assets)} of item {item.id}; choose some")
        place = safe_name(item.id)
        content = {**item.to_dict(include_self_link=False, transform_hrefs=False), "assets": {}}
        content["assets"] = {k: item.assets[k].to_dict() for k in keys}
        files = {}
        for key in keys:
            asset = item.assets[key]
            more = asset.extra_fields
            name = f"{place}/{safe_name(key + _suffix(asset.href))}"
            checksum = more.get("file:checksum")
            files[key] = Wanted(
                name,
                asset.href,
                partial(_signed, item, key, modifier),
                _whole(more.get("file:size")),
                None if checksum is None else str(checksum),
            )
        things.append(Thing(partial(_as_found, content), files))
    return Plan(source, about, things, origin(catalog))


def _as_found(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    return content


def _signed(item: pystac.Item, key: str, modifier: Modifier | None) -> str:
    if modifier is None:
        return str(item.assets[key].href)
    copied = item.clone()
    try:
        return str((modifier(copied) or copied).assets[key].href)
    except requests.RequestException:
        raise
    except Exception as error:
        raise DataError(
            f"item {item.id} can not be signed ({error}), expected an item with its assets; look at the modifier"
        ) from error


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _leaf(href: str) -> str:
    return PurePosixPath(unquote(urlparse(href).path)).name


def _suffix(href: str) -> str:
    found = PurePosixPath(_leaf(href)).suffix
    return found if re.fullmatch(r"\.[A-Za-z0-9]{1,8}", found) else ".bin"


def signer(name: str) -> Modifier | None:
    """Return the function that signs items for a service (:attr:`ai4land.sources.known.Access.signing`); None if empty.

    Raises ConfigError if the service is unknown or its package is not installed.
    """
    if not name:
        return None
    if name != "planetary_computer":
        raise ConfigError(f"signing is {name!r}, expected planetary_computer or none; choose one")
    try:
        return importlib.import_module(name).sign
    except ImportError as error:
        raise ConfigError(
            "package planetary-computer is not installed, expected it for signing; install it: pip install planetary-computer"
        ) from error
