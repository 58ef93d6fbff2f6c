"""The output store: its template, its one writer, its ledger and its opener.

The template is written first and holds metadata alone. Then whole shards are written, by one checked function, and each
is recorded in the ledger *after* it is on disk: an all-fill shard leaves no file, so files cannot tell what is done. The
ledger is a folder beside the cube with one append-only file a writer; a torn last line counts for nothing.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
import threading
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

import ai4land
from ai4land.errors import DataError, MismatchError
from ai4land.grid import FINE_DIMS, Grid, Window, spatial_ref
from ai4land.legend import Legend

SCALE = 250
"""Confidences and probabilities of change are stored as whole numbers of 1/250."""
EMPTY = 255
"""Stored confidence and probability of change of a cell that has none."""
FRACTION_SCALE = 65000
"""Fractions are stored as whole numbers of 1/65000: where 25 or more fine cells lie along a coarse one, the totals stay within about a millionth."""
FRACTION_EMPTY = 65535
"""Stored fraction of a cell that is not mapped."""
VARIABLES = ("land_cover", "most_likely", "fraction", "confidence", "change_probability")
"""What a cube holds for every year."""


@dataclass(frozen=True)
class Block:
    """What one task writes: a shard over some years."""

    window: Window
    years: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.window} of {self.years[0]}-{self.years[-1]}"


def chunk_side(grid: Grid, *, limit: int = 512) -> int:
    """Side of a chunk: whole coarse cells, a divisor of the shard, at most ``limit`` fine cells where there is one.

    >>> from ai4land.grid import make_grid
    >>> chunk_side(make_grid((-180, -90, 180, 90), coarse_cell=0.25, factor=30, shard=1440))
    480
    """
    cells = grid.shard // grid.factor
    sides = [grid.shard // n for n in range(1, cells + 1) if cells % n == 0]
    return max((side for side in sides if side <= limit), default=grid.factor)


def create(
    path: Path,
    *,
    grid: Grid,
    legend: Legend,
    years: Iterable[int],
    identity: dict[str, Any],
    title: str,
    source: str,
    totals: str,
) -> None:
    """Write the template of a cube, or check that the one that is there is the same.

    Parameters
    ----------
    path
        Of the Zarr store; the ledger lies beside it.
    grid, legend
        Of the cube.
    years
        Years of the cube, ascending.
    identity
        What makes this cube this cube (model checksum, store, reference year, settings): plain values. A cube with
        another identity is refused.
    title, source
        For the metadata.
    totals
        How the scenario's totals were imposed, in words, for the metadata.

    Raises
    ------
    MismatchError
        If the store holds another cube.
    """
    years = list(years)
    about = {**identity, "grid": grid.to_dict(), "legend": legend.name, "years": years}
    if (path / "zarr.json").is_file():
        have = dict(zarr.open_group(path, mode="r").attrs).get("ai4land_identity", {})
        if have != about:
            before: dict[str, Any] = have if isinstance(have, dict) else {}
            keys = sorted(k for k in {*before, *about} if before.get(k) != about.get(k))
            raise MismatchError(
                f"cube {path} was begun with another configuration (it differs in {', '.join(keys)}); "
                "restore the run file and the model, choose another name, or delete the cube and its ledger"
            )
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    group = zarr.create_group(part, zarr_format=3)
    group.attrs.update(
        {
            "Conventions": "CF-1.11",
            "title": title,
            "source": source,
            "history": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ} created by ai4land {ai4land.__version__}",
            "references": legend.references,
            "ai4land_identity": about,
        }
    )
    side, rows, cols, classes = chunk_side(grid), *grid.shape, legend.n
    _coordinates(group, grid, legend, years)
    flags = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in legend.flag_attrs().items()}
    standard = {"standard_name": "land_cover_lccs"} if legend.name.startswith("lccs") else {}
    maps = {**standard, **flags, "cell_methods": "area: mode"}
    shape, chunks, shards = (len(years), rows, cols), (1, side, side), (1, grid.shard, grid.shard)
    plane = partial(_array, group, shape=shape, dims=("time", *FINE_DIMS), chunks=chunks, shards=shards)
    blank = f"code {legend.fill.code} ({legend.fill.name}): not mapped"
    for name, text, comment in (
        ("land_cover", legend.title, f"{blank}; {totals}"),
        (
            "most_likely",
            f"{legend.title}: most likely class of each cell by itself",
            f"{blank}; class of the largest fraction, no whole-cell totals",
        ),
    ):
        plane(name, dtype="uint8", fill=legend.fill.code, attrs={"long_name": text, **maps, "comment": comment})
    for name, text in (
        ("confidence", "probability of the class in land_cover"),
        ("change_probability", "probability that the class differs from that of the reference map"),
    ):
        plane(name, dtype="uint8", fill=EMPTY, attrs={"long_name": text, **_scaled(SCALE, EMPTY)})
    _array(
        group,
        "fraction",
        dtype="uint16",
        shape=(len(years), classes, rows, cols),
        dims=("time", "class", *FINE_DIMS),
        chunks=(1, 1, side, side),
        shards=(1, classes, grid.shard, grid.shard),
        fill=FRACTION_EMPTY,
        attrs={
            "long_name": "fraction of the cell that each class covers",
            "standard_name": "area_fraction",
            **_scaled(FRACTION_SCALE, FRACTION_EMPTY),
            "comment": f"the stored numbers of a cell sum to exactly {FRACTION_SCALE}; {totals}",
            "cell_methods": "area: mean",
        },
    )
    shutil.rmtree(ledger_path(path), ignore_errors=True)
    part.replace(path)


def _scaled(scale: int, empty: int) -> dict[str, Any]:
    """Attributes of shares that are stored as whole numbers."""
    return {"units": "1", "scale_factor": 1 / scale, "_FillValue": empty, "valid_range": [0, scale]}


def _array(
    group: zarr.Group,
    name: str,
    *,
    dtype: str,
    shape: tuple[int, ...],
    dims: tuple[str, ...],
    chunks: tuple[int, ...],
    shards: tuple[int, ...],
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
        compressors=ZstdCodec(level=1),
    )


def days_since_1970(year: int, month: int = 1, day: int = 1) -> int:
    """Days from 1970-01-01 to a date of the proleptic Gregorian calendar.

    >>> days_since_1970(1970, 7, 2)
    182
    """
    return datetime.date(year, month, day).toordinal() - datetime.date(1970, 1, 1).toordinal()


def _coordinates(group: zarr.Group, grid: Grid, legend: Legend, years: list[int]) -> None:
    coords = grid.coords()
    time = {"units": "days since 1970-01-01", "calendar": "proleptic_gregorian"}
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
        "class": (
            ("class",),
            legend.codes,
            {"long_name": "class code", "flag_values": legend.codes.tolist(), "flag_meanings": " ".join(legend.names)},
        ),
    }
    for name, (dims, data, attrs) in values.items():
        array = group.create_array(
            name, shape=data.shape, dtype=data.dtype, chunks=data.shape, dimension_names=dims, attributes=attrs
        )
        array[...] = data
    reference = spatial_ref(grid.fine)
    array = group.create_array("spatial_ref", shape=(), dtype="int32", attributes=_plain(reference.attrs))
    array[...] = 0


def _plain(attrs: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(attrs, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v)))


def write_block(path: Path, block: Block, arrays: Mapping[str, NDArray[Any]]) -> str:
    """Write a shard over some years: the only function that writes cells into a cube.

    Parameters
    ----------
    path
        Of the cube.
    block
        What is written; its window must be a whole shard.
    arrays
        Stored numbers of every variable of the cube, ``(year, [class,] rows, columns)``: codes in ``land_cover`` and
        ``most_likely``, shares in ``fraction``, ``confidence`` and ``change_probability``.

    Returns
    -------
    str
        Digest of the content, for the ledger.

    Raises
    ------
    ValueError
        If the block is not a whole shard, or an array lacks or has another shape or type than the cube.
    """
    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    shard = group["land_cover"].shards[-1]  # type: ignore[union-attr, index]
    w = block.window
    if w.row % shard or w.col % shard or (w.height, w.width) != (shard, shard):
        raise ValueError(f"block {w} is not a whole shard of {shard} cells; blocks must be shards of the cube")
    if set(arrays) != set(VARIABLES):
        raise ValueError(f"block {w} has the arrays {sorted(arrays)}, expected {sorted(VARIABLES)}")
    times = _positions(group, block.years)
    digest = hashlib.blake2b(digest_size=16)
    for name in VARIABLES:
        array: Any = group[name]
        data = arrays[name]
        wanted = (len(times), *array.shape[1:-2], w.height, w.width)
        if data.shape != wanted or data.dtype != array.dtype:
            raise ValueError(f"{name} of block {w} is {data.dtype} {data.shape}, expected {array.dtype} {wanted}")
        for time, values in zip(times, data, strict=True):
            array[(time, ..., *w.slices)] = values
        digest.update(np.ascontiguousarray(data).data)
    return digest.hexdigest()


def _positions(group: zarr.Group, years: Iterable[int]) -> list[int]:
    have = {int(y): i for i, y in enumerate(np.asarray(group["year"][...]))}  # type: ignore[index]
    return [have[y] for y in years]


def ledger_path(path: Path) -> Path:
    """Folder of the ledger of a cube."""
    return path.with_suffix(".ledger")


def record(path: Path, block: Block, digest: str, notes: Mapping[str, Any] | None = None) -> None:
    """Enter a written block into the ledger, durably, with notes (plain values) on how it came out."""
    folder = ledger_path(path)
    folder.mkdir(parents=True, exist_ok=True)
    w = block.window
    entry = {"row": w.row, "col": w.col, "years": list(block.years), "digest": digest, **(notes or {})}
    line = json.dumps(entry) + "\n"
    with (folder / f"{_WRITER}-{os.getpid()}-{threading.get_ident()}.jsonl").open("a", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


_WRITER = uuid.uuid4().hex[:12]


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """Read the ledger line by line; a torn line counts for nothing."""
    for file in sorted(ledger_path(path).glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                {(entry["row"], entry["col"], year): entry["digest"] for year in entry["years"]}
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
            yield entry


def recorded(path: Path) -> dict[tuple[int, int, int], str]:
    """Read the ledger: the digest of each finished (row, column, year) of shards."""
    return {(e["row"], e["col"], year): e["digest"] for e in entries(path) for year in e["years"]}


def finish(path: Path) -> None:
    """Consolidate the metadata of a finished cube, so that it opens with one read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        zarr.consolidate_metadata(path)


def open_cube(path: Path | str) -> xr.Dataset:
    """Open a cube lazily: codes as they are, fractions and confidence as numbers of 0..1 with NaN where not mapped.

    Raises
    ------
    DataError
        If there is no cube at the path.
    """
    try:
        whole = zarr.open_group(path, mode="r").metadata.consolidated_metadata is not None
    except (FileNotFoundError, zarr.errors.GroupNotFoundError) as error:
        raise DataError(f"no cube at {path}; make one with: ai4land reconstruct RUN.yaml") from error
    times = xr.coders.CFDatetimeCoder(time_unit="s")
    ds: xr.Dataset = xr.open_zarr(path, chunks=None, decode_coords="all", decode_times=times, consolidated=whole)
    return ds
