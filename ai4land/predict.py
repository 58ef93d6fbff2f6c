"""From the analysis-ready store to class probabilities of a window, year by year."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from ai4land.features import FeatureSpec, features
from ai4land.forward import Forward
from ai4land.grid import Grid, Window, coarse_window, read_coarse, read_window
from ai4land.legend import Legend


class Source:
    """The arrays of an analysis-ready store that prediction reads, opened without Dask.

    Parameters
    ----------
    path
        Of the store.
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
        """Class indices of an observed map, ``MISSING`` beyond the grid."""
        plane = _Plane(self.land_cover, self.observed.index(year))
        codes = read_window(plane, window, fill=self.legend.fill.code, wrap=self.grid.wraps)
        return self.legend.encode(codes, source=f"map of {year}")

    def states_of(self, year: int, cells: Window) -> NDArray[np.float32]:
        """Coarse states ``(state, rows, columns)``, the edge repeated beyond the grid."""
        return read_coarse(_Plane(self.coarse, self.years.index(year)), cells, wrap=self.grid.wraps)


@dataclass(frozen=True)
class _Plane:
    """One step of the first dimension of an array, read when it is cut."""

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
    """What all years of a window have in common, read once.

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
    """Read what all years of a window have in common.

    Parameters
    ----------
    source
        The store.
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


def predict(
    forward: Forward,
    source: Source,
    window: Window,
    *,
    spec: FeatureSpec,
    reference: int | None,
    years: Iterable[int],
    around: NDArray[np.uint8] | None = None,
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Predict the class probabilities of a window, year by year.

    The result does not depend on how the globe is cut into windows: the window is read with the halo of the network and
    its origin lies on the network's stride.

    Parameters
    ----------
    forward
        The model, ready to run.
    source
        The store.
    window
        Fine cells; row, column, height and width must be multiples of the stride.
    spec
        Of the model.
    reference
        Year of the reference map; None to predict without one.
    years
        To predict, in any order.
    around
        Class indices of the reference map in the window and the halo of the network, if they have been read.

    Yields
    ------
    year, probabilities
        Float32 ``(class, rows, columns)``.
    """
    if any(v % forward.stride for v in (window.row, window.col, window.height, window.width)):
        raise ValueError(f"window {window} is off the network's stride of {forward.stride} cells; use whole shards")
    outer = window.pad(forward.halo)
    grid = source.grid
    static = spec.static_channels(read_window(source.static, outer, fill=np.nan, wrap=grid.wraps))
    known = around if around is not None or reference is None else source.map_of(reference, outer)
    cells, offset = coarse_window(outer, grid.factor)
    start = None if reference is None else source.states_of(reference, cells)
    begun = False
    for year in years:
        wanted = source.states_of(year, cells)
        lead = 0 if reference is None else year - reference
        then = wanted if start is None else start
        made = features(
            static, reference=known, wanted=wanted, start=then, lead=lead, spec=spec, place=grid.coarse_centres(cells)
        )
        if not begun:
            forward.begin(made.static, made.reference, offset=offset)
            begun = True
        yield year, forward.probabilities(made.coarse)
