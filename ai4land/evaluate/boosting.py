"""The classical land-allocation baseline: suitability of each class by gradient boosting.

Cell by cell, boosted trees learn the class from the data in the store: the static maps, the states of the coarse cell and, with a
reference map, the classes in and around the cell and the change of the states since then; without one, the position. A network
that sees the same data must beat it under the same totals. A fit takes seconds and is deterministic, so nothing is saved.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from threadpoolctl import threadpool_limits

from ai4land.errors import ConfigError, MismatchError
from ai4land.evaluate.boosting_sample import HALO, Around, Floats, Place, change_columns, coarse_place, draw_sample, is_category
from ai4land.grid import Window
from ai4land.model.features import FeatureSpec
from ai4land.store.read import Source

_log = logging.getLogger(__name__)

ROUNDS = {True: 25, False: 50}
"""Rounds of boosting with and without a reference map; more did not improve held-out years and cells of Bavaria."""
LEARNING_RATE = 0.2
L2 = 10.0
"""Regularisation; without it leaves of little weight take huge values and boosting diverges."""
CHUNK = 1 << 11
"""Cells per call of the trees: few enough that their features stay in the cache, which is 3 times as fast."""


@dataclass(frozen=True)
class Suitability:
    """A fitted suitability, from :func:`fit_suitability`.

    Attributes
    ----------
    spec
        The static maps, and their codes where they are categorical.
    targets
        Class indices that the trees predict, ascending; every other class has probability 0.
    classes
        Class indices in the training maps, ascending; their shares around a cell are features.
    with_reference
        Whether the prediction starts from a reference map.
    threads
        Of the fit and of the prediction.
    """

    spec: FeatureSpec
    targets: tuple[int, ...]
    classes: tuple[int, ...]
    with_reference: bool
    threads: int
    _model: Any

    def predict(self, source: Source, window: Window, *, reference: int | None, year: int) -> NDArray[np.float32]:
        """Predict the class probabilities of a window; the result does not depend on how the map is cut into windows.

        Parameters
        ----------
        source
            The store.
        window
            Fine cells inside the grid.
        reference
            Year of the reference map; None for a suitability without one.
        year
            To predict.

        Returns
        -------
        numpy.ndarray
            ``(class, rows, columns)``, summing to 1 in the cells of the mask and 0 elsewhere.

        Raises
        ------
        MismatchError
            If a reference map is given to a suitability that was fitted without one, or none to one fitted with one, or if the
            store has other static maps.
        """
        if (reference is not None) != self.with_reference:
            raise MismatchError(
                f"reference is {reference}, expected {'a year' if self.with_reference else 'None'} as in the fit; "
                "fit another suitability for this case"
            )
        _check_store(source, self.spec)
        out = np.zeros((source.legend.n, window.height * window.width), dtype=np.float32)
        mapped = np.flatnonzero(np.asarray(source.mask[window.slices]))
        place = Place(source, window, self.spec, position=reference is None)
        around = None if reference is None else Around(source.map_of(reference, window.pad(HALO)), self.classes)
        cells, (row, col) = coarse_place(window, np.arange(window.height * window.width), source.grid.factor)
        wanted = source.states_of(year, cells)
        start = None if reference is None else source.states_of(reference, cells)
        with threadpool_limits(self.threads, user_api="openmp"):
            for first in range(0, mapped.size, CHUNK):
                at = mapped[first : first + CHUNK]
                parts = [place.columns(at)] if around is None else [place.columns(at), around.columns(at)]
                now = wanted[:, row[at], col[at]].T
                if start is None or reference is None:
                    parts.append(now)
                else:
                    lead = np.full(at.size, year - reference)
                    parts.append(change_columns(now, start[:, row[at], col[at]].T, lead))
                out[:, at] = self._probabilities(np.concatenate(parts, axis=1), source.legend.n)
        return out.reshape(-1, window.height, window.width)

    def _probabilities(self, columns: Floats, n: int) -> Floats:
        out = np.zeros((n, len(columns)), dtype=np.float32)
        if self._model is None:
            out[self.targets[0]] = 1.0
        else:
            out[list(self.targets)] = self._model.predict_proba(columns).T
        return out


def fit_suitability(
    source: Source,
    *,
    cells: NDArray[np.bool_],
    pairs: Iterable[tuple[int, int]],
    spec: FeatureSpec,
    with_reference: bool,
    samples: int = 60_000,
    seed: int = 0,
    iterations: int | None = None,
    leaves: int = 15,
    threads: int = 1,
) -> Suitability:
    """Fit gradient-boosted trees on a sample of the training cells and years.

    With a reference map, up to half of the sample is drawn from the cells that changed between the two years, and the rest from
    those that did not. Weights correct for this, so the probabilities are those of all cells.

    Parameters
    ----------
    source
        The store.
    cells
        Coarse cells of training, bool ``(coarse rows, coarse columns)``. Maps of other cells are not used, not even as
        neighbours.
    pairs
        (reference year, year) of training. Without a reference map only the second years are used.
    spec
        Of the same training cells, from :func:`~ai4land.train.normalise.fit_spec`.
    with_reference
        Whether to start from a reference map.
    samples
        Most cells in the sample.
    seed
        Of the sample.
    iterations, leaves
        Rounds of boosting, each of one tree per class (by default 25 with a reference map and 50 without), and most leaves of a
        tree.
    threads
        Of the fit and of the prediction; the result does not depend on it. On a busy machine several threads are many times
        slower than one, because they wait for each other after every tree.

    Raises
    ------
    ConfigError
        If ``with_reference`` is set but every pair is a year with itself.
    DataError
        If no training cell has a class in the years of training.
    MismatchError
        If the store has other static maps than ``spec``, or another coarse grid than ``cells``.
    """
    _check_store(source, spec)
    if cells.shape != tuple(source.grid.coarse.shape):
        raise MismatchError(
            f"training cells are {cells.shape}, expected {tuple(map(int, source.grid.coarse.shape))}; use the split of this store"
        )
    every = sorted(set(pairs)) if with_reference else sorted({(year, year) for _, year in pairs})
    if with_reference and all(start == year for start, year in every):
        raise ConfigError("every training pair is a year with itself, expected pairs of different years; raise split.max_lead")
    rng = np.random.default_rng([seed, 11])
    sample = draw_sample(source, cells=cells, pairs=every, spec=spec, with_reference=with_reference, samples=samples, rng=rng)
    categorical = is_category(spec) + [True] * with_reference
    categorical += [False] * (sample.columns.shape[1] - len(categorical))
    # The trees reject a feature without any value; a constant is never split on.
    sample.columns[:, ~np.isfinite(sample.columns).any(axis=0)] = 0.0
    model = None
    if np.unique(sample.target).size > 1:
        model = HistGradientBoostingClassifier(
            max_iter=iterations or ROUNDS[with_reference],
            max_leaf_nodes=leaves,
            learning_rate=LEARNING_RATE,
            l2_regularization=L2,
            early_stopping=False,
            categorical_features=categorical,
            random_state=seed,
        )
        with threadpool_limits(threads, user_api="openmp"):
            model.fit(sample.columns, sample.target, sample_weight=sample.weight)
    _log.info("suitability fitted on %d cells with %d features", *sample.columns.shape)
    return Suitability(spec, tuple(np.unique(sample.target).tolist()), sample.classes, with_reference, threads, model)


def _check_store(source: Source, spec: FeatureSpec) -> None:
    have, want = (source.static.shape[0], source.coarse.shape[1]), (len(spec.features), len(spec.states))
    if have != want:
        raise MismatchError(
            f"store has {have[0]} static maps and {have[1]} states, expected {want[0]} and {want[1]}; use the store of the training"
        )
