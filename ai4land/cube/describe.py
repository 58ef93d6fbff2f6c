"""Read a cube's years, grid, classes and variables from its metadata."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from affine import Affine
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox

from ai4land.digests import digest
from ai4land.errors import DataError
from ai4land.places import Place, open_place

_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


def open_group(place: Place) -> zarr.Group:
    """Open a Zarr group for reading."""
    return zarr.open_group(open_place(place, read_only=True), mode="r")


@dataclass(frozen=True)
class Flag:
    """One class of a map; ``colour`` is ``#rrggbb``."""

    code: int
    name: str
    colour: str


@dataclass(frozen=True)
class Map:
    """Description of a cube, or of one part of a cube.

    Attributes
    ----------
    id, part
        Id of the STAC collection; name of the child group, or empty.
    years
        Visible years, in the order of the time axis.
    bbox
        West, south, east, north in degrees.
    flags, fill
        Classes of ``land_cover`` including the fill; code of the fill.
    variables
        By name: ``data_type``, ``dims``, ``fill`` and the attributes of the array.
    attrs
        Attributes of the group.
    consolidated
        Whether the group has consolidated metadata.
    """

    id: str
    part: str
    path: Place
    title: str
    years: tuple[int, ...]
    box: GeoBox
    bbox: tuple[float, float, float, float]
    flags: tuple[Flag, ...]
    fill: int
    variables: dict[str, dict[str, Any]]
    attrs: dict[str, Any]
    consolidated: bool

    @property
    def stamps(self) -> list[str]:
        """Times in the history of the cube, ascending."""
        return sorted(_STAMP.findall(str(self.attrs.get("history", ""))))

    @property
    def version(self) -> str:
        """Fingerprint of the cube's identity."""
        return digest(self.attrs.get("ai4land_identity", {}))


def read_map(path: Place, *, id: str, title: str, part: str = "") -> Map:
    """Read the description of a cube from its metadata.

    Raises
    ------
    DataError
        If the group is not a cube, or its classes or grid cannot be read.
    """
    group = open_group(path)
    arrays = {str(name): array for name, array in group.arrays()}
    lacking = [n for n in ("land_cover", "year", "latitude", "longitude", "spatial_ref") if n not in arrays]
    if lacking:
        raise DataError(f"cube {path} has no {', '.join(lacking)}, expected a cube of ai4land; publish a reconstructed run")
    cover = arrays["land_cover"]
    box = _box(dict(arrays["spatial_ref"].attrs), arrays["latitude"], arrays["longitude"])
    outline = box.boundingbox if box.crs is not None and box.crs.geographic else box.geographic_extent.boundingbox
    metadata: Any = group.metadata
    return Map(
        id=id,
        part=part,
        path=path,
        title=title,
        years=tuple(int(y) for y in np.asarray(arrays["year"][...])),
        box=box,
        bbox=(float(outline.left), float(outline.bottom), float(outline.right), float(outline.top)),
        flags=_flags(dict(cover.attrs), path),
        fill=int(cover.fill_value),
        variables={
            name: {
                **dict(array.attrs),
                "data_type": array.dtype.name,
                "dims": list(getattr(array.metadata, "dimension_names", None) or ()),
                "fill": float(array.fill_value),
            }
            for name, array in sorted(arrays.items())
            if array.ndim > 2
        },
        attrs=dict(group.attrs),
        consolidated=metadata.consolidated_metadata is not None,
    )


def _box(reference: dict[str, Any], latitude: Any, longitude: Any) -> GeoBox:
    try:
        crs = CRS(str(reference.get("crs_wkt") or reference["spatial_ref"]))
        c, a, b, f, d, e = (float(v) for v in str(reference["GeoTransform"]).split())
    except (KeyError, ValueError, RuntimeError) as error:
        raise DataError(
            f"spatial_ref of the cube has no crs_wkt and GeoTransform ({error}), expected both; make it again"
        ) from error
    return GeoBox((latitude.shape[0], longitude.shape[0]), Affine(a, b, c, d, e, f), crs)


def _flags(attrs: dict[str, Any], path: Place) -> tuple[Flag, ...]:
    codes, names = attrs.get("flag_values", []), str(attrs.get("flag_meanings", "")).split()
    colours = str(attrs.get("flag_colors", "")).split() or ["#808080"] * len(codes)
    if not codes or not len(codes) == len(names) == len(colours):
        raise DataError(
            f"land_cover of {path} has {len(codes)} flag_values, {len(names)} flag_meanings and {len(colours)} flag_colors, "
            "expected one of each a class; make the cube again"
        )
    wrong = [c for c in colours if not re.fullmatch(r"#[0-9a-fA-F]{6}", c)]
    if wrong:
        raise DataError(f"land_cover of {path} has the colour {wrong[0]!r}, expected #rrggbb; make the cube again")
    return tuple(Flag(int(c), n, colour) for c, n, colour in zip(codes, names, colours, strict=True))
