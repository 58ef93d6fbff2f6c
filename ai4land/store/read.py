"""Read windows of an analysis-ready store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray

from ai4land.errors import DataError, MismatchError
from ai4land.grid import Grid, Window, read_coarse, read_window
from ai4land.legend import Legend


class Source:
    """An analysis-ready store opened for prediction, without Dask.

    Attributes
    ----------
    grid, legend
        Of the store.
    static, mask, coarse, land_cover
        Its arrays: static maps ``(feature, rows, columns)``, cells to map ``(rows, columns)``, the scenario ``(year, state,
        coarse rows, coarse columns)`` and the observed maps as codes ``(observed year, rows, columns)``.
    years, observed
        Years of the scenario and of the observed maps.
    states, features
        Names of the scenario's states and of the static maps.
    """

    def __init__(self, path: Path | str) -> None:
        group = zarr.open_group(path, mode="r")
        attrs: Any = group.attrs
        self.grid = Grid.from_dict(attrs["grid"])
        self.legend = Legend(**attrs["legend"])
        arrays: list[Any] = [group[n] for n in ("static", "mask", "coarse", "land_cover")]
        self.static, self.mask, self.coarse, self.land_cover = arrays
        self.years = [int(y) for y in np.asarray(group["year"][...])]  # type: ignore[index]
        self.states, self.features = ([str(s) for s in attrs[n]] for n in ("state_names", "feature_names"))
        self.observed = [int(y) for y in np.asarray(group["observed_year"][...])]  # type: ignore[index]

    def map_of(self, year: int, window: Window) -> NDArray[np.uint8]:
        """Read the class indices of an observed map, ``MISSING`` beyond the grid."""
        plane = _Plane(self.land_cover, self.observed.index(year))
        codes = read_window(plane, window, fill=self.legend.fill.code, wrap=self.grid.wraps)
        return self.legend.encode(codes, source=f"map of {year}")

    def states_of(self, year: int, cells: Window) -> NDArray[np.float32]:
        """Read the coarse states ``(state, rows, columns)``, repeating the edge beyond the grid."""
        return read_coarse(_Plane(self.coarse, self.years.index(year)), cells, wrap=self.grid.wraps)


@dataclass(frozen=True)
class _Plane:
    """One step of the first dimension of an array, read when it is indexed."""

    array: Any
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape[1:])

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def __getitem__(self, key: Any) -> Any:
        return self.array[(self.index, *key)]


@dataclass(frozen=True, eq=False)
class WindowData:
    """Data that all years of a window share.

    Attributes
    ----------
    window
        Fine cells: whole coarse cells.
    mask
        Cells to map, ``(rows, columns)``.
    reference, reference_year
        Class indices of the reference map, ``(rows, columns)``, and its year; None without one.
    areas
        Area of a cell of each row in square metres, ``(rows,)``.
    part
        The part that is predicted: the mapped cells, on the stride of the network.
    around
        Class indices of the reference map in ``part`` and the halo of the network; None without a reference map.
    """

    window: Window
    mask: NDArray[np.bool_]
    reference: NDArray[np.uint8] | None
    reference_year: int | None
    areas: NDArray[np.float64]
    part: Window
    around: NDArray[np.uint8] | None


def read_window_data(source: Source, window: Window, *, reference: int | None, stride: int = 1, halo: int = 0) -> WindowData:
    """Read the data that all years of a window share.

    Parameters
    ----------
    window
        Fine cells: whole coarse cells inside the grid.
    reference
        Year of the reference map; None without one.
    stride, halo
        Of the network, in fine cells, if the window is predicted.
    """
    mask = np.asarray(source.mask[window.slices], dtype=bool)
    part = mapped_part(mask, window, stride)
    areas = source.grid.cell_areas()[window.slices[0]]
    if reference is None:
        return WindowData(window, mask, None, None, areas, part, None)
    outer = part.pad(halo)
    whole = outer.union(window)
    classes = source.map_of(reference, whole)
    return WindowData(window, mask, classes[window.inside(whole)], reference, areas, part, classes[outer.inside(whole)])


def mapped_part(mask: NDArray[np.bool_], window: Window, stride: int) -> Window:
    """Find the part of a window that holds its mapped cells, on the stride of the network; all of it if there are none."""
    if not mask.any():
        return window
    (top, bottom), (west, east) = (
        (int(i[0]) // stride * stride, (int(i[-1]) // stride + 1) * stride)
        for i in map(np.flatnonzero, (mask.any(1), mask.any(0)))
    )
    return Window(window.row + top, window.col + west, bottom - top, east - west)


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
    """Return whether the store exists; refuse one with another identity.

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
