"""One analysis-ready store: maps, static layers and coarse states on one grid, with exact coordinates.

Zarr v3, sharded. Fine arrays have the shards of the grid; the coarse states stay coarse. The store is written beside its
place and moved there when it is whole, so a store that exists is complete. It says in its attributes what it was made
from (``identity``), and a store made from anything else is refused.
"""

from __future__ import annotations

import glob
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import xarray as xr
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from ai4land.errors import DataError, MismatchError
from ai4land.gaps import check_finite, fill_gaps
from ai4land.grid import COARSE_DIMS, FINE_DIMS, Grid
from ai4land.legend import Legend
from ai4land.template import chunk_side

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layer:
    """A static map to be read: ``read()`` gives it on the fine grid, NaN where it has no value."""

    name: str
    categorical: bool
    read: Callable[[], xr.DataArray]


def write_store(
    path: Path,
    *,
    grid: Grid,
    legend: Legend,
    mask: NDArray[np.bool_],
    maps: Iterable[tuple[int, NDArray[np.uint8]]],
    observed_years: list[int],
    coarse: xr.DataArray,
    layers: list[Layer],
    identity: dict[str, Any],
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write the analysis-ready store.

    Parameters
    ----------
    path
        Of the store to make.
    grid, legend
        Of the run.
    mask
        Fine cells that are mapped.
    maps
        Year and class codes on the fine grid, for each of ``observed_years`` in order.
    coarse
        Scenario, ``(year, state, coarse_latitude, coarse_longitude)`` on ``grid.coarse``.
    layers
        Static maps. Gaps inside the mask are filled from the nearest cell that has a value.
    identity
        What the store is made from: plain values.
    progress
        Called with a line about each step.

    Raises
    ------
    DataError
        If a layer has no value in the mask, or a map has no class there.
    """
    tell = progress or _log.info
    part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    _sweep(path)
    part.parent.mkdir(parents=True, exist_ok=True)
    group = zarr.create_group(part, zarr_format=3)
    side, shape, shard = chunk_side(grid), grid.shape, grid.shard

    def create(name: str, lead: tuple[int, ...], dims: tuple[str, ...], dtype: str, fill: float, whole: int) -> Any:
        return group.create_array(
            name,
            shape=(*lead, *shape),
            dtype=dtype,
            chunks=(*lead[:whole], *(1,) * (len(lead) - whole), side, side),
            shards=(*lead[:whole], *(1,) * (len(lead) - whole), shard, shard),
            fill_value=fill,
            dimension_names=(*dims, *FINE_DIMS),
            compressors=ZstdCodec(level=3),
        )

    try:
        for name, values in grid.coords().items():
            _coordinate(group, name, name, values)
        _coordinate(group, "feature", "feature", np.array([layer.name for layer in layers]))
        _coordinate(group, "categorical", "feature", np.array([layer.categorical for layer in layers]))
        _coordinate(group, "year", "year", coarse["year"].values.astype(np.int64))
        _coordinate(group, "observed_year", "observed_year", np.array(observed_years, dtype=np.int64))
        _coordinate(group, "state", "state", coarse["state"].values.astype(str))
        create("mask", (), (), "uint8", 0, 0)[...] = mask.astype(np.uint8)
        tell(f"scenario: {coarse.sizes['year']} years of {coarse.sizes['state']} states")
        states = group.create_array(
            "coarse",
            shape=coarse.shape,
            dtype="float32",
            chunks=(1, *coarse.shape[1:]),
            fill_value=np.nan,
            dimension_names=("year", "state", *COARSE_DIMS),
            compressors=ZstdCodec(level=3),
        )
        states[...] = coarse.values.astype(np.float32)
        static = create("static", (len(layers),), ("feature",), "float32", np.nan, 1)
        fields = np.empty((len(layers), *shape), dtype=np.float32)
        for index, layer in enumerate(layers):
            fields[index] = _static(layer, mask, grid, tell)
        static[...] = fields
        cover = create("land_cover", (len(observed_years),), ("observed_year",), "uint8", legend.fill.code, 0)
        for index, (wanted, (year, codes)) in enumerate(zip(observed_years, maps, strict=True)):
            if year != wanted:
                raise DataError(f"maps come with year {year}, expected {wanted}; give them in the order of the years")
            if not (codes[mask] != legend.fill.code).any():
                raise DataError(f"map of {year} has no class on any mapped cell, expected land; look at the file")
            cover[index] = codes
            tell(f"land cover: {year}")
        group.attrs.update({"grid": grid.to_dict(), "legend": legend.model_dump(mode="json"), "identity": identity})
        if path.exists():
            shutil.rmtree(path)
        part.replace(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Remove what killed processes of this machine have left of the store."""
    mark = f".{path.name}.{socket.gethostname()}."
    for left in path.parent.glob(f"{glob.escape(mark)}*.part"):
        pid = left.name.removeprefix(mark).removesuffix(".part")
        if pid.isdecimal() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            shutil.rmtree(left, ignore_errors=True)


def _static(layer: Layer, mask: NDArray[np.bool_], grid: Grid, tell: Callable[[str], None]) -> NDArray[np.float32]:
    field = np.asarray(layer.read().values, dtype=np.float32)
    if not np.isfinite(field[mask]).any():
        raise DataError(
            f"static layer {layer.name} is all nodata on the mapped cells, expected values; look at its file, grid and longitudes"
        )
    field, share = fill_gaps(field, mask=mask)
    check_finite(layer.name, field, mask=mask, grid=grid)
    filled = f", {share:.2%} of the cells filled from the nearest" if share else ""
    tell(f"static layer: {layer.name}{filled}")
    return field


def _coordinate(group: zarr.Group, name: str, dim: str, values: NDArray[Any]) -> None:
    if values.dtype.kind == "U":
        group.attrs[f"{name}_names"] = [str(v) for v in values]
        values = np.arange(len(values))
    array = group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=values.shape, dimension_names=(dim,))
    array[...] = values


def open_store(path: Path | str) -> xr.Dataset:
    """Open an analysis-ready store lazily, without Dask.

    Raises
    ------
    DataError
        If there is no store.
    """
    if not (Path(path) / "zarr.json").is_file():
        raise DataError(f"no analysis-ready store at {path}; make one with: ai4land align RUN.yaml")
    ds = xr.open_zarr(path, chunks=None, consolidated=False)
    names = {name: np.array(ds.attrs[f"{name}_names"]) for name in ("feature", "state")}
    return ds.assign_coords(names).set_coords("categorical")


def check_identity(path: Path, identity: dict[str, Any]) -> bool:
    """Tell whether the store exists; refuse one that was made from something else.

    Raises
    ------
    MismatchError
        Naming what differs.
    """
    if not (path / "zarr.json").is_file():
        return False
    attrs: Any = zarr.open_group(path, mode="r").attrs
    have = attrs.get("identity", {})
    if have != identity:
        keys = sorted(k for k in {*have, *identity} if have.get(k) != identity.get(k))
        raise MismatchError(
            f"store {path} was made with another configuration (it differs in {', '.join(keys)}); "
            "restore the run file, choose another name, or delete the store"
        )
    return True
