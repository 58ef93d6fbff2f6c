"""The known sources: what they are, their licences, how to cite them and how to get them.

The package ships them as a static STAC catalogue (``catalogs/inputs``), one Collection per source. Three fields are its own:
``ai4land:legend`` (class scheme of a land-cover map), ``ai4land:crosswalk`` (built-in crosswalks from its states) and
``ai4land:access`` (how to get it). The assets' ``start_datetime`` and ``end_datetime`` give the years of the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from ai4land.errors import ConfigError
from ai4land.places import shipped

OTHER = "other"
"""STAC's licence for data without an SPDX id or with several licences."""
_FREE = ("CC0-1.0", "CC-PDM-1.0")
_BY = "CC-BY-4.0"
_SHARE_ALIKE = "CC-BY-SA-4.0"


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    ``key`` is the asset key. ``years`` are the first and last year, or None if the file covers all years of the source or
    has none. ``size`` is in bytes and ``checksum`` a hexadecimal multihash; None if unknown.
    """

    key: str
    href: str
    media_type: str
    title: str
    years: tuple[int, int] | None
    size: int | None
    checksum: str | None


@dataclass(frozen=True)
class Access:
    """How to get the files of a source.

    Attributes
    ----------
    kind
        ``url`` (download ``files``), ``stac`` (search ``api``) or ``manual`` (follow ``steps``).
    api, collection, asset
        URL of a STAC API, collection id and asset key.
    signing
        Service that signs URLs: ``planetary_computer`` or empty.
    page, steps, patterns
        Web page, what to do there, and the names (with wildcards) of files to add by hand.
    """

    kind: Literal["url", "stac", "manual"]
    api: str = ""
    collection: str = ""
    asset: str = ""
    signing: str = ""
    page: str = ""
    steps: str = ""
    patterns: tuple[str, ...] = ()
    files: tuple[SourceFile, ...] = ()


@dataclass(frozen=True)
class InputSource:
    """One source.

    Attributes
    ----------
    licence, licence_url
        SPDX id or ``other``, and the page with the text or terms.
    citation
        In the producers' wording.
    doi
        DOI of the data, or else of the publication that describes them; may be empty.
    providers
        Names of producers, processors and hosts.
    years, bbox
        First and last year; west, south, east, north in degrees.
    legend
        Class scheme of a land-cover map, for :func:`ai4land.legend.load_legend`; None for other data.
    crosswalks
        Built-in crosswalks from its states, for :func:`ai4land.crosswalk.load_crosswalk`.
    page
        Web page about the source; may be empty.
    """

    id: str
    title: str
    description: str
    licence: str
    licence_url: str
    citation: str
    doi: str
    providers: tuple[str, ...]
    years: tuple[int, int]
    bbox: tuple[float, float, float, float]
    legend: str | None
    access: Access
    crosswalks: tuple[str, ...] = field(default=())
    page: str = ""


def catalog_path() -> Path:
    """Return the path of the input catalogue shipped with the package."""
    return shipped("catalogs") / "inputs" / "catalog.json"


def load_source(name: str) -> InputSource:
    """Load a known source by id; raise ConfigError if there is none.

    >>> load_source("hildaplus-v2").doi
    '10.1594/PANGAEA.974335'
    """
    known = _sources()
    if name not in known:
        raise ConfigError(f"source is {name!r}, expected one of {sorted(known)}; choose one")
    return known[name]


def credits_of(names: Iterable[str]) -> list[InputSource]:
    """List the sources to credit, each once, sorted by id; raise ConfigError if one is unknown."""
    return [load_source(name) for name in sorted(set(names))]


def licence_of(names: Iterable[str]) -> str:
    """Return the licence for distributing a result made from these sources.

    If all sources share one licence, use it. A mix of public domain (CC0, Public Domain Mark) and CC BY becomes CC BY, which
    requires crediting all of them. If CC BY-SA is among these, the result is CC BY-SA, as share-alike demands. Anything
    else, or no source at all, is ``other``: a person must read the terms. Raises ConfigError if a source is unknown.

    >>> licence_of(["hildaplus-v2", "chelsa-bioclim"]), licence_of(["hildaplus-v2", "luh2-v2h"]), licence_of(["esa-cci-lc", "luh2-v2h"])
    ('CC-BY-4.0', 'CC-BY-SA-4.0', 'other')
    """
    return mix({source.licence for source in credits_of(names)})


def mix(licences: Set[str]) -> str:
    """Return the licence of a mix of licences, by the rule of :func:`licence_of`."""
    if len(licences) == 1:
        return next(iter(licences))
    if licences and licences <= {*_FREE, _BY}:
        return _BY
    return _SHARE_ALIKE if _SHARE_ALIKE in licences and licences <= {*_FREE, _BY, _SHARE_ALIKE} else OTHER


@cache
def _sources() -> MappingProxyType[str, InputSource]:
    root = catalog_path()
    links = json.loads(root.read_text(encoding="utf-8"))["links"]
    paths = [root.parent / link["href"] for link in links if link["rel"] == "child"]
    found = [_source(json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    return MappingProxyType({source.id: source for source in found})


def _source(fields: dict[str, Any]) -> InputSource:
    extent = fields["extent"]
    start, end = extent["temporal"]["interval"][0]
    west, south, east, north = extent["spatial"]["bbox"][0]
    links = {link["rel"]: str(link["href"]) for link in fields["links"]}
    publications = [p["doi"] for p in fields.get("sci:publications", []) if "doi" in p]
    how = fields["ai4land:access"]
    access = Access(
        kind=how["kind"],
        patterns=tuple(how.get("files", ())),
        files=tuple(_file(key, asset) for key, asset in fields.get("assets", {}).items()),
        **{key: how.get(key, "") for key in ("api", "collection", "asset", "signing", "page", "steps")},
    )
    return InputSource(
        id=fields["id"],
        title=fields["title"],
        description=fields["description"],
        licence=fields["license"],
        licence_url=links["license"],
        citation=fields["sci:citation"],
        doi=fields.get("sci:doi") or next(iter(publications), ""),
        providers=tuple(p["name"] for p in fields["providers"]),
        years=(int(start[:4]), int(end[:4])),
        bbox=(west, south, east, north),
        legend=fields.get("ai4land:legend"),
        access=access,
        crosswalks=tuple(fields.get("ai4land:crosswalk", ())),
        page=links.get("about", ""),
    )


def _file(key: str, asset: dict[str, Any]) -> SourceFile:
    start, end = asset.get("start_datetime"), asset.get("end_datetime")
    return SourceFile(
        key=key,
        href=asset["href"],
        media_type=asset["type"],
        title=asset.get("title", key),
        years=(int(start[:4]), int(end[:4])) if start and end else None,
        size=asset.get("file:size"),
        checksum=asset.get("file:checksum"),
    )
