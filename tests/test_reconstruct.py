from __future__ import annotations

import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ai4land import cube
from ai4land.align import open_store
from ai4land.checkpoint import Card, save_model
from ai4land.cube import SCALE, Block
from ai4land.errors import DataError, MismatchError
from ai4land.features import fit_spec
from ai4land.grid import Window, tiles
from ai4land.legend import MISSING
from ai4land.reconstruct import Job, Source, plan_blocks, predict, quantise, reconstruct_block, run_blocks
from ai4land.unet import UNet

PAIRS = ((2000, 2001), (2001, 2003), (2003, 2000))
YEARS = [2000, 2001, 2002, 2003]


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


def saved(tiny, folder, **kwargs) -> str:
    model, spec = random_model(tiny, **kwargs)
    card = Card(
        legend=tiny.legend, spec=spec, network=model.settings, cell=(1.0, 1.0), weights="", split="", store="", training={}
    )
    return save_model(folder, model.state_dict(), card).weights


def mapped(model, spec, source, size: int, *, reference, years=(2003,)):
    """Probabilities of the whole globe, cut into windows of a size."""
    rows, cols = source.grid.shape
    out = np.full((len(years), source.legend.n, rows, cols), np.nan, np.float32)
    for window in tiles((rows, cols), size):
        for i, (_, p) in enumerate(predict(model, source, window, spec=spec, reference=reference, years=years)):
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
    _, wrapped = next(predict(model, source, edge, spec=spec, reference=2000, years=[2001]))
    source.grid.__dict__["wraps"] = False
    _, cut_off = next(predict(model, source, edge, spec=spec, reference=2000, years=[2001]))
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
        next(predict(model, Source(tiny_store.path), Window(2, 0, 8, 8), spec=spec, reference=2000, years=[2001]))


@given(hnp.arrays(np.float32, st.tuples(st.integers(2, 30), st.just(4), st.just(5)), elements=st.floats(0, 1, width=32)))
def test_stored_fractions_sum_exactly_and_stay_close(raw):
    raw[0] += np.float32(1e-3)
    p = raw / raw.sum(0, dtype=np.float32)
    q = quantise(p)
    assert (q.sum(0, dtype=int) == SCALE).all()
    assert np.abs(q / SCALE - p).max() <= 1.02 / SCALE
    assert (q[:-1][p[:-1] == 0] == 0).all()


def test_blocks_cover_land_once_and_skip_what_is_done(tiny_store):
    source = Source(tiny_store.path)
    mask = np.asarray(source.mask[...], bool)
    blocks = plan_blocks(tiny_store.path, years=YEARS, window=3)
    count = np.zeros((len(YEARS), *mask.shape), int)
    for block in blocks:
        for year in block.years:
            count[(YEARS.index(year), *block.window.slices)] += 1
    assert count.max() == 1 and (count[:, mask] == 1).all()
    assert any(not mask[w.slices].any() for w in source.grid.shards())
    assert len({b.window for b in blocks}) < len(source.grid.shards())
    first = blocks[0]
    done = [(first.window.row, first.window.col, year) for year in first.years[:2]]
    left = plan_blocks(tiny_store.path, years=YEARS, window=3, done=done)
    assert left[0] == Block(first.window, first.years[2:]) and left[1:] == blocks[1:]


@pytest.fixture(scope="module")
def mapped_cube(tiny_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mapped")
    checksum = saved(tiny_store, folder)
    path = folder / "cube.zarr"
    cube.create(
        path, grid=tiny_store.grid, legend=tiny_store.legend, years=YEARS, identity={"m": checksum}, title="t", source="s"
    )
    job = Job(str(tiny_store.path), str(path), str(folder), checksum, reference=2001, threads=1)
    blocks = plan_blocks(tiny_store.path, years=YEARS, window=2)
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        receipts = run_blocks(blocks, job, client=client)
    return path, job, blocks, receipts


def test_every_land_cell_is_written_once_and_sea_is_not(tiny_store, mapped_cube):
    path, _, blocks, receipts = mapped_cube
    mask = np.asarray(Source(tiny_store.path).mask[...], bool)
    ds = cube.open_cube(path)
    codes = ds["land_cover"].values
    assert (codes[:, mask] != tiny_store.legend.fill.code).all() and (codes[:, ~mask] == tiny_store.legend.fill.code).all()
    sums = ds["fraction"].sum("class", skipna=False).values
    assert np.allclose(sums[:, mask], 1, atol=1e-9) and np.isnan(sums[:, ~mask]).all()
    confidence = ds["confidence"].values
    assert np.nanmin(confidence) >= 1 / tiny_store.legend.n - 0.01 and np.isnan(confidence[:, ~mask]).all()
    assert len(receipts) == len(blocks) == len({(r["row"], r["col"], r["years"][0]) for r in receipts})
    assert len(cube.recorded(path)) == sum(len(b.years) for b in blocks)
    assert sum(r["cells"] for r in receipts if 2000 in r["years"]) == mask.sum()


def test_reference_year_is_the_observed_map(tiny_store, mapped_cube):
    path, *_ = mapped_cube
    source = Source(tiny_store.path)
    observed = source.map_of(2001, Window(0, 0, *tiny_store.grid.shape))
    mask = np.asarray(source.mask[...], bool) & (observed != MISSING)
    ds = cube.open_cube(path).isel(time=1)
    assert np.array_equal(ds["land_cover"].values[mask], tiny_store.legend.decode(observed)[mask])
    assert (ds["confidence"].values[mask] == 1).all()


def test_cube_holds_what_the_network_says(tiny_store, mapped_cube):
    path, *_ = mapped_cube
    model, spec = random_model(tiny_store)
    source = Source(tiny_store.path)
    p = mapped(model, spec, source, 32, reference=2001, years=(2003,))[0]
    mask = np.asarray(source.mask[...], bool)
    ds = cube.open_cube(path).isel(time=3)
    assert np.array_equal(ds["land_cover"].values[mask], tiny_store.legend.codes[p.argmax(0)][mask])
    assert np.abs(ds["fraction"].values - p)[:, mask].max() <= 1.02 / SCALE


def test_failed_blocks_are_named_and_the_rest_is_done(tiny_store, tmp_path):
    checksum = saved(tiny_store, tmp_path)
    path = tmp_path / "cube.zarr"
    cube.create(path, grid=tiny_store.grid, legend=tiny_store.legend, years=YEARS, identity={}, title="t", source="s")
    job = Job(str(tiny_store.path), str(path), str(tmp_path), checksum, reference=2001, threads=1)
    blocks = plan_blocks(tiny_store.path, years=[2000], window=1)
    bad = Block(blocks[0].window, (1999,))
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
        pytest.raises(DataError, match=r"1 of \d+ blocks failed, the rest is done.*\n.*1999"),
    ):
        run_blocks([bad, *blocks[1:]], job, client=client)
    assert len(cube.recorded(path)) == len(blocks) - 1


def test_model_that_changes_under_way_is_refused(tiny_store, tmp_path):
    saved(tiny_store, tmp_path)
    job = Job(str(tiny_store.path), str(tmp_path / "c.zarr"), str(tmp_path), "0" * 64, 2001, 1)
    with pytest.raises(MismatchError, match="changed while the job ran"):
        reconstruct_block(plan_blocks(tiny_store.path, years=[2000], window=1)[0], job)
