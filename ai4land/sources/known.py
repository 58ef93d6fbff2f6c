"""The sources that a run is made from: what they are, under which licence, how to cite them and how to get them.

They are listed in a static STAC catalogue that comes with the package (``catalogs/inputs``), one Collection a source. Beside
the fields of STAC it uses ``ai4land:legend`` (class scheme of a land-cover map), ``ai4land:crosswalk`` (built-in crosswalks from
its states) and ``ai4land:access`` (how to get it). The years of the files are in ``start_datetime`` and ``end_datetime`` of the assets.
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
"""Licence of STAC for what has no SPDX id, or for a mix of licences."""
_FREE = ("CC0-1.0", "CC-PDM-1.0")
_BY = "CC-BY-4.0"
_SHARE_ALIKE = "CC-BY-SA-4.0"


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Attributes
    ----------
    key
        Key of the asset.
    href
        Where it is.
    media_type, title
        What it is.
    years
        First and last year that it is of; None if it is of all years of the source, or of none.
    size, checksum
        Bytes, and hexadecimal multihash; None where they are not known.
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
        ``url`` (the files have addresses), ``stac`` (an API is searched) or ``manual`` (by hand, see ``steps``).
    api, collection, asset
        Of a STAC API.
    signing
        Who signs the addresses: ``planetary_computer``, or none.
    page, steps
        Where to go and what to do there.
    patterns
        Names of the files to be put in by hand, with wildcards.
    files
        Of kind ``url``.
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
    id, title, description
        What it is.
    licence
        SPDX id, or ``other``.
    licence_url
        Text of the licence, or the page that states the terms.
    citation
        As the producers ask for it.
    doi
        Of the data, or else of the publication that describes them; empty if there is neither.
    providers
        Names of the producers, processors and hosts.
    years
        First and last.
    bbox
        West, south, east, north in degrees.
    legend
        Class scheme of a land-cover map, as given to :func:`ai4land.legend.load_legend`; None for other data.
    crosswalks
        Built-in crosswalks from its states, as given to :func:`ai4land.crosswalk.load_crosswalk`.
    access
        How to get it.
    page
        Page about it; empty if there is none.
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
    """Path of the catalogue of the inputs, which comes with the package."""
    return shipped("catalogs") / "inputs" / "catalog.json"


def load_source(name: str) -> InputSource:
    """Load one source that the package knows.

    Raises
    ------
    ConfigError
        If no source has that id.

    >>> load_source("hildaplus-v2").doi
    '10.1594/PANGAEA.974335'
    """
    known = _sources()
    if name not in known:
        raise ConfigError(f"source is {name!r}, expected one of {sorted(known)}; choose one")
    return known[name]


def credits_of(names: Iterable[str]) -> list[InputSource]:
    """List the sources to be credited, each once, sorted by id.

    Raises
    ------
    ConfigError
        If one is not known.
    """
    return [load_source(name) for name in sorted(set(names))]


def licence_of(names: Iterable[str]) -> str:
    """Say under which licence a result of these sources can be given away.

    That of all of them, if they have the same. A mix of public domain (CC0, Public Domain Mark) and CC BY is CC BY, which asks for
    the credits that all of them want. With CC BY-SA among them it is CC BY-SA, as share-alike demands. Anything else, and no source
    at all, is ``other``: a person has to read the terms.

    Raises
    ------
    ConfigError
        If a source is not known.

    >>> licence_of(["hildaplus-v2", "chelsa-bioclim"]), licence_of(["hildaplus-v2", "luh2-v2h"]), licence_of(["esa-cci-lc", "luh2-v2h"])
    ('CC-BY-4.0', 'CC-BY-SA-4.0', 'other')
    """
    return mix({source.licence for source in credits_of(names)})


def mix(licences: Set[str]) -> str:
    """Say the licence of a mix, by the rule of :func:`licence_of`."""
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
