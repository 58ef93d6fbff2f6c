"""Create, extend and open the output store.

:func:`create` writes a template of metadata only. The checked writer (:mod:`ai4land.cube.writer`) then writes whole shards
and records each in the ledger (:mod:`ai4land.cube.ledger`). A cube shows its leading complete years: its time axis grows by
rewriting small metadata, the group's consolidated metadata last.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import xarray as xr
import zarr

from ai4land.cube import ledger
from ai4land.cube.template import YEARS_A_SHARD, history, make_template
from ai4land.errors import DataError, MismatchError
from ai4land.grid import Grid, Window
from ai4land.legend import Legend
from ai4land.places import Place, inside, names, open_place, read, write


@dataclass(frozen=True)
class Block:
    """The work of one task: one shard over some years."""

    window: Window
    years: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.window} of {self.years[0]}-{self.years[-1]}"


def time_shards(years: Iterable[int], *, years_a_shard: int = YEARS_A_SHARD) -> list[tuple[int, ...]]:
    """Group the years of a cube by shard.

    >>> time_shards(range(2000, 2005), years_a_shard=2)
    [(2000, 2001), (2002, 2003), (2004,)]
    """
    every = list(years)
    return [tuple(every[i : i + years_a_shard]) for i in range(0, len(every), years_a_shard)]


def create(
    place: Place,
    *,
    grid: Grid,
    legend: Legend,
    years: Iterable[int],
    identity: dict[str, Any],
    title: str,
    source: str,
    totals: str,
    land: Iterable[Window] | None = None,
    years_a_shard: int = YEARS_A_SHARD,
    attrs: Mapping[str, Any] | None = None,
) -> None:
    """Write the template of a cube, or check that the existing one is the same.

    Parameters
    ----------
    place
        Folder or URL of the Zarr group; a name below ``….zarr`` is a part of that cube. The ledger is next to the cube.
    years
        Ascending.
    identity
        What the cube is made from (model checksum, store, reference year, settings) as plain values.
    title, source
        Text for the metadata.
    totals
        Description for the metadata of how the scenario totals were imposed.
    land
        Shards with cells to map; None: all.
    years_a_shard
        Years per shard; 1 or an even number.
    attrs
        Further attributes of the group, such as ``license``.

    Raises
    ------
    MismatchError
        If the place holds a cube with another identity, or shards whose metadata and ledger cannot be read.
    """
    years = list(years)
    about = {**identity, "grid": grid.to_dict(), "legend": legend.name, "years": years, "years_a_shard": years_a_shard}
    about = json.loads(json.dumps(about))
    kept, there = ledger.load_template(place), _document(place)
    found = there or (kept["documents"][""] if kept is not None and _holds(place) else None)
    if found is None and _holds(place):
        raise MismatchError(
            f"cube {place} has shards, but neither its metadata nor its ledger can be read; restore {place}/zarr.json or "
            f"{ledger.ledger_path(place)}/{ledger.TEMPLATE}, or delete both and make it anew"
        )
    if found is not None:
        have = found["attributes"].get("ai4land_identity", {})
        if have != about:
            before: dict[str, Any] = have if isinstance(have, dict) else {}
            keys = sorted(k for k in {*before, *about} if before.get(k) != about.get(k))
            keys = [
                k for k in keys if k != "contents"
            ] or keys  # other years or inputs have other contents, as a matter of course
            raise MismatchError(
                f"cube {place} was begun with another configuration (it differs in {', '.join(keys)}); "
                "restore the run file and the model, choose another name, or delete the cube and its ledger"
            )
    group = {
        "Conventions": "CF-1.11",
        "title": title,
        "source": source,
        # The ledger takes precedence over the cube: it has a checksum.
        "history": history(identity.get("model"))
        if found is None
        else (kept["documents"][""] if kept else found)["attributes"]["history"],
        "references": legend.references,
        **(attrs or {}),
        "ai4land_identity": about,
    }
    template, objects = make_template(
        grid=grid, legend=legend, years=years, years_a_shard=years_a_shard, attrs=group, totals=totals, land=land
    )
    template["objects"] = {name: ledger.checksum(data) for name, data in objects.items()}
    template["legend"] = legend.model_dump(mode="json")
    if found is None:
        ledger.wipe(place)
        kept = None
    if kept != template:
        ledger.save_template(place, template)
    for name, data in objects.items():
        if read(place, name) != data:
            write(place, name, data)
    if there is None:
        _tell(place, template, 0)


def _document(place: Place) -> dict[str, Any] | None:
    """Read the metadata of a group; None if missing or damaged."""
    try:
        found: Any = json.loads(read(place, "zarr.json") or b"")
    except ValueError:
        return None
    attrs = found.get("attributes") if isinstance(found, dict) else None
    return found if isinstance(attrs, dict) and "ai4land_identity" in attrs else None


def _holds(place: Place) -> bool:
    return bool(names(place, "land_cover/"))


def template_of(place: Place) -> dict[str, Any]:
    """Read the template of a cube, with all years.

    Raises
    ------
    DataError
        If the ledger has no readable template.
    """
    template = ledger.load_template(place)
    if template is None:
        raise DataError(
            f"ledger {ledger.ledger_path(place)} has no whole template; run ai4land reconstruct with the cube's run file"
        )
    return template


def whole_years(place: Place, *, done: Iterable[ledger.Key] | None = None) -> list[int]:
    """List the leading years that every shard with cells to map has; ``done``: what is recorded (None: read the ledger)."""
    template = template_of(place)
    have = set(ledger.recorded(place) if done is None else done)
    found = []
    for year in template["years"]:
        if not all((row, col, year) in have for row, col in template["shards"]):
            break
        found.append(year)
    return found


def show(place: Place) -> list[int]:
    """Extend the cube's metadata to its complete years, for a part also the root's; return these years."""
    template, years = template_of(place), whole_years(place)
    _tell(place, template, len(years))
    return years


def visible(document: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Cut the metadata of an array to its first ``count`` years."""
    made = deepcopy(dict(document))
    dims = made.get("dimension_names") or []
    if "time" in dims:
        made["shape"][dims.index("time")] = count
    return made


def public_documents(template: Mapping[str, Any], count: int) -> dict[str, dict[str, Any]]:
    """Build the metadata that a cube shows with its first ``count`` years, by node; the group's are consolidated."""
    made = {name: visible(d, count) if d["node_type"] == "array" else dict(d) for name, d in template["documents"].items()}
    return {**made, "": {**made[""], "consolidated_metadata": _consolidated({k: v for k, v in made.items() if k})}}


def _consolidated(documents: Mapping[str, Any]) -> dict[str, Any]:
    empty = {"kind": "inline", "must_understand": False, "metadata": {}}
    inner = {k: {**d, "consolidated_metadata": empty} if d["node_type"] == "group" else d for k, d in documents.items()}
    return {"kind": "inline", "must_understand": False, "metadata": inner}


def _tell(place: Place, template: Mapping[str, Any], count: int) -> None:
    documents = public_documents(template, count)
    for name in sorted(documents, reverse=True):  # the group last
        content = encode(documents[name])
        key = f"{name}/zarr.json".lstrip("/")
        if read(place, key) != content:
            write(place, key, content)
    above = ledger.part_of(place)
    if above is not None:
        _tell_root(above[0])


def encode(document: Mapping[str, Any]) -> bytes:
    """Encode metadata as stored."""
    return json.dumps(document, indent=1).encode()


def _tell_root(root: Place) -> None:
    """Write the root metadata of a cube in parts, and repeat until stable: other runs may do the same.

    A part whose own metadata are missing or damaged is left out until :func:`show` restores it.
    """
    while True:
        inner: dict[str, Any] = {}
        found = {part: _document(inside(root, part)) for part in ledger.part_names(root)}
        documents = {part: document for part, document in found.items() if document is not None}
        if not documents:
            return
        for part, document in documents.items():
            for name, node in document.pop("consolidated_metadata", {}).get("metadata", {}).items():
                inner[f"{part}/{name}"] = {k: v for k, v in node.items() if k != "consolidated_metadata"}
            inner[part] = document
        title = next(iter(documents.values()))["attributes"]["title"]
        about = {"Conventions": "CF-1.11", "title": title, "parts": list(documents)}
        content = encode(
            {"attributes": about, "zarr_format": 3, "node_type": "group", "consolidated_metadata": _consolidated(inner)}
        )
        if read(root, "zarr.json") == content:
            return
        write(root, "zarr.json", content)


def open_cube(place: Place) -> xr.Dataset:
    """Open a cube, or one part of it, lazily.

    Class codes stay integers; fractions, confidence and change probability become numbers in 0..1, NaN where not mapped.

    Raises
    ------
    DataError
        If there is no cube at the place, or it is a cube in parts.
    """
    store = open_place(place, read_only=True)
    times = xr.coders.CFDatetimeCoder(time_unit="s")
    try:
        options: dict[str, Any] = {"chunks": None, "decode_coords": "all", "decode_times": times, "zarr_format": 3}
        ds: xr.Dataset = xr.open_zarr(store, consolidated=True, **options)
    except (FileNotFoundError, zarr.errors.GroupNotFoundError, ValueError) as error:
        if (
            isinstance(error, ValueError)
            and not isinstance(error, zarr.errors.GroupNotFoundError)
            and "onsolidated" not in str(error)
        ):
            raise
        raise DataError(f"no cube at {place}; make one with: ai4land reconstruct RUN.yaml") from error
    if "land_cover" not in ds:
        parts = [str(p) for p in ds.attrs.get("parts", [])]
        what = f"a cube in parts, {', '.join(parts)}; open one of them: {place}/{parts[0]}" if parts else "no land-cover cube"
        raise DataError(f"{place} is {what}")
    return ds
