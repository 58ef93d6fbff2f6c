"""Whom a map owes its inputs to: licences, producers and citations, collected from the sources of a run and its static maps."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ai4land import sources
from ai4land.catalog import find_collection
from ai4land.config import RunConfig, StaticLayer
from ai4land.describe import Map
from ai4land.errors import AI4LandError
from ai4land.inputs import Tell

_log = logging.getLogger(__name__)
LICENCE = re.compile(r"^[\w\-.+]+$")
"""What STAC takes as a licence: an SPDX identifier or ``other``."""


@dataclass(frozen=True)
class Credit:
    """Whom a map owes its inputs to.

    Attributes
    ----------
    title
        Of the input.
    licence, licence_url
        SPDX identifier or a name, and where it can be read.
    citation, doi
        How the input is cited.
    providers
        STAC provider objects.
    url, rel
        Where the input is described, empty where it has no public address; ``derived_from`` if that is a STAC object.
    """

    title: str
    licence: str = ""
    licence_url: str = ""
    citation: str = ""
    doi: str = ""
    providers: tuple[Mapping[str, Any], ...] = ()
    url: str = ""
    rel: str = "via"


def credits_of(run: RunConfig, *, tell: Tell = _log.info) -> list[Credit]:
    """Collect licences and citations of the inputs: of ``sources``, and of the STAC collections of the maps."""
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
        for source in sources.credits_of(run.sources)
    ]
    named = sorted(
        {(str(s.catalog), str(s.collection)) for s in run.static if isinstance(s, StaticLayer) and s.catalog}
        | {(str(run.landcover.catalog), collection) for collection in run.landcover.collections}
    )
    for catalog, collection in named:
        if collection in run.sources:
            continue
        try:
            found.append(_credit_of(run, catalog, collection))
        except (AI4LandError, OSError) as error:
            tell(f"licence of collection {collection} of {catalog} can not be read: {error}")
            found.append(Credit(title=collection))
    return found


def _credit_of(run: RunConfig, catalog: str, collection: str) -> Credit:
    """Ask the catalogue that a static map comes from."""
    said = find_collection(run.path(catalog), collection=collection)
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


def licence_of(run: RunConfig, m: Map, credits: Sequence[Credit]) -> str:
    """Say the licence of what is published: that of the sources, else what the cube says, else ``other``.

    Licences of other inputs count too: one that does not mix with that of the sources makes ``other`` of it.
    """
    if not run.sources:
        said = str(m.attrs.get("license", ""))
        return said if LICENCE.match(said) else "other"
    return sources.mix({sources.licence_of(run.sources), *(c.licence for c in credits[len(set(run.sources)) :])})
