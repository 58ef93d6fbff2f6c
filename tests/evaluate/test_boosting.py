"""The gradient-boosting baseline: tiles equal the whole, nothing unseen leaks in, and boosting does not diverge."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ai4land.errors import ConfigError, DataError, MismatchError
from ai4land.evaluate.boosting import fit_suitability
from ai4land.evaluate.boosting_sample import HALO, REACHES, Around, draw_sample
from ai4land.grid import Window, tiles
from ai4land.legend import MISSING
from ai4land.store.read import Source, open_store
from ai4land.train.normalise import fit_spec

REFERENCE = {True: 2002, False: None}
PAIRS = ((2000, 2001), (2001, 2002), (2000, 2002))
FAST = {"samples": 1200, "iterations": 3, "leaves": 6, "threads": 1}


@pytest.fixture(scope="module")
def base(tiny_store):
    """With and without a reference map: the fit, and its probabilities of the whole globe in 2003."""
    fits = {known: fitted(tiny_store, with_reference=known) for known in (True, False)}
    source = Source(tiny_store.path)
    return {known: (fit, mapped(fit, source, 128, reference=REFERENCE[known])) for known, fit in fits.items()}


def spec_of(path, grid, legend, cells):
    return fit_spec(open_store(path), cells=cells, pairs=PAIRS, codes=legend.codes.tolist(), factor=grid.factor)


def fitted(tiny, *, path=None, with_reference=True, cells=None, **changes):
    path = tiny.path if path is None else path
    cells = np.ones(tiny.grid.coarse.shape, bool) if cells is None else cells
    spec = changes.pop("spec", None) or spec_of(tiny.path, tiny.grid, tiny.legend, cells)
    args = {"pairs": PAIRS, "seed": 1, **FAST, **changes}
    return fit_suitability(Source(path), cells=cells, spec=spec, with_reference=with_reference, **args)


def mapped(suitability, source, size, *, reference, year=2003):
    out = np.full((source.legend.n, *source.grid.shape), np.nan, np.float32)
    for w in tiles(source.grid.shape, size):
        out[(slice(None), *w.slices)] = suitability.predict(source, w, reference=reference, year=year)
    return out


def damaged(tiny, folder, *, years=(), cells=None, seed=3):
    """A copy of the store with garbage in the maps and states of years, or of coarse cells."""
    path = shutil.copytree(tiny.path, folder / "store.zarr")
    group, rng = zarr.open_group(path, mode="r+"), np.random.default_rng(seed)
    every = [int(y) for y in tiny.years]
    maps, states = group["land_cover"][...], group["coarse"][...]
    known = maps != tiny.legend.fill.code
    noise = rng.choice(tiny.legend.codes, maps.shape).astype(maps.dtype)
    if cells is None:
        hit, coarse_hit = np.zeros(maps.shape, bool), np.zeros(states.shape, bool)
        hit[[every.index(y) for y in years]], coarse_hit[[every.index(y) for y in years]] = True, True
    else:
        f = tiny.grid.factor
        hit = np.broadcast_to(np.kron(cells, np.ones((f, f), bool)), maps.shape)
        coarse_hit = np.broadcast_to(cells, states.shape)
    group["land_cover"][...] = np.where(hit & known, noise, maps)
    group["coarse"][...] = np.where(coarse_hit, rng.random(states.shape, dtype=np.float32), states)
    assert not np.array_equal(group["land_cover"][...], maps)
    return path


both = pytest.mark.parametrize("with_reference", [True, False])


@both
def test_tiles_are_the_whole_bit_for_bit(tiny_store, base, with_reference):
    (suitability, whole), source = base[with_reference], Source(tiny_store.path)
    assert whole.std() > 0.05
    for size in (13, 32):
        assert np.array_equal(mapped(suitability, source, size, reference=REFERENCE[with_reference]), whole)


@both
def test_probabilities_sum_to_one_in_the_mask_and_are_zero_elsewhere(tiny_store, base, with_reference):
    p, mask = base[with_reference][1], np.asarray(Source(tiny_store.path).mask[...], bool)
    assert mask.any() and not mask.all()
    assert np.abs(p.sum(0)[mask] - 1).max() < 1e-5
    assert not p[:, ~mask].any() and (p >= 0).all()


def test_classes_that_never_occur_have_probability_zero(tiny_store, tmp_path):
    path = shutil.copytree(tiny_store.path, tmp_path / "store.zarr")
    maps, codes = zarr.open_group(path, mode="r+")["land_cover"], tiny_store.legend.codes
    gone = maps[...]
    gone[:3][gone[:3] == codes[2]] = codes[0]
    maps[...] = gone
    suitability = fitted(tiny_store, path=path)
    p = mapped(suitability, Source(path), 64, reference=2002)
    assert 2 not in suitability.targets and not p[2].any()
    assert all(p[k].any() for k in suitability.targets)


@both
def test_the_fit_is_the_same_each_time_and_with_any_threads(tiny_store, base, with_reference):
    source, reference, first = Source(tiny_store.path), REFERENCE[with_reference], base[with_reference][1]
    again = replace(fitted(tiny_store, with_reference=with_reference, threads=2), threads=1)
    assert np.array_equal(mapped(again, source, 64, reference=reference), first)
    other = fitted(tiny_store, with_reference=with_reference, seed=2)
    assert not np.array_equal(mapped(other, source, 64, reference=reference), first)


@both
def test_years_beyond_training_do_not_reach_the_fit(tiny_store, base, tmp_path, with_reference):
    source, reference, before = Source(tiny_store.path), REFERENCE[with_reference], base[with_reference][1]
    after = fitted(tiny_store, path=damaged(tiny_store, tmp_path, years=[2003]), with_reference=with_reference)
    assert np.array_equal(mapped(after, source, 64, reference=reference), before)
    seen = fitted(tiny_store, path=damaged(tiny_store, tmp_path / "seen", years=[2001]), with_reference=with_reference)
    assert not np.array_equal(mapped(seen, source, 64, reference=reference), before)


@both
def test_held_out_cells_do_not_reach_the_fit_even_as_neighbours(tiny_store, tmp_path, with_reference):
    source, reference = Source(tiny_store.path), REFERENCE[with_reference]
    cells = np.add.outer(np.arange(8), np.arange(16)) % 3 != 0
    before = mapped(fitted(tiny_store, cells=cells, with_reference=with_reference), source, 64, reference=reference)
    path = damaged(tiny_store, tmp_path, cells=~cells)
    after = fitted(tiny_store, path=path, cells=cells, with_reference=with_reference)
    assert np.array_equal(mapped(after, source, 64, reference=reference), before)


def test_the_map_of_the_predicted_year_does_not_reach_the_prediction(tiny_store, base, tmp_path):
    suitability, before = base[True]
    other = Source(damaged(tiny_store, tmp_path, years=[2003]))
    other.coarse = Source(tiny_store.path).coarse
    assert np.array_equal(mapped(suitability, other, 64, reference=2002), before)


def test_the_states_and_the_reference_map_do_reach_the_prediction(tiny_store, base, tmp_path):
    suitability, before = base[True]
    for name, year in (("states", 2003), ("map", 2002)):
        other = Source(damaged(tiny_store, tmp_path / name, years=[year]))
        assert not np.array_equal(mapped(suitability, other, 64, reference=2002), before)


def test_many_rounds_with_rare_change_do_not_diverge(tiny_store, tmp_path):
    # Where few cells change their weights are small: unregularised trees then give them huge values, and lose the rest.
    path, rng = shutil.copytree(tiny_store.path, tmp_path / "store.zarr"), np.random.default_rng(0)
    maps = zarr.open_group(path, mode="r+")["land_cover"]
    rare = maps[...]
    for i in (1, 2, 3):
        keep = (rng.random(rare[0].shape) > 0.04) | (rare[0] == tiny_store.legend.fill.code)
        rare[i] = np.where(keep, rare[i - 1], rare[i])
    maps[...] = rare
    source, whole = Source(path), Window(0, 0, *tiny_store.grid.shape)
    known, seen = source.map_of(2000, whole), source.map_of(2001, whole)
    still = np.asarray(source.mask[...], bool) & (known == seen) & (seen != MISSING)
    p = fitted(tiny_store, path=path, samples=400, iterations=40, leaves=15).predict(source, whole, reference=2000, year=2001)
    assert (p.argmax(0) == known)[still].mean() > 0.98
    assert p.max(0)[still].mean() > 0.9


def test_without_a_map_it_beats_the_commonest_class(tiny_store, base):
    source, p = Source(tiny_store.path), base[False][1]
    seen = source.map_of(2003, Window(0, 0, *source.grid.shape))
    there = np.asarray(source.mask[...], bool) & (seen != MISSING)
    commonest = np.bincount(seen[there]).max() / there.sum()
    assert (p.argmax(0) == seen)[there].mean() > commonest + 0.1


def test_weights_undo_the_drawing_of_changed_cells(tiny_store):
    source = Source(tiny_store.path)
    cells = np.ones(tiny_store.grid.coarse.shape, bool)
    spec = spec_of(tiny_store.path, tiny_store.grid, tiny_store.legend, cells)
    pairs, samples = [(2000, 2001)], 600
    sample = draw_sample(
        source, cells=cells, pairs=pairs, spec=spec, with_reference=True, samples=samples, rng=np.random.default_rng(0)
    )
    whole = Window(0, 0, *source.grid.shape)
    known, seen = source.map_of(2000, whole), source.map_of(2001, whole)
    there = np.asarray(source.mask[...], bool) & (known != MISSING) & (seen != MISSING)
    changed = (known != seen)[there]
    own = np.array(sample.classes)[sample.columns[:, len(spec.features)].astype(int)]
    moved = own != sample.target
    assert len(sample.target) == samples and moved.sum() == min(changed.sum(), samples // 2)
    assert moved.mean() > 2 * changed.mean()
    assert np.average(moved, weights=sample.weight) == pytest.approx(changed.mean(), rel=1e-9)
    assert sample.weight.mean() == pytest.approx(1)


@given(hnp.arrays(np.uint8, (7 + 2 * HALO, 5 + 2 * HALO), elements=st.sampled_from([0, 1, 4, MISSING])))
@settings(max_examples=25, deadline=None)
def test_shares_around_a_cell_are_those_of_a_plain_count(index):
    classes = (0, 1, 4)
    got = Around(index, classes).columns(np.arange(35))
    for cell in range(35):
        row, col = cell // 5 + HALO, cell % 5 + HALO
        want = [classes.index(index[row, col]) if index[row, col] != MISSING else np.nan]
        for reach in REACHES:
            near = index[row - reach : row + reach + 1, col - reach : col + reach + 1]
            known = (near != MISSING).sum()
            want += [(near == k).sum() / known if known else np.nan for k in classes]
        assert np.allclose(got[cell], want, equal_nan=True)


def test_one_class_alone_is_certain(tiny_store, tmp_path):
    path = shutil.copytree(tiny_store.path, tmp_path / "store.zarr")
    maps = zarr.open_group(path, mode="r+")["land_cover"]
    code = int(tiny_store.legend.codes[1])
    maps[...] = np.where(maps[...] != tiny_store.legend.fill.code, code, maps[...])
    source = Source(path)
    p = mapped(fitted(tiny_store, path=path), source, 64, reference=2002)
    assert (p[1] == np.asarray(source.mask[...], bool)).all() and not np.delete(p, 1, axis=0).any()


def test_a_scenario_without_data_is_taken(tiny_store, tmp_path):
    path = shutil.copytree(tiny_store.path, tmp_path / "store.zarr")
    coarse = zarr.open_group(path, mode="r+")["coarse"]
    coarse[:, :, :, :8] = np.nan
    coarse[:, 2] = np.nan
    p = mapped(fitted(tiny_store, path=path), source := Source(path), 64, reference=2002)
    assert np.abs(p.sum(0)[np.asarray(source.mask[...], bool)] - 1).max() < 1e-5


def test_the_wrong_kind_of_prediction_is_refused(tiny_store, base):
    source, window = Source(tiny_store.path), Window(0, 0, 8, 8)
    with pytest.raises(MismatchError, match="reference is None"):
        base[True][0].predict(source, window, reference=None, year=2003)
    with pytest.raises(MismatchError, match="reference is 2002"):
        base[False][0].predict(source, window, reference=2002, year=2003)


def test_what_cannot_be_fitted_is_refused(tiny_store):
    ones = np.ones(tiny_store.grid.coarse.shape, bool)
    spec = spec_of(tiny_store.path, tiny_store.grid, tiny_store.legend, ones)
    with pytest.raises(ConfigError, match="a year with itself"):
        fitted(tiny_store, pairs=[(2000, 2000)])
    with pytest.raises(DataError, match="no training cell has a class"):
        fitted(tiny_store, cells=~ones, spec=spec)
    with pytest.raises(MismatchError, match="training cells are"):
        fitted(tiny_store, cells=np.ones((2, 2), bool), spec=spec)
    with pytest.raises(MismatchError, match="static maps"):
        fitted(tiny_store, spec=spec.model_copy(update={"features": spec.features[:1]}))
