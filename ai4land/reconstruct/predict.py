"""Read windows of an analysis-ready store, and predict their class probabilities year by year."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from ai4land.grid import Window, coarse_window, read_window
from ai4land.model.features import FeatureSpec, features
from ai4land.model.forward import Forward
from ai4land.store.read import Source


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

    The result does not depend on how the globe is cut into windows: a window is read with the network's halo, and its origin
    lies on the network's stride.

    Parameters
    ----------
    forward
        The model, ready to run.
    source
        The store.
    window
        Fine cells; row, column, height and width must be multiples of the stride.
    spec
        The model's inputs and their normalisation.
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

    Raises
    ------
    ValueError
        If the window is off the stride.
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
