from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch

from ai4land.errors import MismatchError
from ai4land.grid import Window, coarse_window
from ai4land.model.checkpoint import load_card
from ai4land.model.ensemble import Ensemble
from ai4land.model.features import FeatureSpec
from ai4land.model.forward import ACCURACY, AGREEMENT, Forward, bfloat16_pays, folded, precision_of, ready
from ai4land.train.batch import Batch
from ai4land.train.validation import gate
from tests.models import CLASSES, FACTOR, randomised

CPU = torch.device("cpu")


def ensemble(members: int = 2, *, depth: int = 2) -> Ensemble:
    return Ensemble([randomised(depth, base=4, seed=i).float() for i in range(members)], sharpness=0.7).eval()


def maps(size: int, *, seed: int = 0, origin: int = 0):
    rng = np.random.default_rng(seed)
    cells, offset = coarse_window(Window(origin, origin, size, size), FACTOR)
    reference = rng.integers(0, CLASSES, (size, size), dtype=np.uint8)
    reference[rng.random((size, size)) < 0.2] = 255
    years = [rng.standard_normal((3, cells.height, cells.width), dtype=np.float32) for _ in range(3)]
    return rng.standard_normal((2, size, size)).astype(np.float16), reference, offset, years


@torch.inference_mode()
def plain(model: Ensemble, static, reference, offset, coarse) -> np.ndarray:
    logits = model(
        torch.from_numpy(static).float()[None],
        torch.from_numpy(reference)[None],
        torch.from_numpy(coarse)[None],
        torch.tensor([offset]),
    )
    h = model.halo
    return torch.softmax(logits[0, :, h:-h, h:-h], dim=0).numpy()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("members", [1, 3])
def test_fast_way_gives_the_bytes_of_the_plain_one(members, depth):
    torch.set_num_threads(1)
    model = ensemble(members, depth=depth)
    slow = folded(model)
    forward = Forward(model, device=CPU)
    for seed, size in ((0, 2 * model.halo + 16), (1, 2 * model.halo + 32), (2, 2 * model.halo + 16)):
        static, reference, offset, years = maps(size, seed=seed, origin=seed * model.stride)
        forward.begin(static, reference, offset=offset)
        for coarse in years:
            fast = forward.probabilities(coarse)
            assert fast.dtype == np.float32
            assert np.array_equal(fast, plain(slow, static, reference, offset, coarse))
            assert np.abs(fast - plain(model, static, reference, offset, coarse)).max() < 1e-3


def test_bfloat16_stays_near_and_does_not_depend_on_the_tiling():
    torch.set_num_threads(1)
    model = ensemble()
    halo = model.halo
    static, reference, offset, years = maps(2 * halo + 64)
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        forward = Forward(model, dtype=dtype, device=CPU)
        forward.begin(static, reference, offset=offset)
        made[dtype] = forward.probabilities(years[0])
    assert not np.array_equal(*made.values())
    assert (np.abs(made[torch.float32] - made[torch.bfloat16]) < 0.05).mean() > 0.95
    cut = slice(0, 2 * halo + 16)
    forward.begin(static[:, cut, cut], reference[cut, cut], offset=offset)
    assert np.abs(forward.probabilities(years[0]) - made[torch.bfloat16][:, :16, :16]).max() < 0.05


def held_out(model: Ensemble, size: int = 32) -> list[Batch]:
    static, reference, offset, years = maps(size)
    tensors = (torch.from_numpy(a)[None] for a in (static.astype(np.float32), reference, years[0]))
    s, r, c = tensors
    with torch.inference_mode():
        target = model(s, r, c, torch.tensor([offset])).argmax(1).to(torch.uint8)
        target[0, 0] = 255
    return [Batch(s, r, c, torch.tensor([offset]), target)]


@pytest.mark.parametrize("totals", [False, True])
def test_gate_counts_the_cells_that_bfloat16_moves(totals):
    model = ensemble()
    batches = held_out(model)
    found = gate(model, batches, totals=totals)
    assert 0.8 < found["agreement"] < 1
    if not totals:
        assert found["accuracy_lost"] == pytest.approx(1 - found["agreement"], abs=1e-3)
    for member in model.members:
        member.head.weight.data.zero_()
        member.persistence.weight.data.copy_(10 * torch.eye(CLASSES + 1)[:, :CLASSES])
    assert gate(model, batches, totals=totals) == {"agreement": 1.0, "accuracy_lost": 0.0}


def test_bfloat16_is_used_where_card_and_device_allow_it(saved, monkeypatch):
    card = load_card(saved)
    good, bad = {"agreement": AGREEMENT, "accuracy_lost": ACCURACY}, {"agreement": 0.999, "accuracy_lost": 2 * ACCURACY}
    for pays in (True, False):
        monkeypatch.setattr("ai4land.model.forward.bfloat16_pays", lambda _, pays=pays: pays)
        chosen = [precision_of(card.model_copy(update={"bfloat16": b}), device=CPU) for b in ({}, good, bad)]
        assert chosen == ["float32", "bfloat16" if pays else "float32", "float32"]
    assert isinstance(bfloat16_pays(CPU), bool)


def test_threads_share_the_weights_and_have_buffers_of_their_own(saved):
    checksum = load_card(saved).weights
    here = ready(str(saved), checksum, "float32")[0]
    with ThreadPoolExecutor(1) as other:
        there = other.submit(ready, str(saved), checksum, "float32").result()[0]
        assert other.submit(ready, str(saved), checksum, "float32").result()[0] is there
    assert there is not here
    for ours, theirs in zip(here.members, there.members, strict=True):
        pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
        assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)


def test_threads_side_by_side_predict_what_one_alone_predicts():
    torch.set_num_threads(1)
    first = Forward(ensemble(), device=CPU)
    windows = [maps(2 * first.halo + 16, seed=seed) for seed in range(4)]
    barrier = Barrier(len(windows))

    def run(forward: Forward, window, wait=lambda: None) -> list[np.ndarray]:
        static, reference, offset, years = window
        wait()
        forward.begin(static, reference, offset=offset)
        wait()
        return [forward.probabilities(coarse) for coarse in years]

    alone = [run(first, window) for window in windows]
    with ThreadPoolExecutor(len(windows)) as pool:
        jobs = [pool.submit(run, first.for_another_thread(), window, barrier.wait) for window in windows]
    for expected, job in zip(alone, jobs, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(expected, job.result(), strict=True))


def test_model_is_made_ready_once_and_knows_its_checksum(saved):
    checksum = load_card(saved).weights
    first = ready(str(saved), checksum, "float32")
    assert first[0] is ready(str(saved), checksum, "float32")[0]
    assert ready(str(saved), checksum, "bfloat16")[0].dtype == torch.bfloat16
    assert isinstance(first[1].spec, FeatureSpec)
    with pytest.raises(MismatchError, match="expected 0000000000000000; it changed while the job ran"):
        ready(str(saved), "0" * 64, "float32")
