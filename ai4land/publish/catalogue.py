"""Publish a cube and its model as a static STAC catalogue, with maps in other formats.

A cube is one collection with an item per year. In a cube in parts each part is a collection, so that a search never mixes
scenarios. The catalogue is built next to its folder and moved there when complete, replacing only an older one of the same
run. Links are relative: the folder of a run can be moved or served as it is.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlparse

import zarr

from ai4land.cube.describe import Map, open_group, read_map
from ai4land.cube.ledger import part_of
from ai4land.errors import ConfigError, DataError
from ai4land.model.checkpoint import CARD, Card, load_card
from ai4land.places import Place, beside, folder_of, inside, sweep
from ai4land.publish import export, mlm, stac
from ai4land.publish.credits import LICENCE, Credit

Tell = Callable[[str], None]
_log = logging.getLogger(__name__)
# Folder and name of every file of a catalogue.
_OURS = re.compile(r"^(.+/(catalog\.json|collection\.json|items\.parquet|thumbnail\.png)|(.+)/\3\.(json|tif))$")
_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")


@dataclass(frozen=True)
class _About:
    """What all objects of a catalogue share; ``base`` is the catalogue's URL with a final slash, or empty."""

    name: str
    title: str
    model: Path | None
    target: Path
    base: str
    credits: Sequence[Credit]
    licence: str
    tell: Tell

    @property
    def model_id(self) -> str:
        """Id of the collection of the model."""
        return f"{identifier(self.name)}-model"


def publish(
    cube: Place,
    *,
    to: Place,
    name: str,
    title: str = "",
    model: Path | None = None,
    credits: Sequence[Credit] = (),
    licence: str | None = None,
    base_url: str = "",
    cog: Sequence[int] = (),
    tell: Tell = _log.info,
) -> Path:
    """Publish a cube and the model that made it as a static STAC catalogue; return the path of its ``catalog.json``.

    Parameters
    ----------
    cube
        Folder or URL of a cube; given a part, the whole cube is published.
    to
        Folder of the catalogue, on the local file system.
    name, title
        Of the run; only a catalogue with the same name is replaced. Default title: the name.
    model
        Folder with the model card and the weights; None: the catalogue has no model.
    licence
        Licence of the catalogue; None: from the cube's metadata, or ``other``.
    base_url
        Future URL of the folder. With it objects get a ``self`` link, and the index has URLs instead of relative hrefs.
    cog
        Years to export as cloud-optimised GeoTIFF.

    Raises
    ------
    DataError
        If there is no cube, or it has no finished year.
    ConfigError
        If a year to export is not in the cube, the folder is remote, in use or not apart from the cube, ``base_url`` is not
        a URL, or rustac is not installed.
    """
    if base_url and not urlparse(base_url).netloc:
        raise ConfigError(f"base URL is {base_url!r}, expected an address such as https://example.org/maps/stac/")
    folder = folder_of(to)
    if folder is None:
        raise ConfigError(
            f"folder of the catalogue is {to}, expected one on this machine; publish there and copy it, with --base-url"
        )
    target, cube = folder.resolve(), root_of(cube)
    maps = maps_of(cube, id=identifier(name), title=title or name)
    lacking = [y for y in cog if not any(y in m.years for m in maps)]
    if lacking:
        raise ConfigError(f"years to export are {lacking}, expected some of {stac.span(maps[0].years)}; choose years of the cube")
    if find_spec("rustac") is None:
        raise ConfigError(
            "rustac, which writes the index of the items, is not installed; install it with: pip install 'ai4land[publish]'"
        )
    _check_target(target, name)
    if isinstance(cube, Path) and (target in (cube, *cube.parents) or cube in target.parents):
        raise ConfigError(
            f"folder of the catalogue is {target}, expected one apart from the cube {cube}; choose another one with --to"
        )
    if licence is None:
        stated = str(maps[0].attrs.get("license", ""))
        licence = stated if LICENCE.match(stated) else "other"
    base = f"{base_url.rstrip('/')}/" if base_url else ""
    about = _About(name, title or name, model, target, base, credits, licence, tell)
    part = beside(target, "part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        _write(about, maps, part, cube=cube, cog=cog)
        _move(part, target)
        sweep(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target / "catalog.json"


def root_of(place: Place) -> Place:
    """Return the place of the whole cube, given the cube or one of its parts; a folder becomes an absolute path.

    >>> root_of("s3://bucket/globe.zarr/ssp126"), root_of("s3://bucket/globe.zarr")
    ('s3://bucket/globe.zarr', 's3://bucket/globe.zarr')
    """
    above = part_of(place)
    root = place if above is None else above[0]
    folder = folder_of(root)
    return root if folder is None else folder.resolve()


def identifier(text: str) -> str:
    """Make an id of letters, digits, ``-`` and ``_``.

    >>> identifier("global 1km.v2")
    'global-1km-v2'
    """
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-") or "map"


def maps_of(cube: Place, *, id: str, title: str) -> list[Map]:
    """List the maps of a cube that have finished years: one, or one per part.

    Raises
    ------
    DataError
        If there is no cube, no year of it is finished, or its parts have unusable names.
    """
    try:
        group = open_group(cube)
    except (FileNotFoundError, zarr.errors.GroupNotFoundError) as error:
        raise DataError(f"no cube at {cube}; make one with: ai4land reconstruct RUN.yaml") from error
    if "land_cover" in group:
        maps = [read_map(cube, id=id, title=title)]
    else:
        parts = sorted(str(name) for name, child in group.groups() if "land_cover" in child)
        if not parts:
            raise DataError(
                f"cube {cube} has no land_cover and no part with one, expected a cube of ai4land; reconstruct it again"
            )
        odd = [p for p in parts if not _NAME.match(p)]
        if odd:
            raise DataError(f"part of cube {cube} is named {odd[0]!r}, expected letters, digits, '.', '-' and '_'; rename it")
        ids = {p: f"{id}-{identifier(p)}" for p in parts}
        if len({*ids.values(), f"{id}-model"}) <= len(parts):
            raise DataError(
                f"parts of cube {cube} are {parts}, expected names that differ in letters and digits, and none 'model'"
            )
        maps = [read_map(inside(cube, p), id=ids[p], title=f"{title}, {p}", part=p) for p in parts]
    empty = [m for m in maps if not m.years]
    whole = group.metadata.consolidated_metadata is not None
    if len(empty) == len(maps) or not whole:
        raise DataError(f"cube {cube} has no finished year, expected one at least; finish it with: ai4land reconstruct RUN.yaml")
    return [m for m in maps if m.years]


def _write(about: _About, maps: Sequence[Map], folder: Path, *, cube: Place, cog: Sequence[int]) -> None:
    """Write the whole catalogue into ``folder``, with links relative to its target."""
    collections, items, target = [], [], about.target
    for m in maps:
        group = open_group(m.path)
        here = folder / m.id
        export.thumbnail(group, year=m.years[-1], box=m.box, flags=m.flags, path=here / "thumbnail.png")
        made = [_item(m, year, group, here, target=target, export_it=year in cog, tell=about.tell) for year in m.years]
        assets = {"thumbnail": stac.image_asset("./thumbnail.png", f"Land cover of {m.years[-1]}")}
        assets["items"] = {
            "href": "../items.parquet",
            "type": stac.PARQUET_TYPE,
            "roles": ["collection-mirror" if len(maps) == 1 else "index"],
            "title": "Items of the catalogue as stac-geoparquet",
        }
        root, store = _relative(m.path, target / m.id), _relative(cube, target / m.id)
        collection = stac.collection(m, credits=about.credits, licence=about.licence, cube=root, root=store, assets=assets)
        collection["links"] += [stac.link("item", f"./{i['id']}/{i['id']}.json", "application/geo+json") for i in made]
        collections.append((m, collection))
        items += made
    models = _model(about, maps, folder)
    for m, collection in collections:
        if m.id in models:
            collection["links"].append(stac.link("derived_from", models[m.id], "application/geo+json", title="Model"))
        _save(collection, folder, f"{m.id}/collection.json", about.base)
    for item in items:
        _save(item, folder, _place(item), about.base)
    _index([_from_root(i, about.base) for i in items], folder / "items.parquet")
    children = [(m.id, m.title) for m in maps] + ([(about.model_id, f"{about.title}: model")] if models else [])
    catalog = stac.catalog(
        id=f"{identifier(about.name)}-catalog", title=about.title, run=about.name, children=children, index=True
    )
    _save(catalog, folder, "catalog.json", about.base)


def _item(m: Map, year: int, group: zarr.Group, folder: Path, *, target: Path, export_it: bool, tell: Tell) -> dict[str, Any]:
    id = f"{m.id}-{year}"
    cube = _relative(m.path, target / m.id / id)
    if not export_it:
        return stac.item(m, year, cube=cube)
    tell(f"GeoTIFF of {year}")
    time = m.years.index(year)
    export.write_cog(group["land_cover"], time=time, box=m.box, flags=m.flags, fill=m.fill, path=folder / id / f"{id}.tif")
    export.thumbnail(group, year=year, box=m.box, flags=m.flags, path=folder / id / "thumbnail.png")
    return stac.item(m, year, cube=cube, cog=f"./{id}.tif", thumbnail="./thumbnail.png")


def _model(about: _About, maps: Sequence[Map], folder: Path) -> dict[str, str]:
    """Write the collection and the item of the model; return the item's href from each collection that the model made."""
    if about.model is None or not (about.model / CARD).is_file():
        about.tell(f"no model in {about.model}: the catalogue describes the cube alone")
        return {}
    card = load_card(about.model)
    made = [m for m in maps if _made(m, card)]
    if not made:
        about.tell(f"model in {about.model} is not the one that the cube was made with: the catalogue describes the cube alone")
        return {}
    id = about.model_id
    item_id = f"{id}-{card.weights[:12]}"
    to_folder = _relative(about.model.resolve(), about.target / id / item_id)
    item = mlm.model_item(about.model, card, made[0], title=about.title, collection=id, to_folder=to_folder)
    described = mlm.model_collection(made[0], id=id, title=about.title, credits=about.credits, licence=about.licence, item=item)
    described["links"].append(stac.link("item", f"./{item_id}/{item_id}.json", "application/geo+json"))
    _save(described, folder, f"{id}/collection.json", about.base)
    _save(item, folder, _place(item), about.base)
    return dict.fromkeys([m.id for m in made], f"../{id}/{item_id}/{item_id}.json")


def _made(m: Map, card: Card) -> bool:
    """Whether the cube names this model as its maker, or names none."""
    identity = m.attrs.get("ai4land_identity")
    return (identity.get("model") if isinstance(identity, dict) else None) in (None, card.weights)


def _relative(path: Place, start: Path) -> str:
    return path if isinstance(path, str) else Path(os.path.relpath(path, start)).as_posix()


def _place(item: dict[str, Any]) -> str:
    return f"{item['collection']}/{item['id']}/{item['id']}.json"


def _save(value: dict[str, Any], folder: Path, place: str, base: str) -> None:
    """Write an object; add root and parent links to collections and, with a base URL, a ``self`` link."""
    links = list(value["links"])
    if value["type"] == "Collection":
        links = [stac.link("root", "../catalog.json"), stac.link("parent", "../catalog.json"), *links]
    if base:
        kind = "application/geo+json" if value["type"] == "Feature" else "application/json"
        links.insert(0, stac.link("self", base + quote(place), kind))
    path = folder / place
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**value, "links": links}, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def _from_root(item: dict[str, Any], base: str) -> dict[str, Any]:
    """Rewrite the hrefs of an item for the index: relative to the catalogue's folder, or absolute."""
    above = Path(_place(item)).parent

    def moved(href: str) -> str:
        if "://" in href:
            return href
        place = Path(os.path.normpath(above / href)).as_posix()
        return urljoin(base, quote(place)) if base else place

    assets = {key: {**asset, "href": moved(asset["href"])} for key, asset in item["assets"].items()}
    return {**item, "assets": assets, "links": [{**entry, "href": moved(entry["href"])} for entry in item["links"]]}


def _index(items: list[dict[str, Any]], path: Path) -> None:
    import rustac

    rustac.write_sync(str(path), items)


def _check_target(target: Path, name: str) -> None:
    """Raise unless the target is free or holds a catalogue of this run and nothing else."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        owner = json.loads((target / "catalog.json").read_text(encoding="utf-8"))["ai4land:run"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"folder {target} holds files that are not a catalogue of ai4land, expected none; choose another one with --to"
        ) from None
    strange = [p for p in target.rglob("*") if p.is_file() and not _OURS.match(f"{p.parent.name}/{p.name}")]
    if strange:
        raise ConfigError(
            f"folder {target} of the catalogue holds {strange[0].relative_to(target)}, which would be lost; move it elsewhere"
        )
    if owner != name:
        raise ConfigError(
            f"folder {target} holds the catalogue of run {owner!r}, expected {name!r}; choose another one with --to"
        )


def _move(part: Path, target: Path) -> None:
    old = beside(target, "old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.replace(old)
    try:
        part.replace(target)
    except OSError:
        if old.exists():
            old.replace(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
