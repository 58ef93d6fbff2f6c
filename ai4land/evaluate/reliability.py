"""Reliability of probabilities: of the events predicted with 0.8, eight in ten should come true.

Sums over bins of the probability, weighted by area, that add up over windows and years (:class:`Reliability`). The bins of
the diagram are wide and equal (Guo et al. 2017, ICML, arXiv:1706.04599); fine ones, finest near 0 where the probabilities of
change lie, give the area under the curves that rank cells.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ai4land.errors import DataError
from ai4land.evaluate.scores import ratio

BINS = 15
"""Equal bins of the reliability diagram, as in Guo et al. (2017)."""
_FINE = 4096


@dataclass
class Reliability:
    """Sums over cells of the predicted probability of an event and of the event itself.

    ``bins`` is the area, the area times the probability, and the area where the event came true, by bin; ``ranks`` the area
    where it did not and where it did come true, by fine bin; ``squares`` the area times the squared error; ``area`` that of all
    cells added, with a probability or not.
    """

    bins: NDArray[np.float64] = field(default_factory=lambda: np.zeros((3, BINS)))
    ranks: NDArray[np.float64] = field(default_factory=lambda: np.zeros((2, _FINE)))
    squares: float = 0.0
    area: float = 0.0

    def add(
        self, probability: NDArray[np.floating], event: NDArray[np.bool_], areas: NDArray[np.float64], *, source: str
    ) -> None:
        """Add cells.

        Parameters
        ----------
        probability, event, areas
            Of the cells, ``(cells,)``; a probability from 0 to 1, NaN where there is none.
        source
            Names the probabilities in an error.

        Raises
        ------
        DataError
            If a probability is outside 0 to 1.
        """
        self.area += float(areas.sum())
        given = np.isfinite(probability)
        p, y, w = probability[given].astype(np.float64), event[given], areas[given]
        low, high = float(p.min(initial=0.0)), float(p.max(initial=0.0))
        if low < -1e-6 or high > 1 + 1e-6:
            raise DataError(
                f"{source} ranges from {low:g} to {high:g}, expected 0..1 or NaN; divide scaled values by their scale"
            )
        p = p.clip(0, 1)
        place = np.maximum(np.ceil(p * BINS).astype(np.intp) - 1, 0)
        self.bins += [np.bincount(place, weights=v, minlength=BINS) for v in (w, w * p, w * y)]
        rank = np.minimum((np.sqrt(p) * _FINE).astype(np.intp), _FINE - 1)
        self.ranks += np.bincount(y * _FINE + rank, weights=w, minlength=2 * _FINE).reshape(2, _FINE)
        self.squares += float((w * (p - y) ** 2).sum())

    def table(self) -> dict[str, Any]:
        """Give the reliability diagram and the expected calibration error.

        Returns
        -------
        dict
            ``expected_calibration_error``: Σ over bins of share · abs(how often it came true − mean probability);
            ``covered``, the share of the area that has a probability; and ``bins``, each with ``from`` (left out) and ``to``
            (included), the mean ``confidence`` (probability), ``accuracy`` (how often it came true) and the ``share`` of the
            covered area. None where a bin, or everything, is empty.
        """
        area, weighted, true = self.bins
        total = float(area.sum())
        return {
            "expected_calibration_error": ratio(float(np.abs(true - weighted).sum()), total),
            "covered": ratio(total, self.area),
            "bins": [
                {
                    "from": k / BINS,
                    "to": (k + 1) / BINS,
                    "confidence": ratio(weighted[k], area[k]),
                    "accuracy": ratio(true[k], area[k]),
                    "share": ratio(area[k], total),
                }
                for k in range(BINS)
            ],
        }

    def event_table(self) -> dict[str, Any]:
        """Give :meth:`table` and the skill of the probability of an event.

        Returns
        -------
        dict
            Besides the table: ``brier``, the mean squared error (Brier 1950); ``rate``, how often the event came true;
            ``auc``, the area under the ROC curve: the chance that a cell where it came true has the higher probability than one
            where it did not, ties counted half; ``average_precision``, Σ over thresholds of precision · step of recall, for
            which the ``rate`` is what chance reaches. None where the event always or never came true.
        """
        never, ever = self.ranks[:, ::-1]
        none, all_ = float(never.sum()), float(ever.sum())
        found, false = np.cumsum(ever), np.cumsum(never)
        pairs = float((never * (found - ever / 2)).sum())
        drawn = ever > 0
        precision = float((ever[drawn] * found[drawn] / (found + false)[drawn]).sum())
        both = none > 0 and all_ > 0
        return {
            **self.table(),
            "brier": ratio(self.squares, none + all_),
            "rate": ratio(all_, none + all_),
            "auc": pairs / (none * all_) if both else None,
            "average_precision": precision / all_ if both else None,
        }
