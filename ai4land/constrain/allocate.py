"""Class maps that meet whole-number quotas: every coarse cell gets its number of cells of each class, where they fit best.

Meeting the quotas of a coarse cell with the greatest sum of scores is a transportation problem. Its dual has one price a
class: a cell takes the class with the greatest score less price. :func:`allocate` finds the prices by the Newton steps of
:mod:`ai4land.constrain.project` at falling temperature, for many coarse cells at once. The few excess cells that remain are moved along
the cheapest chains of classes (:mod:`ai4land.constrain.chains`) until every quota is met.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ai4land.constrain.chains import pass_on
from ai4land.constrain.project import segments, solve
from ai4land.constrain.quotas import fit_quotas
from ai4land.errors import DataError
from ai4land.legend import MISSING

# Scores and classes.
_BAND = 1 << 17
"""Fine cells worked on at a time."""
_MIN_SCORE = -1e4
"""Lowest score of a class relative to the best of its cell; lower scores count as this."""
_FORBIDDEN = -1e6
"""Score of a class that a cell must not get."""
_CLOSED_PRICE = 1e7
"""Price of a class with the quota 0."""
_UNSET = 254
"""Class index before of a cell to fill that has no class yet."""

# Prices, by Newton steps at falling temperature. Values were tuned for time; the quotas are met with any.
_LEAST_SHARE = 1e-9
"""Least share of a class in the smooth assignment."""
_IN_DOUBT = 4
"""Cells in doubt at the first temperature, as a multiple of the cells that must change class."""
_LEVELS = 3
"""Temperatures."""
_COOLING = 4
"""Factor between one temperature and the next."""
_STEPS = 5
"""Newton steps at a temperature."""
_PRUNING = 3
"""From the second temperature on only one cell in so many counts: those most in doubt."""
_MAX_SHIFT = 15.0
"""Largest change of a price at one temperature, in temperatures."""

# What prices leave over, moved along chains of classes.
_RETRY = 10
"""Excess cells (at least one in 250) from which on the prices are found again with all cells and more steps."""
_MARGIN = 6.0
"""Lead of the best class over the second, in last temperatures, beyond which a cell is moved only if it must."""


@dataclass(frozen=True)
class Allocation:
    """A map that meets its quotas.

    Attributes
    ----------
    land_cover
        Class indices ``(rows, columns)``, ``MISSING`` where nothing is mapped.
    unmet
        Cells of each class less its quota, ``(class, coarse rows, coarse columns)``; not 0 only where locked cells contradict
        the quotas.
    """

    land_cover: NDArray[np.uint8]
    unmet: NDArray[np.int64]


def allocate(
    scores: NDArray[np.floating],
    *,
    current: NDArray[np.uint8] | None,
    quotas: NDArray[np.integer],
    factor: int,
    keep: float | None = None,
    locked: NDArray[np.bool_] | None = None,
    mapped: NDArray[np.bool_] | None = None,
) -> Allocation:
    """Give each cell a class so that the quotas are met and the sum of the scores is nearly the greatest.

    Each coarse cell is solved by itself, and ties are broken by the place in the coarse cell, so the result does not depend on
    how a map is cut into tiles.

    Parameters
    ----------
    scores
        How well each class fits, such as log probabilities, ``(class, rows, columns)`` of whole coarse cells. Only
        differences within a cell matter; a score more than 1e4 below the best of its cell counts as 1e4 below.
    current
        Class indices before, ``(rows, columns)``; ``MISSING`` cells stay ``MISSING``. None if there is no map yet: then every
        cell of ``mapped`` is free, and ``keep`` has no effect.
    quotas
        Cells of each class, ``(class, rows / factor, columns / factor)``; they sum to the mapped cells. A negative quota means
        that the coarse cell has none: there every cell gets its best class.
    factor
        Fine cells along one side of a coarse cell.
    keep
        Added to the score of the class before. With None or infinity only net changes take place: a class that must gain loses
        no cell, a class that must lose gains none, and without quotas nothing changes.
    locked
        Cells that keep their class whatever the quotas are. Their excess over a quota is taken from the other classes in
        proportion and reported in ``unmet``.
    mapped
        Cells to fill if there is no map before, ``(rows, columns)``.

    Raises
    ------
    DataError
        If shapes do not fit, quotas do not sum to the mapped cells, an index is not a class, or a score is not a number.
    """
    n, rows, cols = scores.shape
    before = _before(current, mapped, scores.shape)
    net = current is not None and (keep is None or keep == float("inf"))
    bonus = 0.0 if current is None or keep is None or net else float(keep)
    lock = np.zeros((rows, cols), bool) if locked is None else np.asarray(locked, dtype=bool)
    crows, ccols = rows // factor, cols // factor
    if rows % factor or cols % factor or quotas.shape != (n, crows, ccols):
        raise DataError(
            f"scores are {scores.shape} and quotas {quotas.shape}, expected whole coarse cells of {factor} and "
            f"{(n, crows, ccols)}; cut them from the same window"
        )
    if lock.shape != (rows, cols):
        raise DataError(f"locked is {lock.shape}, expected {(rows, cols)}; cut it from the window of the scores")
    lock = lock & (before < n)
    real = np.float64 if scores.dtype == np.float64 else np.float32
    land_cover = np.full((rows, cols), MISSING, np.uint8)
    unmet = np.zeros(quotas.shape, np.int64)
    height = max(1, _BAND // (factor * max(cols, 1)))
    for row in range(0, crows, height):
        band = slice(row, min(row + height, crows))
        fine = slice(band.start * factor, band.stop * factor)
        x, was, held = (
            segments(torch.from_numpy(np.require(a[:, fine], kind, ["C", "W"])), factor, fill=fill)
            for a, kind, fill in ((scores, real, 0.0), (before[None], np.uint8, MISSING), (lock[None], np.bool_, False))
        )
        want = quotas[:, band].reshape(n, -1).T.astype(np.int64)
        got, miss = _allocate_segments(x, was[:, 0], held[:, 0], want, bonus=bonus, net=net)
        count = band.stop - band.start
        place = torch.from_numpy(land_cover[fine]).unflatten(1, (ccols, factor)).unflatten(0, (count, factor))
        got = got[:, : factor * factor].unflatten(1, (factor, factor)).unflatten(0, (count, ccols))
        place.copy_(got.permute(0, 2, 1, 3))
        unmet[:, band] = miss.T.reshape(n, count, ccols)
    return Allocation(land_cover, unmet)


def _allocate_segments(
    x: Tensor, was: Tensor, held: Tensor, quotas: NDArray[np.int64], *, bonus: float, net: bool
) -> tuple[Tensor, NDArray[np.int64]]:
    """Allocate coarse cells; returns classes ``(coarse cell, cell)`` and cells less quotas ``(coarse cell, class)``."""
    n = x.shape[1]
    mapped, known = was != MISSING, was < n
    before = was.clamp(max=n - 1).long()
    if bonus:
        x.scatter_add_(1, before[:, None], (known.to(x.dtype) * bonus)[:, None])
    free = mapped & ~held
    top = x.amax(1)
    if not bool(top[mapped].isfinite().all()):
        raise DataError("scores of mapped cells are not all numbers, expected a finite best score; look at the network")
    if not bool(top.isfinite().all()):
        x = torch.where(top.isfinite()[:, None], x, 0.0)
        top = torch.where(top.isfinite(), top, 0.0)
    x -= top[:, None]
    x.clamp_(min=_MIN_SCORE)

    sizes, stuck = mapped.sum(1).numpy(), _count(before, held & known, n)
    asked = np.all(quotas >= 0, axis=1)
    wrong = np.flatnonzero(asked & (quotas.sum(1) != sizes))
    if wrong.size:
        i = wrong[0]
        raise DataError(
            f"quotas of a coarse cell sum to {quotas[i].sum()}, expected its {sizes[i]} mapped cells; "
            "make them with level_quotas or class_quotas"
        )
    want = fit_quotas(quotas - stuck, sizes - stuck.sum(1)) + stuck
    want[~asked] = -1
    if net:
        have = _count(before, known, n)
        gains, loses = (torch.from_numpy(asked[:, None] & side) for side in (have < want, have > want))
        free &= loses.gather(1, before)
        own = x.gather(1, before[:, None])
        x.masked_fill_(~gains[:, :, None], _FORBIDDEN)
        x.scatter_(1, before[:, None], own)
        stuck = _count(before, known & ~free, n)
    got = torch.where(free, _fill(x, free, want - stuck, asked), before)
    unmet = np.where(asked[:, None], _count(got, mapped, n) - quotas, 0)
    return torch.where(mapped, got.to(torch.uint8), MISSING), unmet


def _fill(x: Tensor, free: Tensor, want: NDArray[np.int64], asked: NDArray[np.bool_]) -> Tensor:
    """Give every free cell its best class, or, in coarse cells with quotas, the classes that meet them best."""
    best, _ = _best(x)
    over = _count(best, free, x.shape[1]) - want
    rows = torch.from_numpy(np.flatnonzero(asked & (over != 0).any(1)))
    if not len(rows):
        return best
    every = len(rows) == len(x)
    x, free, goal = (x, free, want) if every else (x[rows], free[rows], want[rows.numpy()])
    prices, width = _prices(x, free, torch.from_numpy(over)[rows], torch.from_numpy(goal))
    x = x - prices.to(x.dtype)[:, :, None]
    priced, gap = _best(x)
    over = _count(priced, free, x.shape[1]) - goal
    hard = torch.from_numpy(np.flatnonzero(np.maximum(over, 0).sum(1) > max(_RETRY, x.shape[2] // 250)))
    if len(hard):
        again = torch.zeros_like(prices[hard])
        warm = width[hard] * _COOLING ** (_LEVELS - 1)
        again = _cool(x[hard], free[hard].to(x.dtype), torch.from_numpy(goal)[hard], again, warm, levels=_LEVELS, steps=25)
        x[hard] -= again.to(x.dtype)[:, :, None]
        priced[hard], gap[hard] = _best(x[hard])
        over[hard.numpy()] = _count(priced[hard], free[hard], x.shape[1]) - goal[hard.numpy()]
    for reach in (_MARGIN, 8 * _MARGIN, np.inf):
        todo = np.flatnonzero((over > 0).any(1))
        if not todo.size:
            break
        pick = torch.from_numpy(todo)
        near = free[pick] & (gap[pick] <= (width[pick] * reach)[:, None])
        place, cell = (i.numpy() for i in torch.nonzero(near, as_tuple=True))
        values = x[pick[place], :, cell].double().numpy()
        classes = priced[pick[place], cell].numpy()
        excess = over[todo]
        pass_on(values, place, classes, excess, limit=np.inf if np.isinf(reach) else -_FORBIDDEN / 10)
        priced[pick[place], cell] = torch.from_numpy(classes)
        over[todo] = excess
    best[rows] = priced
    return best


def _best(x: Tensor) -> tuple[Tensor, Tensor]:
    """Class with the greatest score in each cell (the first of equal ones), and its lead over the second."""
    best = torch.zeros_like(x[:, 0], dtype=torch.int64)
    top, second = x[:, 0].clone(), torch.full_like(x[:, 0], -torch.inf)
    for k in range(1, x.shape[1]):
        value = x[:, k]
        best.masked_fill_(value > top, k)
        torch.maximum(second, torch.minimum(value, top), out=second)
        torch.maximum(top, value, out=top)
    return best, top.sub_(second)


def _prices(x: Tensor, free: Tensor, over: Tensor, want: Tensor) -> tuple[Tensor, Tensor]:
    """Find prices at which the best classes nearly meet the quotas; returns them and the last temperature.

    A class with too few cells first becomes as cheap as it takes to win one. Then cells are assigned smoothly, in proportion to
    exp((score − price) / temperature), and Newton steps find the prices that meet the quotas. The first temperature puts
    several times as many cells in doubt as must change class; then it falls.
    """
    size = free.sum(1).clamp(min=1)
    far = torch.where(free, 0.0, -torch.inf).to(x.dtype)
    prices = torch.where(over < 0, (x - x.amax(1, keepdim=True) + far[:, None]).amax(2).double(), 0.0)
    prices = prices.masked_fill(want == 0, _CLOSED_PRICE)
    weight = free.to(x.dtype)
    doubt = (over.clamp(min=0).sum(1) * _IN_DOUBT).clamp(min=8).minimum(size // 2)
    _, gap = _best(x - prices.to(x.dtype)[:, :, None])
    heat = _quantile(gap.masked_fill(~free, torch.inf), doubt)
    prices = _cool(x, weight, want, prices, heat, levels=1)
    some = -(-x.shape[2] // _PRUNING // 16) * 16
    best, gap = _best(x - prices.to(x.dtype)[:, :, None])
    near = gap.masked_fill_(~free, torch.inf).topk(some, dim=1, largest=False)
    part = x.gather(2, near.indices[:, None].expand(-1, x.shape[1], -1))
    rest = torch.from_numpy(_count(best, free.scatter(1, near.indices, False), x.shape[1]))
    remaining = (want - rest).clamp(min=0)
    prices = _cool(part, weight.gather(1, near.indices), remaining, prices, heat / _COOLING, levels=_LEVELS - 1)
    return prices.masked_fill(want == 0, _CLOSED_PRICE), heat / _COOLING ** (_LEVELS - 1)


def _quantile(gap: Tensor, rank: Tensor) -> Tensor:
    """Value of a given rank in each row, estimated from every third value of a long row."""
    step = 3 if gap.shape[1] > 300 else 1
    ordered = gap[:, ::step].sort(1).values
    found = ordered.gather(1, torch.div(rank, step, rounding_mode="floor")[:, None])[:, 0]
    return found.double().clamp(min=1e-5, max=-_MIN_SCORE)


def _cool(x: Tensor, weight: Tensor, want: Tensor, prices: Tensor, heat: Tensor, *, levels: int, steps: int = _STEPS) -> Tensor:
    """Find prices at which the smooth assignment meets the quotas, at a falling temperature."""
    share = want / want.sum(1, keepdim=True).clamp(min=1).double()
    p = torch.empty_like(x)
    for _ in range(levels):
        torch.sub(x, prices.to(x.dtype)[:, :, None], out=p)
        p -= p.amax(1, keepdim=True)
        p /= heat[:, None, None].to(x.dtype)
        p.exp_().clamp_(min=_LEAST_SHARE)
        found = solve(p, weight, share, torch.zeros_like(share), tolerance=0.3 / x.shape[2], max_steps=steps)
        prices = prices - heat[:, None] * found.multipliers.clamp(-_MAX_SHIFT, _MAX_SHIFT).masked_fill(share == 0, 0.0)
        heat = heat / _COOLING
    return prices


def _count(classes: Tensor, which: Tensor, n: int) -> NDArray[np.int64]:
    """Count the cells of each class, ``(coarse cell, class)``."""
    flat = (torch.arange(len(classes))[:, None] * (n + 1) + torch.where(which, classes, n)).flatten()
    return torch.bincount(flat, minlength=len(classes) * (n + 1)).unflatten(0, (-1, n + 1))[:, :n].numpy().copy()


def _before(current: NDArray[np.uint8] | None, mapped: NDArray[np.bool_] | None, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Classes before: ``MISSING`` where not mapped, ``_UNSET`` where there is no class yet."""
    if current is None:
        if mapped is None or mapped.shape != shape[1:]:
            raise DataError(
                f"mapped is {None if mapped is None else mapped.shape}, expected {shape[1:]}; give the cells to "
                "fill if there is no map before"
            )
        return np.where(mapped, _UNSET, MISSING).astype(np.uint8)
    if current.shape != shape[1:]:
        raise DataError(f"map is {current.shape}, expected {shape[1:]}; cut it from the window of the scores")
    top = int(current[current != MISSING].max(initial=0))
    if top >= shape[0]:
        raise DataError(f"class index is {top}, expected 0..{shape[0] - 1} or {MISSING}; encode the codes with the legend")
    return current
