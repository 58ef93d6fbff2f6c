from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ai4land.crosswalk import load_crosswalk
from ai4land.cube import cube, ledger
from ai4land.cube.cube import Block
from ai4land.cube.numbers import FRACTION_SCALE, quantise
from ai4land.errors import ConfigError, DataError, MismatchError
from ai4land.grid import Window, tiles
from ai4land.legend import MISSING
from ai4land.model.checkpoint import Card, save_model
from ai4land.model.ensemble import Ensemble
from ai4land.model.forward import Forward
from ai4land.model.unet import UNet
from ai4land.reconstruct.block import BlockSettings, _placed, reconstruct_block, years_between
from ai4land.reconstruct.blocks import run_blocks
from ai4land.reconstruct.plan import land_of, plan_blocks
from ai4land.reconstruct.predict import predict
from ai4land.run.file import load_run
from ai4land.run.reconstruct import credit_attrs
from ai4land.store.read import Source, mapped_part, open_store
from ai4land.train.normalise import fit_spec
from tests.stores import write_tiny_store

PAIRS = ((2000, 2001), (2001, 2003), (2003, 2000))
YEARS = [2000, 2001, 2002, 2003]
PAIR = 2
"""Years in a shard of the cubes of these tests."""


def random_model(tiny, *, depth: int = 2, seed: int = 0):
    """A network whose every part matters: random weights and batch statistics, logits a few units apart."""
    torch.manual_seed(seed)
    store = open_store(tiny.path)
    cells = np.ones(tiny.grid.coarse.shape, bool)
    spec = fit_spec(store, cells=cells, pairs=PAIRS, codes=tiny.legend.codes.tolist(), factor=tiny.grid.factor)
    model = UNet(
        static_channels=len(spec.static_names),
        coarse_channels=len(spec.coarse_names),
        classes=tiny.legend.n,
        factor=8,
        base=6,
        depth=depth,
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
        model.coarse[0].weight.normal_(0, 1)
        model.head.weight.normal_(0, 2)
        model.persistence.weight.normal_(0, 1)
    return model.eval(), spec


def ready_to_run(model) -> Forward:
    return Forward(Ensemble([model]), device=torch.device("cpu"))


def saved(tiny, folder, **kwargs) -> str:
    model, spec = random_model(tiny, **kwargs)
    card = Card(
        legend=tiny.legend, spec=spec, network=model.settings, cell=(1.0, 1.0), weights="", split="", store="", training={}
    )
    return save_model(folder, [model.state_dict()], card).weights


def job_for(tiny, path, folder, checksum, **options) -> BlockSettings:
    crosswalk = load_crosswalk("identity", tiny.legend)
    return BlockSettings(str(tiny.path), str(path), str(folder), checksum, 2001, 1, crosswalk, **{"weights": "cells", **options})


def mapped(model, spec, source, size: int, *, reference, years=(2003,)):
    """Probabilities of the whole globe, cut into windows of a size."""
    rows, cols = source.grid.shape
    out = np.full((len(years), source.legend.n, rows, cols), np.nan, np.float32)
    for window in tiles((rows, cols), size):
        for i, (_, p) in enumerate(predict(ready_to_run(model), source, window, spec=spec, reference=reference, years=years)):
            out[(i, slice(None), *window.slices)] = p
    return out


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("reference", [2000, None])
def test_tiled_equals_untiled_with_dateline_and_poles(tiny_store, depth, reference):
    torch.set_num_threads(1)
    model, spec = random_model(tiny_store, depth=depth)
    source = Source(tiny_store.path)
    whole = mapped(model, spec, source, 128, reference=reference)
    assert np.isfinite(whole).all() and whole.std() > 0.05
    for size in (8, 16, 32, 40, 64):
        cut = mapped(model, spec, source, size, reference=reference)
        assert np.abs(cut - whole).max() < 1e-5
        assert np.array_equal(cut.argmax(1), whole.argmax(1))


def test_what_lies_across_the_dateline_reaches_as_far_as_the_radius(tiny_store):
    torch.set_num_threads(1)
    model, spec = random_model(tiny_store)
    source = Source(tiny_store.path)
    edge = Window(16, 0, 16, 64)
    _, wrapped = next(predict(ready_to_run(model), source, edge, spec=spec, reference=2000, years=[2001]))
    source.grid.__dict__["wraps"] = False
    _, cut_off = next(predict(ready_to_run(model), source, edge, spec=spec, reference=2000, years=[2001]))
    difference = np.abs(wrapped - cut_off).max(axis=(0, 1))
    assert difference[0] > 1e-3
    reach = model.receptive_radius + source.grid.factor
    assert reach < 60 and (difference[reach:] < 1e-6).all()


def test_year_does_not_depend_on_which_others_are_predicted(tiny_store):
    torch.set_num_threads(1)
    model, spec = random_model(tiny_store)
    source = Source(tiny_store.path)
    together = mapped(model, spec, source, 32, reference=2001, years=(2000, 2002, 2003))
    alone = mapped(model, spec, source, 32, reference=2001, years=(2002,))
    assert np.array_equal(together[1], alone[0])


def test_window_off_the_stride_is_refused(tiny_store):
    model, spec = random_model(tiny_store)
    with pytest.raises(ValueError, match="off the network's stride"):
        next(predict(ready_to_run(model), Source(tiny_store.path), Window(2, 0, 8, 8), spec=spec, reference=2000, years=[2001]))


@given(hnp.arrays(np.float32, st.tuples(st.integers(2, 30), st.just(4), st.just(5)), elements=st.floats(0, 1, width=32)))
def test_stored_fractions_sum_exactly_and_stay_close(raw):
    raw[0] += np.float32(1e-3)
    p = raw / raw.sum(0, dtype=np.float32)
    q = quantise(p)
    assert (q.sum(0, dtype=int) == FRACTION_SCALE).all()
    assert np.abs(q / FRACTION_SCALE - p).max() <= 1.1 / FRACTION_SCALE
    assert (q[:-1][p[:-1] == 0] == 0).all()


def test_rounding_keeps_the_mean_of_fractions_far_below_a_unit():
    p = np.zeros((3, 64, 64))
    p[0], p[1] = 3e-6, np.linspace(0, 0.9, 64)
    p[2] = 1 - p[:2].sum(0)
    mean = quantise(p).mean(axis=(1, 2)) / FRACTION_SCALE
    assert np.abs(mean - p.mean(axis=(1, 2))).max() < 3e-7


@pytest.mark.parametrize("reference", [2001, None])
def test_blocks_cover_land_once_and_skip_what_is_done(tiny_store, reference):
    source = Source(tiny_store.path)
    mask = np.asarray(source.mask[...], bool)
    blocks = plan_blocks(tiny_store.path, years_a_shard=PAIR, years=YEARS, reference=reference)
    count = np.zeros((len(YEARS), *mask.shape), int)
    for block in blocks:
        assert reference is None or block.years in (
            (2000, 2001),
            (2002, 2003),
        )  # the first two share a shard, whose sides are alike
        for year in block.years:
            count[(YEARS.index(year), *block.window.slices)] += 1
    assert count.max() == 1 and (count[:, mask] == 1).all()
    assert any(not mask[w.slices].any() for w in source.grid.shards())
    assert len({b.window for b in blocks}) < len(source.grid.shards())
    first = blocks[0]
    done = [(first.window.row, first.window.col, year) for year in first.years[:2]]
    left = plan_blocks(tiny_store.path, years_a_shard=PAIR, years=YEARS, reference=reference, done=done)
    rest = () if reference == 2001 else (Block(first.window, first.years[2:]),)
    assert set(left) == {*rest, *blocks[1:]}
    again = plan_blocks(tiny_store.path, years_a_shard=PAIR, years=YEARS, reference=reference, done=done[:1])
    assert set(again) == set(blocks)  # half of a shard is none


def test_years_of_both_sides_in_one_shard_go_with_the_fewer_that_are_walked_for_them(tiny_store):
    def years(reference, deep):
        return {b.years for b in plan_blocks(tiny_store.path, years=YEARS, reference=reference, years_a_shard=deep)}

    assert years(2001, 1) == {(2000,), (2001, 2002, 2003)}
    assert years(2001, 4) == {tuple(YEARS)} == years(2003, 4)
    assert years(2003, 2) == {(2000, 2001, 2002, 2003)}
    assert years(2000, 2) == {(2000, 2001, 2002, 2003)}


@pytest.mark.parametrize("reference", [2001, None])
def test_mapped_part_of_a_shard_is_predicted_as_in_the_whole(tiny_store, reference):
    torch.set_num_threads(1)
    model, spec = random_model(tiny_store)
    forward, source = ready_to_run(model), Source(tiny_store.path)
    smaller = 0
    for window in {b.window for b in plan_blocks(tiny_store.path, years_a_shard=PAIR, years=YEARS, reference=reference)}:
        mask = np.array(source.mask[window.slices], dtype=bool)
        mask[: window.height // 2 - 1], mask[:, -3:] = False, False
        if not mask.any():
            continue
        inner = mapped_part(mask, window, model.stride)
        smaller += inner != window
        made = [predict(forward, source, w, spec=spec, reference=reference, years=[2003]) for w in (window, inner)]
        (_, whole), (_, part) = next(made[0]), next(_placed(made[1], inner, window))
        assert part.shape == whole.shape and np.allclose(part.sum(0), 1, atol=1e-5)
        assert np.abs(part - whole)[:, mask].max() < 1e-5
    assert smaller


@pytest.fixture(scope="module")
def mapped_cube(tiny_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mapped")
    checksum = saved(tiny_store, folder)
    path = folder / "cube.zarr"
    made(tiny_store, path, YEARS)
    job = job_for(tiny_store, path, folder, checksum)
    blocks = plan_blocks(tiny_store.path, years_a_shard=PAIR, years=YEARS, reference=2001)
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        receipts = run_blocks(blocks, job, client=client)
    assert cube.show(path) == YEARS
    return path, job, blocks, receipts


def made(tiny, path, years):
    about = {"identity": {}, "title": "t", "source": "s", "totals": "exact", "years_a_shard": PAIR}
    cube.create(path, grid=tiny.grid, legend=tiny.legend, years=years, land=land_of(Source(tiny.path)), **about)


def test_every_land_cell_is_written_once_and_sea_is_not(tiny_store, mapped_cube):
    path, _, blocks, receipts = mapped_cube
    mask = np.asarray(Source(tiny_store.path).mask[...], bool)
    ds = cube.open_cube(path)
    codes = ds["land_cover"].values
    assert (codes[:, mask] != tiny_store.legend.fill.code).all() and (codes[:, ~mask] == tiny_store.legend.fill.code).all()
    sums = ds["fraction"].sum("class", skipna=False).values
    assert np.allclose(sums[:, mask], 1, atol=1e-9) and np.isnan(sums[:, ~mask]).all()
    confidence = ds["confidence"].values
    assert np.nanmax(confidence) == 1 and np.isnan(confidence[:, ~mask]).all()
    assert len(receipts) == len(blocks) == len({(r["row"], r["col"], r["years"][0]) for r in receipts})
    assert len(ledger.recorded(path)) == sum(len(b.years) for b in blocks)
    assert sum(r["cells"] for r in receipts if 2000 in r["years"]) == mask.sum()


def test_reference_year_is_the_observed_map(tiny_store, mapped_cube):
    path, *_ = mapped_cube
    source = Source(tiny_store.path)
    observed = source.map_of(2001, Window(0, 0, *tiny_store.grid.shape))
    mask = np.asarray(source.mask[...], bool) & (observed != MISSING)
    ds = cube.open_cube(path).isel(time=1)
    assert np.array_equal(ds["land_cover"].values[mask], tiny_store.legend.decode(observed)[mask])
    assert (ds["confidence"].values[mask] == 1).all()


def test_without_totals_the_cube_holds_what_the_network_says(tiny_store, mapped_cube, tmp_path):
    torch.set_num_threads(1)
    _, job, *_ = mapped_cube
    path = tmp_path / "free.zarr"
    made(tiny_store, path, [2003])
    for block in plan_blocks(tiny_store.path, years_a_shard=PAIR, years=[2003], reference=2001):
        reconstruct_block(block, replace(job, cube=str(path), method="none"))
    cube.show(path)
    model, spec = random_model(tiny_store)
    source = Source(tiny_store.path)
    p = mapped(model, spec, source, 32, reference=2001, years=(2003,))[0]
    mask = np.asarray(source.mask[...], bool)
    ds = cube.open_cube(path).isel(time=0)
    for name in ("land_cover", "most_likely"):
        assert np.array_equal(ds[name].values[mask], tiny_store.legend.codes[p.argmax(0)][mask])
    assert np.abs(ds["fraction"].values - p)[:, mask].max() <= 1.02 / FRACTION_SCALE


def test_most_likely_class_has_the_largest_fraction(tiny_store, mapped_cube):
    ds = cube.open_cube(mapped_cube[0]).isel(time=3)
    mask = np.asarray(Source(tiny_store.path).mask[...], bool)
    fraction = ds["fraction"].values[:, mask]
    k = np.searchsorted(tiny_store.legend.codes, ds["most_likely"].values[mask])
    assert (np.take_along_axis(fraction, k[None].astype(int), 0)[0] >= fraction.max(0) - 2 / FRACTION_SCALE).all()
    assert (ds["most_likely"].values[mask] != ds["land_cover"].values[mask]).any()


def totals_off(tiny, path, year: int, *, product: str) -> float:
    """Largest error of a product against the reference map plus the scenario's change, by an independent sum."""
    source, f = Source(tiny.path), tiny.grid.factor
    whole = Window(0, 0, *tiny.grid.shape)
    mask = np.asarray(source.mask[...], bool)
    ds = cube.open_cube(path).isel(time=YEARS.index(year))
    index = {y: np.where(mask, source.map_of(y, whole), MISSING) for y in (2001, year)}
    worst = 0.0
    for row in range(0, whole.height, f):
        for col in range(0, whole.width, f):
            cut = (slice(row, row + f), slice(col, col + f))
            size = mask[cut].sum()
            if not size:
                continue
            held = np.array([(index[2001][cut] == k).sum() for k in range(tiny.legend.n)]) / size
            states = [source.states_of(y, Window(row // f, col // f, 1, 1))[:, 0, 0].astype(float) for y in (2001, year)]
            change = states[1] - states[0]
            loss, gain = np.minimum(np.maximum(-change, 0), held), np.maximum(change, 0)
            moved = min(loss.sum(), gain.sum())
            want = held - (loss * moved / loss.sum() if moved else 0) + (gain * moved / gain.sum() if moved else 0)
            if product == "map":
                have = np.array([(ds["land_cover"].values[cut] == c).sum() for c in tiny.legend.codes])
                worst = max(worst, float(np.abs(have - want * size).max()))
            else:
                have = np.nansum(ds["fraction"].values[(slice(None), *cut)], axis=(1, 2)) / size
                worst = max(worst, float(np.abs(have - want).max() * size / f**2))
    return worst


@pytest.mark.parametrize("year", YEARS)
def test_both_products_meet_the_coarse_totals(tiny_store, mapped_cube, year):
    assert totals_off(tiny_store, mapped_cube[0], year, product="map") < 1
    assert totals_off(tiny_store, mapped_cube[0], year, product="fraction") < 3e-6


def test_a_year_depends_on_neither_tiles_nor_the_years_that_are_kept(tiny_store, mapped_cube, tmp_path):
    torch.set_num_threads(1)
    path, job, *_ = mapped_cube
    few, whole = tmp_path / "few.zarr", tmp_path / "whole.zarr"
    made(tiny_store, few, [2003])
    for block in plan_blocks(tiny_store.path, years_a_shard=PAIR, years=[2003], reference=2001):
        reconstruct_block(block, replace(job, cube=str(few)))
    cube.show(few)
    expected = cube.open_cube(path).isel(time=[3])
    assert expected.equals(cube.open_cube(few))
    large = write_tiny_store(tmp_path / "large.zarr", shard=64)
    made(large, whole, [2003])
    for block in plan_blocks(large.path, years_a_shard=PAIR, years=[2003], reference=2001):
        reconstruct_block(block, replace(job, cube=str(whole), store=str(large.path)))
    cube.show(whole)
    got = cube.open_cube(whole)
    for name in ("land_cover", "most_likely"):
        assert np.array_equal(got[name].values, expected[name].values)


def test_blocks_in_hand_at_once_give_the_same_cube(tiny_store, mapped_cube, tmp_path):
    torch.set_num_threads(1)
    path, job, *_ = mapped_cube
    together = tmp_path / "together.zarr"
    made(tiny_store, together, YEARS)
    blocks = plan_blocks(tiny_store.path, years_a_shard=PAIR, years=YEARS, reference=2001)
    with ThreadPoolExecutor(4) as hands:
        list(hands.map(lambda block: reconstruct_block(block, replace(job, cube=str(together))), blocks))
    assert ledger.recorded(together) == ledger.recorded(path)
    assert len(list(ledger.ledger_path(together).glob("*.jsonl"))) == len(blocks)


def test_locked_and_protected_cells_never_change(tiny_store, mapped_cube, tmp_path):
    torch.set_num_threads(1)
    _, job, *_ = mapped_cube
    path = tmp_path / "locked.zarr"
    made(tiny_store, path, [2003])
    source = Source(tiny_store.path)
    code = int(tiny_store.legend.codes[1])
    locked = replace(job, cube=str(path), lock=(code,), protected="height")
    for block in plan_blocks(tiny_store.path, years_a_shard=PAIR, years=[2003], reference=2001):
        reconstruct_block(block, locked)
    cube.show(path)
    start = source.map_of(2001, Window(0, 0, *tiny_store.grid.shape))
    mask = np.asarray(source.mask[...], bool)
    held = mask & ((start == 1) | (np.asarray(source.static[source.features.index("height")]) > 0.5))
    codes = cube.open_cube(path)["land_cover"].values[0]
    assert held.sum() > 500 and np.array_equal(codes[held], tiny_store.legend.decode(start)[held])
    assert (codes != tiny_store.legend.decode(start))[mask & ~held].any()
    unmet = [u for entry in ledger.entries(path) for note in entry["notes"] for u in note["unmet"]]
    assert unmet and all(len(u) == 4 and u[3] != 0 for u in unmet)


def test_years_of_a_walk():
    assert years_between([2000, 2001, 2002, 2003], 2001, 2003) == [2001, 2002, 2003]
    assert years_between([2000, 2001, 2002, 2003], 2001, 2000) == [2001, 2000]


def test_failed_blocks_are_named_and_the_rest_is_done(tiny_store, tmp_path):
    checksum = saved(tiny_store, tmp_path)
    path = tmp_path / "cube.zarr"
    made(tiny_store, path, YEARS)
    job = job_for(tiny_store, path, tmp_path, checksum)
    blocks = plan_blocks(tiny_store.path, years_a_shard=PAIR, years=YEARS, reference=2001)
    bad = Block(blocks[0].window, (1999,))
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
        pytest.raises(DataError, match=r"1 of \d+ blocks failed, the rest is done.*\n.*1999"),
    ):
        run_blocks([bad, *blocks[1:]], job, client=client)
    assert len(ledger.recorded(path)) == sum(len(b.years) for b in blocks[1:])


def test_model_that_changes_under_way_is_refused(tiny_store, tmp_path):
    saved(tiny_store, tmp_path)
    job = job_for(tiny_store, tmp_path / "c.zarr", tmp_path, "0" * 64)
    with pytest.raises(MismatchError, match="changed while the job ran"):
        reconstruct_block(plan_blocks(tiny_store.path, years_a_shard=PAIR, years=[2000], reference=2001)[0], job)


def test_a_cube_says_whom_it_is_owed_to(tmp_path):
    attrs = credit_attrs(load_run("uk.yaml", [f"runs={tmp_path}"]))
    assert attrs["license"] == "other" or attrs["license"].startswith("CC-")
    assert "Winkler" in attrs["attribution"] and "CC-BY-4.0" in attrs["attribution"]
    assert credit_attrs(load_run("demo.yaml", [f"runs={tmp_path}"])) == {}
    with pytest.raises(ConfigError, match="nowhere"):
        credit_attrs(load_run("demo.yaml", [f"runs={tmp_path}", "sources=[nowhere]"]))
