"""Build the STAC 1.1 objects of a published cube as plain dicts: catalogue, one collection per cube, one item per year.

They express what :mod:`ai4land.cube.describe` reads from a cube in STAC and its extensions. No clock is read: the same cube
gives the same objects. Text from a cube or a run file is untrusted and escaped in descriptions, which readers render as
Markdown.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from odc.geo.geobox import GeoBox

from ai4land.cube.describe import Flag, Map
from ai4land.publish.credits import LICENCE, Credit

STAC_VERSION = "1.1.0"
_AT = "https://stac-extensions.github.io/{}/schema.json"
DATACUBE, CLASSIFICATION, PROJECTION = (
    _AT.format("datacube/v2.3.0"),
    _AT.format("classification/v1.1.0"),
    _AT.format("projection/v2.0.0"),
)
RASTER, PROCESSING, SCIENTIFIC = _AT.format("raster/v2.0.0"), _AT.format("processing/v1.2.0"), _AT.format("scientific/v1.0.0")
VERSION, ZARR = _AT.format("version/v1.2.0"), _AT.format("zarr/v1.1.0")
ZARR_TYPE = "application/vnd.zarr; version=3"
COG_TYPE = "image/tiff; application=geotiff; profile=cloud-optimized"
PARQUET_TYPE = "application/vnd.apache.parquet"
_NO_SPDX = ("other", "various", "proprietary")
_DOI = re.compile(r"^10\.[0-9a-zA-Z]{4,}/\S+$")


def plain(text: str) -> str:
    r"""Make text mean itself in CommonMark: no HTML, no links, no emphasis.

    >>> plain("<b>a*</b> [x](y)")
    '&lt;b&gt;a\\*&lt;/b&gt; \\[x\\](y)'
    """
    return re.sub(r"([\\`*_\[\]#|~!])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def span(years: Sequence[int]) -> str:
    """Format the first and the last year.

    >>> span([850]), span([850, 851, 2100])
    ('850', '850-2100')
    """
    return str(years[0]) if len(years) == 1 else f"{years[0]}-{years[-1]}"


def year_start(year: int) -> str:
    """First second of a year in RFC 3339 (``strftime`` omits leading zeros before year 1000)."""
    return f"{year:04d}-01-01T00:00:00Z"


def year_end(year: int) -> str:
    """Last second of a year."""
    return f"{year:04d}-12-31T23:59:59Z"


def link(rel: str, href: str, type: str = "application/json", **more: str) -> dict[str, Any]:
    """Make a link object."""
    return {"rel": rel, "href": href, **({"type": type} if type else {}), **{k: v for k, v in more.items() if v}}


def outline(bbox: tuple[float, float, float, float]) -> dict[str, Any]:
    """Make the polygon of a bounding box."""
    west, south, east, north = bbox
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return {"type": "Polygon", "coordinates": [ring]}


def classes(flags: Iterable[Flag], *, fill: int | None = None) -> list[dict[str, Any]]:
    """Describe classes with the classification extension."""
    return [
        {
            "value": f.code,
            "name": re.sub(r"[^0-9A-Za-z_-]", "-", f.name),
            "description": plain(f.name.replace("_", " ")),
            "color_hint": f.colour[1:].upper(),
            **({"nodata": True} if f.code == fill else {}),
        }
        for f in flags
    ]


def projection(box: GeoBox) -> dict[str, Any]:
    """Describe reference system, shape and transform of a grid with the projection extension."""
    crs = box.crs
    named = {"proj:code": f"EPSG:{crs.epsg}"} if crs is not None and crs.epsg else {"proj:wkt2": str(crs)}
    rows, cols = box.shape
    return {**named, "proj:shape": [int(rows), int(cols)], "proj:transform": [float(v) for v in box.affine[:6]]}


def catalog(*, id: str, title: str, run: str, children: Iterable[tuple[str, str]], index: bool) -> dict[str, Any]:
    """Make the root catalogue; ``children`` are ids and titles of its collections, ``run`` marks the run that owns it."""
    links = [link("root", "./catalog.json")]
    links += [link("child", f"./{child}/collection.json", title=words) for child, words in children]
    if index:
        links.append(link("alternate", "./items.parquet", PARQUET_TYPE, title="All items as stac-geoparquet"))
    return {
        "type": "Catalog",
        "stac_version": STAC_VERSION,
        "id": id,
        "title": title,
        "description": f"{plain(title)}: annual land cover, and the model that made it.",
        "ai4land:run": run,
        "links": links,
    }


def credit_fields(credits: Sequence[Credit], *, licence: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return licence, providers and citations of the inputs as collection fields, and their links."""
    providers: list[dict[str, Any]] = []
    for provider in (p for c in credits for p in c.providers):
        if provider.get("name") and provider["name"] not in [p["name"] for p in providers]:
            providers.append(dict(provider))
    links = []
    for c in credits:
        spdx = f"https://spdx.org/licenses/{c.licence}.html" if LICENCE.match(c.licence) and c.licence not in _NO_SPDX else ""
        if c.licence_url or spdx:
            links.append(link("license", c.licence_url or spdx, "", title=f"{c.title}: {c.licence}"))
        if c.url:
            links.append(link(c.rel, c.url, "application/json" if c.rel == "derived_from" else "", title=c.title))
        if _DOI.match(c.doi):
            links.append(link("cite-as", f"https://doi.org/{c.doi}", ""))
    publications = [
        {**({"doi": c.doi} if _DOI.match(c.doi) else {}), **({"citation": c.citation} if c.citation else {})} for c in credits
    ]
    fields: dict[str, Any] = {"license": licence, "providers": providers}
    if any(publications):
        fields["sci:publications"] = [p for p in publications if p]
    return fields, [item for i, item in enumerate(links) if item not in links[:i]]


def collection(
    m: Map, *, credits: Sequence[Credit], licence: str, cube: str, root: str, assets: dict[str, Any]
) -> dict[str, Any]:
    """Make the collection of a cube.

    ``cube`` and ``root`` are hrefs from the collection to the cube's group and to its store; ``credits`` are those of its
    inputs, ``licence`` its own.
    """
    fields, links = credit_fields(credits, licence=licence)
    stamps, source = m.stamps, str(m.attrs.get("source", ""))
    made: dict[str, Any] = {"processing:software": {"ai4land": _software(m)}}
    if source:
        made["processing:lineage"] = plain(source)
    if stamps:
        made["processing:datetime"] = stamps[-1]
    providers = [{"name": "AI4Land", "roles": ["processor"], **made}, *fields.pop("providers")]
    references = str(m.attrs.get("references", "")).strip()
    publications = [*fields.pop("sci:publications", []), *([{"citation": references}] if references else [])]
    rows, cols = m.box.shape
    owed = "".join(f"\n\n* {plain(c.title)}: {plain(c.licence or 'licence not stated')}" for c in credits)
    return {
        "type": "Collection",
        "stac_version": STAC_VERSION,
        "stac_extensions": [DATACUBE, CLASSIFICATION, PROJECTION, RASTER, PROCESSING, SCIENTIFIC, VERSION, ZARR],
        "id": m.id,
        "title": m.title,
        "description": f"{plain(m.title)}: annual land cover {span(m.years)}, {len(m.years)} years of {rows} × {cols} cells. "
        f"{plain(source)}" + (f"\n\nMade from:{owed}" if owed else ""),
        "keywords": ["land cover", "land use", "annual", *_legend(m)],
        **fields,
        **({"created": stamps[0], "updated": stamps[-1]} if stamps else {}),
        "version": m.version,
        "providers": providers,
        "sci:citation": _citation(m),
        **({"sci:publications": publications} if publications else {}),
        "extent": {
            "spatial": {"bbox": [list(m.bbox)]},
            "temporal": {"interval": [[year_start(m.years[0]), year_end(m.years[-1])]]},
        },
        **({"ai4land:part": m.part} if m.part else {}),
        "cube:dimensions": _dimensions(m),
        "cube:variables": {name: _variable(v) for name, v in m.variables.items()},
        "summaries": {
            **{k: [v] for k, v in projection(m.box).items() if k == "proj:code"},
            "classification:classes": classes(m.flags, fill=m.fill),
        },
        "item_assets": {"land_cover": {k: v for k, v in cog_asset(m).items() if k not in ("proj:shape", "proj:transform")}},
        "assets": {"cube": cube_asset(m, cube), **assets},
        "links": [link("store", root, ZARR_TYPE), *links],
    }


def _software(m: Map) -> str:
    found = re.search(r"ai4land (\S+)", str(m.attrs.get("history", "")))
    return found[1] if found else "unknown"


def _citation(m: Map) -> str:
    year = f" ({m.stamps[0][:4]})" if m.stamps else ""
    return f"{m.title}{year}, version {m.version}. Made with AI4Land {_software(m)}."


def _legend(m: Map) -> list[str]:
    identity = m.attrs.get("ai4land_identity")
    name = identity.get("legend") if isinstance(identity, dict) else None
    return [name] if isinstance(name, str) and name else []


def _dimensions(m: Map) -> dict[str, Any]:
    x, y = m.box.affine.a, m.box.affine.e
    left, bottom, right, top = m.box.boundingbox
    epsg = m.box.crs.epsg if m.box.crs is not None else None
    reference = epsg or str(m.box.crs)
    steps = {b - a for a, b in zip(m.years, m.years[1:], strict=False)}
    dimensions = {
        "time": {
            "type": "temporal",
            "extent": [year_start(m.years[0]), year_end(m.years[-1])],
            "values": [f"{year:04d}-07-02T00:00:00Z" for year in m.years],
            "step": f"P{steps.pop()}Y" if len(steps) == 1 else None,
        },
        "latitude": {"type": "spatial", "axis": "y", "extent": [bottom, top], "step": y, "reference_system": reference},
        "longitude": {"type": "spatial", "axis": "x", "extent": [left, right], "step": x, "reference_system": reference},
    }
    if any("class" in v["dims"] for v in m.variables.values()):
        dimensions["class"] = {
            "type": "class",
            "description": "class code",
            "values": [f.code for f in m.flags if f.code != m.fill],
        }
    return dimensions


def _variable(v: dict[str, Any]) -> dict[str, Any]:
    said = {"description": v.get("long_name"), "unit": v.get("units")}
    return {
        "dimensions": v["dims"],
        "variable_type": "data",
        **{k: plain(str(text)) for k, text in said.items() if text},
        "data_type": v["data_type"],
        "nodata": _number(v["fill"]),
    }


def _number(value: float) -> float | int | str:
    return (
        str(value) if value != value or value in (float("inf"), float("-inf")) else int(value) if value == int(value) else value
    )


def _band(m: Map, name: str) -> dict[str, Any]:
    v = m.variables[name]
    band = {"name": name, "data_type": v["data_type"], "nodata": _number(v["fill"]), "raster:sampling": "area"}
    if v.get("long_name"):
        band["description"] = plain(str(v["long_name"]))
    if "scale_factor" in v:
        band |= {
            "unit": str(v.get("units", "1")),
            "raster:scale": float(v["scale_factor"]),
            "raster:offset": float(v.get("add_offset", 0)),
        }
    if "flag_values" in v:
        band["classification:classes"] = classes(m.flags, fill=m.fill)
    return band


def cube_asset(m: Map, href: str, *, year: int | None = None) -> dict[str, Any]:
    """Describe the Zarr group as an asset: of the whole cube, or for the item of one year."""
    described: dict[str, Any] = {
        "href": href,
        "type": ZARR_TYPE,
        "roles": ["data"],
        "title": "The cube: Zarr group of all years"
        if year is None
        else f"The cube; {year} is number {m.years.index(year)} along time",
        "zarr:zarr_format": 3,
        "zarr:node_type": "group",
        "zarr:consolidated": m.consolidated,
    }
    if year is None:
        return {**described, **projection(m.box), "bands": [_band(m, name) for name in m.variables]}
    return described


def cog_asset(m: Map, href: str | None = None) -> dict[str, Any]:
    """Describe the GeoTIFF of a year's land cover; without ``href``, of any year."""
    return {
        **({"href": href} if href else {}),
        "type": COG_TYPE,
        "roles": ["data"],
        "title": "Land cover, cloud-optimised GeoTIFF",
        "data_type": m.variables["land_cover"]["data_type"],
        "nodata": m.fill,
        "raster:sampling": "area",
        **projection(m.box),
        "classification:classes": classes(m.flags, fill=m.fill),
        "bands": [{"name": "land_cover"}],
    }


def image_asset(href: str, title: str) -> dict[str, Any]:
    """Describe a thumbnail."""
    return {"href": href, "type": "image/png", "roles": ["thumbnail"], "title": title}


def item(m: Map, year: int, *, cube: str, cog: str | None = None, thumbnail: str | None = None) -> dict[str, Any]:
    """Make the item of a year; hrefs are relative to it."""
    assets = {"cube": cube_asset(m, cube, year=year)}
    if cog:
        assets["land_cover"] = cog_asset(m, cog)
    if thumbnail:
        assets["thumbnail"] = image_asset(thumbnail, f"Land cover of {year}")
    stamps = m.stamps
    return {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "stac_extensions": [PROJECTION, CLASSIFICATION, VERSION, ZARR, *([RASTER] if cog else [])],
        "id": f"{m.id}-{year}",
        "collection": m.id,
        "geometry": outline(m.bbox),
        "bbox": list(m.bbox),
        "properties": {
            "title": f"{m.title}: {year}",
            "datetime": f"{year:04d}-07-02T00:00:00Z",
            "start_datetime": year_start(year),
            "end_datetime": year_end(year),
            **({"created": stamps[0], "updated": stamps[-1]} if stamps else {}),
            "version": m.version,
            "ai4land:year": year,
            **({"ai4land:part": m.part} if m.part else {}),
            **projection(m.box),
            "classification:classes": classes(m.flags, fill=m.fill),
        },
        "assets": assets,
        "links": [
            link("root", "../../catalog.json"),
            link("parent", "../collection.json"),
            link("collection", "../collection.json"),
        ],
    }
