from __future__ import annotations

import itertools
import json
import math
from functools import partial

import numpy as np
import pytest
import torch

from ai4land.errors import DataError, MismatchError
from ai4land.model.forward import bfloat16_pays
from ai4land.model.unet import UNet
from ai4land.store.read import open_store
from ai4land.train.batch import PatchLoader
from ai4land.train.loop import Schedule, fit
from ai4land.train.normalise import fit_spec

PAIRS = ((2000, 2001), (2001, 2002), (2000, 2002))


class _Killed(BaseException):
    """Stands for the end of the process."""


def setup(tiny):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cells = np.ones(tiny.grid.coarse.shape, bool)
    spec = fit_spec(open_store(tiny.path), cells=cells, pairs=PAIRS, codes=tiny.legend.codes.tolist(), factor=8)
    load = partial(
        PatchLoader, partial(open_store, tiny.path), grid=tiny.grid, legend=tiny.legend, spec=spec, cells=cells, patch=16, batch=4
    )
    model = UNet(
        static_channels=len(spec.static_names),
        coarse_channels=len(spec.coarse_names),
        classes=tiny.legend.n,
        factor=8,
        base=6,
        depth=2,
    )
    validation = list(load(pairs=((2000, 2003),), seed=9).batches(0, 3))
    return model, load(pairs=PAIRS, seed=1, mask_some=0.2), validation


def run(tiny, folder, *, progress=None, fingerprint="f", **changes):
    model, loader, validation = setup(tiny)
    settings = {"steps": 24, "warmup": 4, "validate_every": 6, "checkpoint_every": 6, "precision": "float32", **changes}
    folder.mkdir(exist_ok=True)
    return fit(
        model,
        batches=loader.batches,
        validation=validation,
        weights=torch.ones(tiny.legend.n),
        schedule=Schedule(**settings),
        folder=folder,
        fingerprint=fingerprint,
        device=torch.device("cpu"),
        progress=progress,
    )


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_learns_and_records_every_step(tiny_store, tmp_path):
    result = run(tiny_store, tmp_path, steps=60, learning_rate=5e-3, validate_every=20)
    record = rows(tmp_path)
    assert [r["step"] for r in record] == list(range(61))
    validated = [r["validation_loss"] for r in record if "validation_loss" in r]
    assert len(validated) == 4 and result.best_loss == min(validated) < 0.97 * validated[0]
    assert all(math.isfinite(r["loss"]) and r["seconds"] >= r["waited"] >= 0 for r in record[1:])
    assert {"validation_accuracy", "validation_figure_of_merit"} <= record[0].keys()


@pytest.mark.parametrize("at", [7, 12, 17])
def test_killed_training_ends_with_the_same_weights(tiny_store, tmp_path, at):
    whole = run(tiny_store, tmp_path / "whole")

    def kill(step, _):
        if step == at:
            raise _Killed

    with pytest.raises(_Killed):
        run(tiny_store, tmp_path / "cut", progress=kill)
    assert rows(tmp_path / "cut")[-1]["step"] == at
    again = run(tiny_store, tmp_path / "cut")
    assert equal(whole.weights, again.weights) and again.best_step == whole.best_step
    keep = ("step", "loss", "lr", "validation_loss")
    picked = [[{k: r.get(k) for k in keep} for r in rows(tmp_path / name)] for name in ("whole", "cut")]
    assert picked[0] == picked[1]


def test_finished_training_is_not_repeated(tiny_store, tmp_path):
    first = run(tiny_store, tmp_path)
    steps = []
    again = run(tiny_store, tmp_path, progress=lambda step, _: steps.append(step))
    assert not steps and equal(first.weights, again.weights)


def test_state_of_another_configuration_is_refused(tiny_store, tmp_path):
    run(tiny_store, tmp_path, steps=6)
    with pytest.raises(MismatchError, match="begun with another configuration"):
        run(tiny_store, tmp_path, steps=6, fingerprint="other")


def test_damaged_state_is_refused(tiny_store, tmp_path):
    run(tiny_store, tmp_path, steps=6)
    state = tmp_path / "resume.pt"
    state.write_bytes(state.read_bytes()[:500])
    with pytest.raises(DataError, match=r"resume\.pt cannot be read"):
        run(tiny_store, tmp_path, steps=6)


def test_training_stops_when_validation_no_longer_improves(tiny_store, tmp_path):
    result = run(tiny_store, tmp_path, steps=400, learning_rate=1e-9, weight_decay=0.0, validate_every=2, patience=3, ema=0.0)
    assert result.steps < 40


def test_training_that_never_improves_says_that_the_weights_are_untrained(tiny_store, tmp_path, caplog):
    with caplog.at_level("WARNING", "ai4land.train.loop"):
        assert run(tiny_store, tmp_path / "good", steps=6).best_step == 6 and not caplog.records
        result = run(tiny_store, tmp_path / "bad", steps=6, learning_rate=10.0, warmup=0, ema=0.0)
    untrained, _, _ = setup(tiny_store)
    assert result.best_step == 0 and equal(result.weights, untrained.state_dict())
    assert "the UNTRAINED weights are kept" in caplog.text and str(tmp_path / "bad") in caplog.text


def test_loss_that_is_not_a_number_stops_the_training(tiny_store, tmp_path):
    model, loader, validation = setup(tiny_store)

    def poisoned(first):
        for batch in loader.batches(first):
            batch.static[:] = float("nan")
            yield batch

    with pytest.raises(DataError, match="training loss is nan at step 0"):
        fit(
            model,
            batches=poisoned,
            validation=validation,
            weights=torch.ones(7),
            schedule=Schedule(steps=3, precision="float32"),
            folder=tmp_path,
            fingerprint="f",
            device=torch.device("cpu"),
        )


def test_learning_rate_warms_up_and_falls_to_zero():
    schedule = Schedule(steps=100, learning_rate=1.0, warmup=10)
    rates = [schedule.rate(step) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and max(rates) == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:])) and rates[100] == 0


def test_half_precision_is_chosen_by_hardware(tiny_store, tmp_path):
    assert isinstance(bfloat16_pays(torch.device("cpu")), bool)
    exact = run(tiny_store, tmp_path / "a", steps=12)
    half = run(tiny_store, tmp_path / "b", steps=12, precision="bfloat16")
    assert not equal(exact.weights, half.weights)
    assert abs(exact.best_loss - half.best_loss) < 0.05 * exact.best_loss
