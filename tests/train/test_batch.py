from __future__ import annotations

import itertools
import threading
import tracemalloc
from functools import partial

import dask.array as da
import numpy as np
import pytest
import torch
import xarray as xr
import zarr

from ai4land.errors import DataError
from ai4land.grid import COARSE_DIMS, FINE_DIMS, make_grid
from ai4land.legend import MISSING, load_legend
from ai4land.model.features import Feature, FeatureSpec
from ai4land.model.unet import interpolate
from ai4land.store.read import open_store
from ai4land.train.batch import Batch, PatchLoader, disturbed, holes, prefetched, turned
from ai4land.train.losses import coarse_parts
from ai4land.train.normalise import fit_spec

PAIRS = ((2000, 2001), (2000, 2002), (2002, 2000))


def make(tiny, *, cells=None, pairs=PAIRS, **changes):
    cells = np.ones(tiny.grid.coarse.shape, bool) if cells is None else cells
    store = open_store(tiny.path)
    spec = fit_spec(store, cells=cells, pairs=pairs, codes=tiny.legend.codes.tolist(), factor=tiny.grid.factor)
    settings = {"patch": 16, "batch": 4, "seed": 3, **changes}
    return PatchLoader(
        partial(open_store, tiny.path), grid=tiny.grid, legend=tiny.legend, spec=spec, cells=cells, pairs=pairs, **settings
    )


def same(a: Batch, b: Batch) -> bool:
    names = ("static", "reference", "coarse", "offset", "target")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in names)


def test_shapes_and_types(tiny_store):
    loader = make(tiny_store)
    batch = next(loader.batches())
    assert batch.static.shape == (4, 3, 16, 16) and batch.static.dtype == torch.float16
    assert batch.reference.shape == batch.target.shape == (4, 16, 16)
    assert batch.coarse.shape == (4, len(loader.spec.coarse_names), 5, 5)
    assert batch.offset.shape == (4, 2)
    assert torch.isfinite(batch.static).all() and torch.isfinite(batch.coarse).all()


def test_sequence_depends_on_seed_and_step_alone(tiny_store):
    whole = list(make(tiny_store).batches(0, 20))
    assert all(same(a, b) for a, b in zip(whole, make(tiny_store, keep=4).batches(0, 20), strict=True))
    for first in (1, 7, 8, 19):
        assert same(whole[first], next(make(tiny_store).batches(first)))
    assert not same(whole[0], next(make(tiny_store, seed=4).batches()))
    assert not same(whole[0], whole[1])


def test_ranks_share_the_batch_of_one_process(tiny_store):
    whole = next(make(tiny_store).batches())
    parts = [next(make(tiny_store, rank=rank, world=2).batches()) for rank in (0, 1)]
    for rank, part in enumerate(parts):
        assert torch.equal(part.target, whole.target[rank::2])


def test_patches_hold_what_the_store_holds(tiny_store):
    """Find each patch's reference map in the store again by brute force."""
    store = open_store(tiny_store.path)
    loader = make(tiny_store, pairs=((2000, 2002),))
    maps = {year: tiny_store.legend.encode(store["land_cover"].sel(observed_year=year).values) for year in (2000, 2002)}
    mask = store["mask"].values.astype(bool)
    batch = next(loader.batches())
    for reference, target in zip(batch.reference.numpy(), batch.target.numpy(), strict=True):
        places = [
            (r, c)
            for r in range(64 - 15)
            for c in range(128 - 15)
            if np.array_equal(maps[2000][r : r + 16, c : c + 16], reference)
        ]
        assert len(places) == 1
        r, c = places[0]
        assert r // 32 == (r + 15) // 32 and c // 32 == (c + 15) // 32
        truth = np.where(mask, maps[2002], MISSING)[r : r + 16, c : c + 16]
        assert np.array_equal(truth, target)


def test_targets_stay_within_the_given_cells(tiny_store):
    cells = np.zeros(tiny_store.grid.coarse.shape, bool)
    cells[:, :6] = True
    scored = sum(int((b.target != MISSING).sum()) for b in make(tiny_store, cells=cells).batches(0, 8))
    assert scored > 0
    store = open_store(tiny_store.path)
    land = np.kron(cells, np.ones((8, 8), bool)) & store["mask"].values.astype(bool)
    for batch in make(tiny_store, cells=cells, pairs=((2000, 2000),), patch=8).batches(0, 8):
        for target in batch.target.numpy():
            assert (target != MISSING).sum() <= land.sum()


def test_every_batch_has_something_to_score_where_little_is(tiny_store):
    """A visit takes shards that have cells to score, each of them once, with many layouts of patches."""
    cells = np.zeros(tiny_store.grid.coarse.shape, bool)
    cells[3, [3, 11]] = True
    loader = make(tiny_store, cells=cells, patch=8, batch=2, visit=8)
    assert 0 < np.count_nonzero(loader._odds) < len(loader._odds)
    assert all(bool((b.target != MISSING).any()) for b in loader.batches(0, 64))


def test_patches_cover_the_whole_shard(tiny_store):
    """Every cell of a shard comes up, the last rows and columns too, and most of them in the first visit."""
    loader = make(tiny_store, patch=8, batch=16, visit=8)
    seen = np.zeros((len(loader._windows), 32, 32), bool)
    for visit in range(24):
        for tile, place, _, _ in loader._patches(visit, last=True):
            seen[loader._windows.index(tile.window)][place.slices] = True
        if not visit:
            assert seen.mean() > 0.4
    mask = open_store(tiny_store.path)["mask"].values.astype(bool)
    land = np.stack([mask[w.slices] for w in loader._windows])
    assert seen[land].mean() > 0.97
    assert all(seen[:, i].any() and seen[:, :, i].any() for i in range(32))


def test_patches_of_a_visit_lie_in_many_places(tiny_store):
    batches = list(make(tiny_store, patch=8, batch=8).batches(0, 8))
    seen = {r.numpy().tobytes() for b in batches for r in b.static}
    assert len(seen) > 50


def test_masking_hides_the_reference_map(tiny_store):
    hidden = next(make(tiny_store, mask_all=1.0).batches())
    assert (hidden.reference == MISSING).all()
    names = make(tiny_store).spec.coarse_names
    assert (hidden.coarse[:, names.index("lead")] == 0).all()
    seen, some = next(make(tiny_store).batches()), next(make(tiny_store, mask_some=1.0).batches())
    extra = (some.reference == MISSING) & (seen.reference != MISSING)
    assert extra.any() and torch.equal(some.reference[~extra], seen.reference[~extra])
    assert torch.equal(some.target, seen.target)


def test_holes_cover_a_good_part_but_not_all():
    shares = [holes((32, 32), np.random.default_rng(i)).mean() for i in range(50)]
    assert min(shares) >= 0.3 and np.mean(shares) < 0.8


def test_disturbed_maps_change_about_the_share_to_classes_from_close_by():
    rng = np.random.default_rng(0)
    index = np.kron(rng.integers(0, 5, (30, 30)), np.ones((4, 4))).astype(np.uint8)
    index[:20] = MISSING
    out = disturbed(index, rng, share=0.15, n=5)
    land = index != MISSING
    assert (out[~land] == MISSING).all()
    moved = (out != index) & land
    assert 0.05 < moved.sum() / land.sum() < 0.3
    for row, col in np.argwhere(moved):
        near = index[max(row - 7, 0) : row + 8, max(col - 9, 0) : col + 10]
        assert out[row, col] in near


def test_disturbance_reaches_the_input_and_not_the_target(tiny_store):
    plain, torn = (next(make(tiny_store, pairs=((2000, 2000),), disturb=d).batches()) for d in (0.0, 0.2))
    assert torch.equal(plain.target, torn.target) and torch.equal(plain.reference, plain.target)
    assert 0.01 < (torn.reference != torn.target).float().mean() < 0.5


@pytest.mark.parametrize("way", range(8))
def test_turned_patches_are_the_same_place_seen_another_way(way):
    """What is interpolated from the turned coarse cells is what was interpolated before, turned."""
    rng = np.random.default_rng(way)
    size, factor, offset = 12, 5, (9, 6)
    fine = rng.integers(0, 9, (size, size)).astype(np.uint8)
    coarse = rng.standard_normal((2, 6, 6)).astype(np.float32)
    static, reference, cells, moved, target = turned((fine[None], fine, coarse, offset, fine), factor, way=way)
    for array in (static[0], reference, target):
        assert np.array_equal(array, target)
    sides = {(i, j, t) for i in (1, -1) for j in (1, -1) for t in (0, 1)}
    same = [s for s in sides if np.array_equal((fine.T if s[2] else fine)[:: s[0], :: s[1]], target)]
    assert len(same) == 1 and (way == 0) == (same[0] == (1, 1, 0))

    def seen(values, at):
        return interpolate(torch.from_numpy(values.copy())[None], torch.tensor([at]), (size, size), factor)[0].numpy()

    i, j, swap = same[0]
    before = seen(coarse, offset)
    assert np.allclose(seen(cells, moved), (before.swapaxes(1, 2) if swap else before)[:, ::i, ::j], atol=1e-6)
    parts = [coarse_parts(torch.tensor([at]), size=(size, size), factor=factor)[0].numpy() for at in (offset, moved)]
    was = (parts[0].T if swap else parts[0])[::i, ::j]
    pairs = set(zip(was.ravel().tolist(), parts[1].ravel().tolist(), strict=True))
    assert len(pairs) == len(np.unique(was)) == len(np.unique(parts[1])) > 1


def test_turning_reaches_inputs_and_targets_alike(tiny_store):
    plain, other = (next(make(tiny_store, pairs=((2000, 2000),), batch=8, turn=t).batches()) for t in (False, True))
    assert torch.equal(other.reference, other.target) and not torch.equal(plain.target, other.target)
    assert all(
        sorted(a.flatten().tolist()) == sorted(b.flatten().tolist()) for a, b in zip(plain.target, other.target, strict=True)
    )


def test_focus_draws_more_patches_that_change(tiny_store):
    def changing(focus: float) -> float:
        loader = make(tiny_store, pairs=((2000, 2003),), patch=8, focus=focus)
        batches = list(loader.batches(0, 24))
        return float(torch.cat([(b.reference != b.target).float().mean(dim=(1, 2)) for b in batches]).mean())

    assert changing(1.0) > 1.05 * changing(0.0)


def wide_store(path, grid, legend) -> None:
    """Lay out a store of two years whose first shard alone is mapped."""
    coords = grid.coords() | {"observed_year": [2000, 2001], "year": [2000, 2001], "feature": ["height"], "state": ["a"]}
    depths = {"mask": (), "static": ("feature",), "land_cover": ("observed_year",)}
    empty = {
        name: ((*depth, *FINE_DIMS), da.zeros((*(len(coords[d]) for d in depth), *grid.shape), dtype=kind, chunks=grid.shard))
        for (name, depth), kind in zip(depths.items(), ("uint8", "float32", "uint8"), strict=True)
    }
    coarse = np.zeros((2, 1, *grid.coarse.shape), np.float32)
    xr.Dataset({**empty, "coarse": (("year", "state", *COARSE_DIMS), coarse)}, coords).to_zarr(path, compute=False)
    group = zarr.open_group(path, mode="r+")
    group["mask"][: grid.shard, : grid.shard] = 1
    group["land_cover"][:, : grid.shard, : grid.shard] = legend.codes[0]
    group["coarse"][...] = coarse


def test_memory_does_not_grow_with_the_globe(tmp_path):
    """Two stores with the same mapped cells, one on a grid of 128 times as many: opening a loader and a batch take the same memory."""
    legend, peaks = load_legend("hildaplus"), []
    for name, bbox in (("narrow", (-180, 67.5, -157.5, 90)), ("wide", (-180, -90, 180, 90))):
        grid = make_grid(bbox, coarse_cell=22.5 / 16, factor=64, shard=1024)
        wide_store(tmp_path / name, grid, legend)
        spec = FeatureSpec(features=(Feature(name="height"),), states=("a",), codes=legend.codes.tolist(), difference_std=(1.0,))
        tracemalloc.start()
        loader = PatchLoader(
            partial(xr.open_zarr, tmp_path / name, chunks=None, consolidated=False),
            grid=grid,
            legend=legend,
            spec=spec,
            cells=np.ones(grid.coarse.shape, bool),
            pairs=((2000, 2001),),
            patch=16,
            batch=2,
        )
        batch = next(loader.batches(0, 1))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (batch.target == 0).all()
    assert grid.shape == (8192, 16384) and peaks[1] - peaks[0] < 0.05 * grid.shape[0] * grid.shape[1]


def test_no_target_cell_is_an_error(tiny_store):
    nothing = np.zeros(tiny_store.grid.coarse.shape, bool)
    every = np.ones_like(nothing)
    spec = make(tiny_store, cells=every).spec
    with pytest.raises(DataError, match="no fine cell may be a target"):
        PatchLoader(
            partial(open_store, tiny_store.path),
            grid=tiny_store.grid,
            legend=tiny_store.legend,
            spec=spec,
            cells=nothing,
            pairs=PAIRS,
            patch=16,
            batch=2,
        )


def test_shards_of_the_next_visit_are_read_ahead(tiny_store):
    loader = make(tiny_store, visit=2, mix=2, keep=2)
    batches = loader.batches()
    next(batches)
    coming, kept = set(loader._coming), set(loader._cache)
    assert coming | kept >= set(loader._drawn(1)[0])
    next(batches)
    next(batches)
    assert set(loader._drawn(1)[0]) <= set(loader._cache)
    alone = make(tiny_store, visit=2, mix=2, keep=2)
    list(alone.batches(0, 2))
    assert not alone._coming


def test_prefetching_keeps_the_order_passes_errors_and_ends_its_thread(tiny_store):
    loader = make(tiny_store)

    def threads() -> set[str]:
        return {t.name for t in threading.enumerate() if not t.name.startswith("shards")}

    before = threads()
    for a, b in zip(prefetched(loader.batches(0, 6)), loader.batches(0, 6), strict=True):
        assert same(a, b)
    stream = prefetched(loader.batches())
    next(stream)
    stream.close()
    assert threads() == before

    def broken():
        yield from itertools.islice(loader.batches(), 1)
        raise OSError("disk gone")

    stream = prefetched(broken())
    next(stream)
    with pytest.raises(OSError, match="disk gone"):
        next(stream)
