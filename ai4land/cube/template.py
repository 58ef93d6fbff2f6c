"""Make the template of a cube: every array, coordinate and attribute, before any cell is written.

The template holds all years and is kept in the ledger; the cube's own metadata show only the complete years
(:func:`ai4land.cube.cube.show`). Chunks of class codes span several years because codes change little; shards span years
too, to keep the number of objects low.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec
from zarr.storage import MemoryStore

import ai4land
from ai4land.cube.numbers import EMPTY, FRACTION_EMPTY, FRACTION_SCALE, SCALE
from ai4land.cube.overviews import level_factors, multiscales
from ai4land.grid import DEEP, FINE_DIMS, Grid, Window, centres, chunk_side, spatial_ref
from ai4land.legend import Legend

VARIABLES = ("land_cover", "most_likely", "fraction", "confidence", "change_probability")
"""Variables of a cube."""
YEARS_A_SHARD = 10
"""Default number of years per shard."""
_FRACTION_YEARS = 2  # years per shard of the fractions, which have one array plane per class


def depths(years: int, years_a_shard: int) -> tuple[int, int]:
    """Return the years per shard of a cube of ``years`` years, and those per shard of its fractions.

    >>> depths(100, 10), depths(3, 10), depths(1, 10)
    ((10, 2), (4, 2), (1, 1))
    """
    deep = min(years_a_shard, years + years % 2) if years > 1 else 1
    return deep, min(_FRACTION_YEARS, deep)


def make_template(
    *,
    grid: Grid,
    legend: Legend,
    years: list[int],
    years_a_shard: int,
    attrs: dict[str, Any],
    totals: str,
    land: Iterable[Window] | None = None,
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Make the template of a cube; parameters as in :func:`ai4land.cube.cube.create`.

    Returns
    -------
    template : dict
        Plain values: ``documents`` (Zarr metadata by node), ``years``, ``years_a_shard`` and ``shards`` (row and column).
    objects : dict of str to bytes
        The stored coordinates by name.
    """
    held: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(store_dict=held), zarr_format=3)
    factors = level_factors(grid.shard)
    group.attrs.update({**attrs, **multiscales(grid, factors)})
    deep, flat = depths(len(years), years_a_shard)
    _coordinates(group, grid, legend, years, grid.coords())
    flags = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in legend.flag_attrs().items()}
    standard = {"standard_name": "land_cover_lccs"} if legend.name.startswith("lccs") else {}
    codes = {**standard, **flags, "cell_methods": "area: mode"}
    blank = f"code {legend.fill.code} ({legend.fill.name}): not mapped"
    count, (rows, cols), wide, side = len(years), grid.shape, chunk_side(grid), chunk_side(grid, limit=DEEP)
    plane: dict[str, Any] = {
        "shape": (count, rows, cols),
        "dims": ("time", *FINE_DIMS),
        "shards": (deep, grid.shard, grid.shard),
        "dtype": "uint8",
    }
    for name, text, comment in (
        ("land_cover", legend.title, f"{blank}; {totals}"),
        (
            "most_likely",
            f"{legend.title}: most likely class of each cell by itself",
            f"{blank}; class of the largest fraction, no whole-cell totals",
        ),
    ):
        about = {"long_name": text, **codes, "comment": comment}
        _array(group, name, **plane, chunks=(deep, side, side), fill=legend.fill.code, attrs=about)
    for name, text in (
        ("confidence", "probability of the class in land_cover"),
        ("change_probability", "probability that the class differs from that of the reference map"),
    ):
        _array(group, name, **plane, chunks=(flat, wide, wide), fill=EMPTY, attrs={"long_name": text, **_scaled(SCALE, EMPTY)})
    _array(
        group,
        "fraction",
        dtype="uint16",
        shape=(count, legend.n, rows, cols),
        dims=("time", "class", *FINE_DIMS),
        chunks=(1, 1, wide, wide),
        shards=(flat, legend.n, grid.shard, grid.shard),
        fill=FRACTION_EMPTY,
        attrs={
            "long_name": "fraction of the cell that each class covers",
            "standard_name": "area_fraction",
            **_scaled(FRACTION_SCALE, FRACTION_EMPTY),
            "comment": f"the stored numbers of a cell sum to exactly {FRACTION_SCALE}; {totals}",
            "cell_methods": "area: mean",
        },
    )
    for level, factor in enumerate(factors, start=1):
        part = group.create_group(f"overviews/{level}")
        part.attrs.update({k: attrs[k] for k in ("Conventions", "title", "source", "history", "license") if k in attrs})
        box = grid.fine.zoom_out(factor)
        latitude, longitude = centres(box)
        _coordinates(part, grid, legend, years, {"latitude": latitude, "longitude": longitude}, box=box)
        size = grid.shard // factor
        _array(
            part,
            "land_cover",
            dtype="uint8",
            shape=(count, rows // factor, cols // factor),
            dims=("time", *FINE_DIMS),
            chunks=(deep, size, size),
            shards=None,
            fill=legend.fill.code,
            attrs={"long_name": f"{legend.title}: class of most of {factor} x {factor} cells", **codes, "comment": blank},
        )
    documents = {k.removesuffix("/zarr.json").removesuffix("zarr.json"): json.loads(v.to_bytes()) for k, v in _metadata(held)}
    objects = {k: v.to_bytes() for k, v in held.items() if not k.endswith("zarr.json")}
    where = [[w.row, w.col] for w in (grid.shards() if land is None else land)]
    return {"documents": documents, "years": years, "years_a_shard": deep, "shards": where}, objects


def history(model: str | None) -> str:
    """Write the ``history`` attribute: time, version and the checksum of the model's weights."""
    weights = "" if model is None else f" with a model whose weights have the SHA-256 {model}"
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ} created by ai4land {ai4land.__version__}{weights}"


def _metadata(held: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted((k, v) for k, v in held.items() if k.endswith("zarr.json"))


def _scaled(scale: int, empty: int) -> dict[str, Any]:
    """Attributes of shares stored as whole numbers."""
    return {"units": "1", "scale_factor": 1 / scale, "_FillValue": empty, "valid_range": [0, scale]}


def _array(
    group: zarr.Group,
    name: str,
    *,
    dtype: str,
    shape: tuple[int, ...],
    dims: tuple[str, ...],
    chunks: tuple[int, ...],
    shards: tuple[int, ...] | None,
    fill: int,
    attrs: dict[str, Any],
) -> None:
    group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=chunks,
        shards=shards,
        fill_value=fill,
        dimension_names=dims,
        attributes={**attrs, "grid_mapping": "spatial_ref", "coordinates": "year"},
        # Each frame ends with a checksum, which every decoder verifies.
        compressors=ZstdCodec(level=1, checksum=True),
    )


def days_since_1970(year: int, month: int = 1, day: int = 1) -> int:
    """Count the days from 1970-01-01 to a date of the proleptic Gregorian calendar.

    >>> days_since_1970(1970, 7, 2)
    182
    """
    return datetime.date(year, month, day).toordinal() - datetime.date(1970, 1, 1).toordinal()


def _coordinates(group: zarr.Group, grid: Grid, legend: Legend, years: list[int], coords: Any, *, box: Any = None) -> None:
    time = {"units": "days since 1970-01-01", "calendar": "proleptic_gregorian", "units_metadata": "leap_seconds: none"}
    values: dict[str, tuple[tuple[str, ...], NDArray[Any], dict[str, Any]]] = {
        "latitude": (("latitude",), coords["latitude"], {"standard_name": "latitude", "units": "degrees_north", "axis": "Y"}),
        "longitude": (("longitude",), coords["longitude"], {"standard_name": "longitude", "units": "degrees_east", "axis": "X"}),
        "time": (
            ("time",),
            np.array([days_since_1970(y, 7, 2) for y in years], dtype=np.int32),
            {"standard_name": "time", "axis": "T", "bounds": "time_bnds", **time},
        ),
        "time_bnds": (
            ("time", "bnds"),
            np.array([[days_since_1970(y), days_since_1970(y + 1)] for y in years], dtype=np.int32),
            {},
        ),
        "year": (("time",), np.array(years, dtype=np.int32), {"long_name": "calendar year", "units": "1"}),
    }
    if box is None:
        about = {"long_name": "class code", "flag_values": legend.codes.tolist(), "flag_meanings": " ".join(legend.names)}
        values["class"] = (("class",), legend.codes, about)
    for name, (dims, data, attrs) in values.items():
        # One chunk, compressed with a checksum.
        array = group.create_array(
            name,
            shape=data.shape,
            dtype=data.dtype,
            chunks=data.shape,
            dimension_names=dims,
            attributes=attrs,
            compressors=ZstdCodec(level=1, checksum=True),
        )
        array[...] = data
    reference = spatial_ref(grid.fine if box is None else box)
    array = group.create_array("spatial_ref", shape=(), dtype="int32", attributes=_plain(reference.attrs))
    array[...] = 1  # 0 is the fill value and would not be stored


def _plain(attrs: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(attrs, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v)))
