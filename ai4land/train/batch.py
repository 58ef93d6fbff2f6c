"""From the analysis-ready store to batches of patches.

The loader reads whole shards ahead of time in threads, through xbatcher from the lazily opened store, and cuts patches at
random origins from memory. Batches depend only on the seed and the step, so training resumes exactly where it stopped.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from xbatcher import BatchGenerator
from xbatcher.generators import BatchSchema

from ai4land.errors import DataError
from ai4land.grid import FINE_DIMS, Grid, Window, coarse_slices, coarse_window, read_coarse
from ai4land.legend import MISSING, Legend
from ai4land.model.features import FeatureSpec, features
from ai4land.train.normalise import trained

_READERS = 2
"""Threads that read shards."""
_LAYOUTS = 3
"""Random layouts of patches over each shard of a visit."""


@dataclass(frozen=True)
class Batch:
    """A batch of patches as tensors; ``static`` is float16, ``target`` is ``MISSING`` where a cell is not scored."""

    static: torch.Tensor
    reference: torch.Tensor
    coarse: torch.Tensor
    offset: torch.Tensor
    target: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """Move to a device."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def pinned(self) -> Batch:
        """Copy into page-locked memory, from which a CUDA device can copy while it computes; PyTorch reuses the buffers."""
        return Batch(*(getattr(self, f.name).pin_memory() for f in fields(self)))


@dataclass(frozen=True)
class _Tile:
    """A shard in memory: ``maps`` of class indices by year, ``scored`` (possible target) cells, and the ``moving`` ones."""

    window: Window
    static: NDArray[np.float16]
    maps: dict[int, NDArray[np.uint8]]
    scored: NDArray[np.bool_]
    moving: NDArray[np.bool_]


class PatchLoader:
    """Batches of random patches from the store.

    A *visit* draws ``mix`` shards with odds by their possible target cells, and cuts ``visit`` batches from a few layouts of
    patches with random origins. Patches lie within a shard; those with more scored cells are drawn more often. Raises
    DataError if no cell may be a target.

    Parameters
    ----------
    open_store
        Opens the store lazily, without Dask.
    cells
        Coarse cells whose fine cells may be targets, bool ``(coarse rows, coarse columns)``.
    pairs
        (reference year, year) to draw from.
    patch, batch
        Side of a patch in fine cells, and patches per batch.
    mask_all, mask_some
        Shares of patches without the reference map, and with holes in it.
    disturb
        Approximate share of the cells of a visible reference map that :func:`disturbed` changes.
    focus
        Share of patches drawn by their cells that change over the years instead of by their scored cells.
    turn
        Mirror and turn each patch at random, in one of the eight symmetries of a square.
    visit, mix, keep
        Batches per visit, shards per visit, and shards kept in memory.
    rank, world
        This process takes the patches ``rank::world`` of every batch.
    """

    def __init__(
        self,
        open_store: Callable[[], xr.Dataset],
        *,
        grid: Grid,
        legend: Legend,
        spec: FeatureSpec,
        cells: NDArray[np.bool_],
        pairs: tuple[tuple[int, int], ...],
        patch: int,
        batch: int,
        seed: int = 0,
        mask_all: float = 0.0,
        mask_some: float = 0.0,
        disturb: float = 0.0,
        focus: float = 0.0,
        turn: bool = False,
        visit: int = 16,
        mix: int = 8,
        keep: int = 16,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.grid, self.legend, self.spec = grid, legend, spec
        self.pairs, self.patch, self.batch, self.seed = pairs, patch, batch, seed
        self.mask_all, self.mask_some, self.disturb, self.focus, self.turn = mask_all, mask_some, disturb, focus, turn
        self.visit, self.mix, self.keep = visit, mix, max(keep, mix)
        self.rank, self.world = rank, world
        self.years = sorted({year for pair in pairs for year in pair})
        store = open_store()
        # A slice: selecting a list of years costs Zarr ten times the time and memory.
        observed = [int(y) for y in store["observed_year"].values]
        place = [observed.index(y) for y in self.years]
        ds = store[["static", "land_cover", "mask"]].isel(observed_year=slice(min(place), max(place) + 1))
        sizes = {
            **dict.fromkeys(FINE_DIMS, grid.shard),
            "feature": ds.sizes["feature"],
            "observed_year": ds.sizes["observed_year"],
        }
        self._shards = BatchGenerator(ds, input_dims=sizes)
        self._windows = grid.shards()
        self._scored = partial(trained, ds, cells=cells, factor=grid.factor)
        some = [bool(cells[coarse_slices(w, grid.factor)].any()) for w in self._windows]
        counts = np.array([self._scored(w).sum() if n else 0 for w, n in zip(self._windows, some, strict=True)], dtype=np.float64)
        if not counts.any():
            raise DataError("no fine cell may be a target, expected some; widen the land mask or the split")
        self._odds = counts / counts.sum()
        self._coarse = dict(zip(self.years, store["coarse"].sel(year=self.years).values, strict=True))
        self._cache: OrderedDict[int, _Tile] = OrderedDict()
        self._coming: dict[int, Future[_Tile]] = {}
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="shards")

    def _tile(self, index: int) -> _Tile:
        """Return a shard from memory, or wait for the thread that reads it."""
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        reading = self._coming.pop(index, None) or self._readers.submit(self._read, index)
        tile = self._cache[index] = reading.result()
        while len(self._cache) > self.keep:
            self._cache.popitem(last=False)
        return tile

    def _read_ahead(self, shards: Iterable[int]) -> None:
        """Start reading those shards in threads that are not in memory."""
        for index in shards:
            if index not in self._cache and index not in self._coming:
                self._coming[index] = self._readers.submit(self._read, index)

    def _read(self, index: int) -> _Tile:
        """Read a shard with xbatcher: all static maps and all years at once."""
        data, window = self._shards[index], self._windows[index]
        codes = data["land_cover"].sel(observed_year=self.years).transpose("observed_year", *FINE_DIMS).values
        maps = {year: self.legend.encode(m, source=f"map of {year}") for year, m in zip(self.years, codes, strict=True)}
        scored = self._scored(window)
        return _Tile(
            window,
            self.spec.static_channels(data["static"].transpose("feature", *FINE_DIMS).values),
            maps,
            scored,
            scored & (codes != codes[:1]).any(axis=0),
        )

    def _drawn(self, visit: int) -> tuple[list[int], np.random.Generator]:
        """Draw the shards of a visit; return them with the generator that also draws its patches."""
        rng = np.random.default_rng([self.seed, 1, visit])
        some = min(self.mix, int(np.count_nonzero(self._odds)))
        return rng.choice(len(self._windows), size=some, p=self._odds, replace=False).tolist(), rng

    def _patches(self, visit: int, *, last: bool) -> Iterator[tuple[_Tile, Window, tuple[int, int], np.random.Generator]]:
        """Draw the patches of a visit in order; unless it is the last, read the shards of the next visit meanwhile."""
        drawn, rng = self._drawn(visit)
        self._read_ahead(drawn)
        places: list[tuple[int, Window]] = []
        scored: list[int] = []
        moving: list[int] = []
        for index in drawn * _LAYOUTS:
            tile = self._tile(index)
            jitter = [int(rng.integers(0, min(self.patch, self.grid.shard - self.patch + 1))) for _ in FINE_DIMS]
            inside = xr.Dataset({"scored": (FINE_DIMS, tile.scored)}).isel(
                {d: slice(j, None) for d, j in zip(FINE_DIMS, jitter, strict=True)}
            )
            # Concatenated bins would put all selectors into one list under one key.
            layout = BatchSchema(inside, input_dims=dict.fromkeys(FINE_DIMS, self.patch), concat_input_bins=False)
            for selector in layout.selectors.values():
                row, col = (selector[0][d].start + j for d, j in zip(FINE_DIMS, jitter, strict=True))
                place = Window(row, col, self.patch, self.patch)
                places.append((index, place))
                scored.append(int(tile.scored[place.slices].sum()))
                moving.append(int(tile.moving[place.slices].sum()) if self.focus else 0)
        if not last:
            self._read_ahead(self._drawn(visit + 1)[0])
        weights = _odds(scored)
        if any(moving):
            weights = self.focus * _odds(moving) + (1 - self.focus) * weights
        for number in rng.choice(len(places), size=self.visit * self.batch, p=weights):
            index, place = places[number]
            pair = self.pairs[int(rng.integers(len(self.pairs)))]
            yield self._tile(index), place, pair, np.random.default_rng(rng.integers(2**63))

    def _cut(self, tile: _Tile, place: Window, pair: tuple[int, int], rng: np.random.Generator) -> tuple[Any, ...]:
        """Cut one patch and make its model input."""
        year0, year = pair
        cut = place.slices
        seen = tile.maps[year0][cut]
        reference: NDArray[np.uint8] | None = seen
        draw = rng.random()
        if draw < self.mask_all:
            reference = None
        elif draw < self.mask_all + self.mask_some:
            reference = np.where(holes(seen.shape, rng), MISSING, seen).astype(np.uint8)
        if reference is not None and self.disturb:
            reference = disturbed(reference, rng, share=self.disturb, n=self.legend.n)
        window = Window(tile.window.row + place.row, tile.window.col + place.col, place.height, place.width)
        cells, offset = coarse_window(window, self.grid.factor)
        wanted = read_coarse(self._coarse[year], cells, wrap=self.grid.wraps)
        start = read_coarse(self._coarse[year0], cells, wrap=self.grid.wraps)
        made = features(
            tile.static[(slice(None), *cut)],
            reference=reference,
            wanted=wanted,
            start=start,
            lead=year - year0,
            spec=self.spec,
            place=self.grid.coarse_centres(cells),
        )
        target = np.where(tile.scored[cut], tile.maps[year][cut], MISSING).astype(np.uint8)
        patch = made.static, made.reference, made.coarse, offset, target
        return turned(patch, self.grid.factor, way=int(rng.integers(8))) if self.turn else patch

    def batches(self, first: int = 0, last: int | None = None) -> Iterator[Batch]:
        """Yield the batches of steps ``first`` to ``last`` (exclusive; None: without end)."""
        step = first
        while last is None or step < last:
            visit, skip = divmod(step, self.visit)
            ends = last is not None and (visit + 1) * self.visit >= last
            patches = list(self._patches(visit, last=ends))[skip * self.batch :]
            for start in range(0, len(patches), self.batch):
                if last is not None and step >= last:
                    return
                chosen = patches[start + self.rank : start + self.batch : self.world]
                columns = list(zip(*(self._cut(*patch) for patch in chosen), strict=True))
                static, reference, coarse, target = (torch.from_numpy(np.stack(columns[i])) for i in (0, 1, 2, 4))
                yield Batch(static, reference, coarse, torch.tensor(columns[3], dtype=torch.int64), target)
                step += 1


def _odds(counts: list[int]) -> NDArray[np.float64]:
    """Return odds in proportion to counts, or equal odds if all counts are 0."""
    weights = np.array(counts, dtype=np.float64)
    return weights / weights.sum() if weights.any() else np.full(len(counts), 1 / len(counts))


def turned(patch: tuple[Any, ...], factor: int, *, way: int) -> tuple[Any, ...]:
    """Mirror and transpose a patch (the fields of a :class:`Batch`, in order) together with the coarse cells around it.

    ``factor`` is the number of fine cells along one side of a coarse cell. ``way`` is the sum of 1 to mirror the rows, 2 to
    mirror the columns, and 4 to swap rows and columns.
    """
    static, reference, coarse, offset, target = patch
    size, cells = target.shape, coarse.shape[-2:]
    mirrored = [bool(way & 1), bool(way & 2)]
    order = (slice(None, None, -1) if mirrored[0] else slice(None), slice(None, None, -1) if mirrored[1] else slice(None))
    offset = tuple(cells[i] * factor - offset[i] - size[i] if mirrored[i] else offset[i] for i in range(2))
    arrays = [a[(..., *order)] for a in (static, reference, coarse, target)]
    if way & 4:
        arrays, offset = [a.swapaxes(-1, -2) for a in arrays], offset[::-1]
    return arrays[0], arrays[1], arrays[2], offset, arrays[3]


def disturbed(index: NDArray[np.uint8], rng: np.random.Generator, *, share: float, n: int) -> NDArray[np.uint8]:
    """Change about a ``share`` of a map's cells to one of ``n`` classes from nearby, as if the map were of another year.

    From the disturbed map the network learns to restore the true one, if there are no maps of two years to learn change
    from. ``index`` holds class indices ``(rows, columns)``; ``MISSING`` cells stay. Changed patches are 1 to 6 cells large
    and take the class of a cell about 1 cell away; some classes spread more than others. The share is approximate because
    patches overlap and many draw their own class.
    """
    out = index.copy()
    rows, cols = index.shape
    spread = rng.normal(0, 1.5, n)
    for height, width, part in ((1, 1, 0.3), (1, 2, 0.4), (2, 2, 0.2), (2, 3, 0.1)):
        count = rng.poisson(13 * share * part * index.size / (height * width))
        row, col = rng.integers(0, rows, count), rng.integers(0, cols, count)
        near = index[
            np.clip(row + np.rint(rng.normal(0, 1.0, count)).astype(int), 0, rows - 1),
            np.clip(col + np.rint(rng.normal(0, 1.4, count)).astype(int), 0, cols - 1),
        ]
        here = index[row, col]
        free = (near != here) & (near != MISSING) & (here != MISSING)
        row, col, near, here = row[free], col[free], near[free], here[free]
        wins = rng.random(len(row)) < 1 / (1 + np.exp(spread[here] - spread[near]))
        for i in range(height):
            for j in range(width):
                r, c = np.minimum(row[wins] + i, rows - 1), np.minimum(col[wins] + j, cols - 1)
                known = index[r, c] != MISSING
                out[r[known], c[known]] = near[wins][known]
    return out


def holes(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Draw rectangular holes until they cover at least 30 % of a patch; return the mask of missing cells."""
    out = np.zeros(shape, dtype=bool)
    while out.mean() < 0.3:
        row, col = (int(rng.integers(0, n)) for n in shape)
        height, width = (int(rng.integers(n // 8 + 1, n // 2 + 2)) for n in shape)
        out[row : row + height, col : col + width] = True
    return out


def prefetched(batches: Iterator[Batch], *, depth: int = 4, pin: bool = False) -> Generator[Batch, None, None]:
    """Make batches in a thread, up to ``depth`` ahead, in page-locked memory if ``pin``; errors there are raised here."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: Batch | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for batch in batches:
                if not put(batch.pinned() if pin else batch):
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
