"""Collect licences, producers and citations of a map's inputs from the known sources and STAC collections."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ai4land.errors import AI4LandError
from ai4land.sources import known
from ai4land.sources.search import find_collection

_log = logging.getLogger(__name__)
LICENCE = re.compile(r"^[\w\-.+]+$")
"""Licences that STAC accepts: an SPDX identifier or ``other``."""


@dataclass(frozen=True)
class Credit:
    """Credit of one input of a map.

    Attributes
    ----------
    licence, licence_url
        SPDX identifier or a name; where to read it.
    providers
        STAC provider objects.
    url, rel
        Public URL of its description, or empty; ``rel`` is ``derived_from`` if that is a STAC object.
    """

    title: str
    licence: str = ""
    licence_url: str = ""
    citation: str = ""
    doi: str = ""
    providers: tuple[Mapping[str, Any], ...] = ()
    url: str = ""
    rel: str = "via"


def credits_of(
    names: Sequence[str], collections: Iterable[tuple[str, str]] = (), *, tell: Callable[[str], None] = _log.info
) -> list[Credit]:
    """Collect licences and citations of the inputs of a map.

    Parameters
    ----------
    names
        Ids of sources (:mod:`ai4land.sources.known`).
    collections
        Catalogue and id of STAC collections; those among ``names`` are skipped.
    tell
        Called with a message for each collection that cannot be read; its credit has no licence.

    Raises
    ------
    ConfigError
        If a source is unknown.
    """
    found = [
        Credit(
            title=source.title,
            licence=source.licence,
            licence_url=source.licence_url,
            citation=source.citation,
            doi=source.doi,
            providers=tuple({"name": name, "roles": ["producer"]} for name in source.providers),
            url=source.page or (f"https://doi.org/{source.doi}" if source.doi else ""),
        )
        for source in known.credits_of(names)
    ]
    for catalog, collection in sorted(set(collections)):
        if collection in names:
            continue
        try:
            found.append(_credit_of(catalog, collection))
        except (AI4LandError, OSError) as error:
            tell(f"licence of collection {collection} of {catalog} cannot be read: {error}")
            found.append(Credit(title=collection))
    return found


def _credit_of(catalog: str, collection: str) -> Credit:
    """Read the credit of an input from its STAC collection."""
    said = find_collection(catalog, collection=collection)
    public = {str(e["rel"]): str(e["href"]) for e in said.get("links", []) if e.get("rel") and _web(e.get("href"))}
    return Credit(
        title=str(said.get("title") or collection),
        licence=str(said.get("license") or ""),
        licence_url=public.get("license", ""),
        citation=str(said.get("sci:citation") or ""),
        doi=str(said.get("sci:doi") or ""),
        providers=tuple(
            {"name": str(p["name"]), "roles": ["producer"], **({"url": p["url"]} if _web(p.get("url")) else {})}
            for p in said.get("providers", [])
            if p.get("name")
        ),
        url=public.get("self", ""),
        rel="derived_from",
    )


def _web(address: Any) -> bool:
    return isinstance(address, str) and address.startswith(("https://", "http://"))
