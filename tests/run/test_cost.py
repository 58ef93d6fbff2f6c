from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ai4land.errors import ConfigError
from ai4land.run import cost
from ai4land.run.cost import DEVICES, Memory, Rates, count, estimate, operations, rates_of, refusals, refuse
from ai4land.run.file import load_run

RATES = Rates(step=0.1, scored=0.05, forward=1e-6, host=2e-6, shard=0.01, read=1e-7, hands=1, turns=False, about="of the tests")


def run_of(tmp_path, *changes: str):
    return load_run("bavaria.yaml", [f"runs={tmp_path}", *changes])


def test_work_is_what_the_run_file_says(tmp_path):
    work = count(run_of(tmp_path))
    # 20 shards of 400 cells; 18 years from 2001, and 2 years from 1999 for validation, which walk over 1999-2001.
    assert work.blocks == 40
    # 18 years are 2 shards of four variables and two overviews, and 9 of the fractions; 2 years are one of each.
    assert work.objects == 20 * ((6 * 2 + 9) + (6 + 1))
    assert work.mapped == 20 * 400**2 * (18 + 2)
    assert work.walked.sum() == 20 * 400**2 * (18 + 3)
    assert work.passes.sum() == pytest.approx(3 * 20 * (400 + 2 * 56) ** 2 * (18 + 3))
    assert work.steps == 6000


def test_land_counts_before_there_is_a_store(tmp_path):
    run = run_of(tmp_path)
    assert count(run, land=0.5).blocks == count(run).blocks // 2
    assert count(run, land=0.0).blocks == 2


def test_years_on_both_sides_of_the_reference_are_blocks_of_their_own(tmp_path):
    work = count(
        run_of(
            tmp_path,
            "reconstruct.years=1999-2003",
            "reconstruct.years_a_shard=1",
            "split.validation={reference: 2001, years: 2002}",
            "split.test=null",
        )
    )
    assert work.blocks == 40
    assert set(work.walked / 400**2) == {3.0}


def test_memory_does_not_grow_with_the_globe(tmp_path):
    small = count(run_of(tmp_path))
    large = count(
        load_run(
            "global_1km.yaml",
            [f"runs={tmp_path}", "grid.shard=400", "grid.factor=20", "model.depth=3", "model.base=16", "reconstruct.at_once=2"],
        )
    )
    assert large.blocks > 20 * small.blocks
    assert large.worker.both < 2 * small.worker.both
    assert count(run_of(tmp_path, "reconstruct.at_once=4")).worker.both > small.worker.both


def test_operations_are_those_of_the_convolutions(tmp_path):
    run = run_of(tmp_path, "model.depth=1", "model.base=8")
    net = cost.network_of(run)
    fine = 2 * 9 * (net.inputs * 8 + 8 * 8) + 2 * 9 * (16 * 8 + 8 * 8) + 2 * 8 * net.classes
    coarse = 2 * 9 * (8 * 16 + 16 * 16) / 4 + 2 * 16 * 8
    assert operations(run) == pytest.approx(fine + coarse)
    assert next(net.parameters()).device == torch.device("meta")


def test_more_workers_take_less_but_never_less_than_the_longest_block(tmp_path):
    work = count(run_of(tmp_path))
    one, four, many = (estimate(work, RATES, workers=n) for n in (1, 4, 1000))
    assert one.reconstruct - cost.START == pytest.approx(4 * (four.reconstruct - cost.START))
    longest = (work.passes * RATES.forward + work.walked * RATES.host + work.years * RATES.shard + work.read * RATES.read).max()
    assert many.reconstruct == pytest.approx(cost.START + longest)
    assert one.train == pytest.approx(work.steps * 0.1 + work.scored * 0.05)
    assert 0 < one.network < 1
    shared = estimate(work, RATES, workers=1, trainers=4)
    assert shared.train == pytest.approx(one.train / 4) and shared.device_hours == pytest.approx(one.device_hours)


def test_threads_beside_the_network_hide_what_is_shorter(tmp_path):
    work = count(run_of(tmp_path))
    turns = replace(RATES, hands=100, turns=True)
    assert estimate(work, turns, workers=1).network == pytest.approx(1.0)
    assert estimate(work, replace(RATES, hands=2), workers=1).reconstruct - cost.START == pytest.approx(
        (estimate(work, RATES, workers=1).reconstruct - cost.START) / 2
    )


def test_stated_devices_differ(tmp_path):
    run = run_of(tmp_path, "train.batch=512", "model.base=64")
    fast, slow = rates_of(run, "h100"), rates_of(run, "a100")
    assert fast.step < slow.step and fast.forward < slow.forward
    with pytest.raises(ConfigError, match=r"device is 'h300', expected one of \['a100', 'h100'\]"):
        rates_of(run, "h300")


def test_what_cannot_fit_is_refused_with_every_reason(tmp_path):
    work = count(run_of(tmp_path, "train.batch=4096"))
    found = refusals(work, workers=50, memory=8e9)
    assert len(found) == 2
    assert "reconstruct with 50 workers needs" in found[0] and "the machine has 8.0 GB; lower reconstruct.workers" in found[0]
    assert "train needs" in found[1] and "lower train.batch" in found[1]
    assert not refusals(count(run_of(tmp_path)), workers=1, memory=8e9)
    many = refusals(count(run_of(tmp_path)), workers=1, trainers=50, memory=8e9)
    assert len(many) == 1 and "train with 50 workers needs" in many[0]


def test_on_a_cuda_device_one_block_at_a_time_is_in_the_network(tmp_path):
    few, many = (count(run_of(tmp_path, f"reconstruct.at_once={n}"), cuda=True).worker for n in (1, 8))
    plain = count(run_of(tmp_path, "reconstruct.at_once=8")).worker
    assert many.device < 8 * few.device < plain.device
    assert many.host == plain.host > few.host


def test_host_and_device_are_told_apart(tmp_path):
    work = count(run_of(tmp_path, "train.batch=4096"))
    assert any("train on the device needs" in f for f in refusals(work, workers=1, memory=DEVICES["h100"].memory, who="h100"))
    assert any("on the host" in f for f in refusals(work, workers=1, memory=Memory(1e6, 1e15), who="x"))


def test_run_that_is_too_large_for_the_disk_is_refused(tmp_path):
    run = load_run("global_300m.yaml", [f"runs={tmp_path}", "reconstruct.years=850-2100"])
    with pytest.raises(ConfigError, match=r"run cannot fit: .*store and cubes need \d+\.\d GB of disk"):
        refuse(run)
    assert not list(tmp_path.iterdir())


def test_files_of_a_run_are_looked_at_only_on_a_full_disk_and_may_vanish(tmp_path, monkeypatch):
    run = run_of(tmp_path)
    (run.folder / "a").mkdir(parents=True)
    (run.folder / "a" / "kept").write_bytes(b"12345")
    (run.folder / "a" / "vanished").symlink_to(tmp_path / "nowhere")
    assert cost._size_of(run.folder) == 5 and cost._size_of(tmp_path / "nowhere") == 0
    looked: list[Path] = []
    monkeypatch.setattr(cost, "_size_of", lambda folder: looked.append(folder) or 0)
    refuse(run)
    assert not looked
    with pytest.raises(ConfigError, match="GB of disk"):
        refuse(load_run("global_300m.yaml", [f"runs={tmp_path}", "reconstruct.years=850-2100"]))
    assert looked


def test_global_runs_fit_the_stated_device(tmp_path):
    for name in ("global_1km.yaml", "global_300m.yaml"):
        run = load_run(name, [f"runs={tmp_path}"])
        assert refusals(count(run, land=0.45, cuda=True), workers=1, memory=DEVICES["h100"].memory) == []
        refuse(run, device="h100", land=0.45)


def test_block_arrays_are_plain_numbers(tmp_path):
    work = count(run_of(tmp_path))
    assert all(a.dtype == np.float64 and a.shape == (work.blocks,) for a in (work.passes, work.walked, work.years, work.read))


def test_memory_of_scoring_and_figures_does_not_grow_with_the_globe(tmp_path):
    def bytes_of(half_width: int) -> tuple[float, float]:
        run = run_of(tmp_path)
        box = (-half_width, -half_width / 2, half_width, half_width / 2)
        grid = run.grid.model_copy(update={"bbox": box, "coarse_cell": 0.25, "factor": 90, "shard": 720, "origin": (0.0, 0.0)})
        run = run.model_copy(update={"grid": grid})
        return cost.scoring_memory(run), cost.figures_memory(run)

    (small, drawn), (large, drawn_large) = bytes_of(8), bytes_of(128)
    assert large == pytest.approx(small, rel=0.25) and drawn_large == pytest.approx(drawn, rel=0.25)
    assert large >= drawn_large > cost.PROCESS_BYTES
