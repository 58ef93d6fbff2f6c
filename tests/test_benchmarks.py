from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ai4land.model.unet import interpolate
from tests import ROOT

SCRIPT = ROOT / "benchmarks" / "run.py"
RATIOS = {
    "bf16_speedup",
    "reconstruct_vs_naive_float32",
    "loader_vs_dask",
    "loader_vs_dask_sparse",
    "loader_vs_dask_kept",
    "reconstruct_vs_naive",
}


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmarks_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def setting(bench, tmp_path_factory):
    return bench.make_setting(tmp_path_factory.mktemp("bench"), bench.QUICK)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    output = tmp_path_factory.mktemp("quick") / "results.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--output", str(output)], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(output.read_text(encoding="utf-8"))
    assert all(row["name"] in done.stdout for row in made)
    return made


def test_quick_run_writes_rows_that_make_sense(rows):
    assert all(set(row) == {"name", "value", "unit", "versus"} for row in rows)
    values = {row["name"]: row["value"] for row in rows}
    assert len(values) == len(rows)
    shares = {"data_wait_share", "two_worker_loss", "nudged_loss"}
    assert all(math.isfinite(v) and v > 0 for n, v in values.items() if n not in shares)
    assert all(0 <= values[name] <= 1 for name in shares)
    assert values["halo_factor"] == pytest.approx(((1440 + 2 * 56) / 1440) ** 2, abs=1e-3)
    assert {row["unit"] for row in rows if row["name"] in RATIOS} == {"times"}


def test_committed_results_and_document_have_the_rows_of_a_run(rows):
    names = {row["name"] for row in rows}
    committed = json.loads((ROOT / "benchmarks" / "results.json").read_text(encoding="utf-8"))
    assert {row["name"] for row in committed} == names
    document = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", document, flags=re.MULTILINE)) == names


def test_arms_alternate_and_are_prepared_outside_the_clock(bench):
    calls: list[str] = []

    def arm(name):
        calls.append(f"prepare {name}")
        return lambda: calls.append(name)

    seconds = bench.alternate({"a": lambda: arm("a"), "b": lambda: arm("b")}, rounds=3)
    assert calls == ["prepare a", "a", "prepare b", "b"] * 3
    assert {name: len(v) for name, v in seconds.items()} == {"a": 3, "b": 3}


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=9), st.floats(0.1, 10))
def test_ratio_does_not_see_load_that_hits_both_arms_of_a_round(bench, load, times):
    assert bench.ratio([times * v for v in load], load) == pytest.approx(times)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(2, 9), st.integers(0, 2**32))
def test_naive_upsampling_is_what_the_network_does_inside(bench, channels, rows, cols, factor, seed):
    coarse = np.random.default_rng(seed).standard_normal((channels, rows, cols)).astype(np.float32)
    padded = torch.from_numpy(np.pad(coarse, ((0, 0), (1, 1), (1, 1)), mode="edge"))[None]
    wanted = interpolate(padded, torch.tensor([[factor, factor]]), (rows * factor, cols * factor), factor)[0].numpy()
    assert np.abs(bench.upsample(coarse, factor) - wanted).max() < 1e-5


def test_comparison_is_refused_unless_both_ways_give_the_same_map(bench, setting, monkeypatch):
    model = bench.network(setting)
    year = setting.size.mapped[-1]
    bench.check_same(setting, model, year=year)
    monkeypatch.setattr(bench, "upsample", lambda coarse, factor: coarse.repeat(factor, axis=1).repeat(factor, axis=2))
    with pytest.raises(RuntimeError, match=f"probabilities of {year} differ by"):
        bench.check_same(setting, model, year=year)


def test_cubes_with_another_class_are_refused(bench, setting):
    paths = [setting.folder / f"{name}.zarr" for name in "ab"]
    for path in paths:
        bench.new_cube(setting, path, years_a_shard=1)
        for window in setting.grid.shards():
            bench.reconstruct_block(bench.Block(window, setting.size.mapped), setting.settings(path))
    bench.check_cubes(*paths)
    bench.zarr.open_group(paths[1], mode="r+")["fraction"][0, 0, :4, :4] = 7777
    with pytest.raises(RuntimeError, match="the cubes differ by"):
        bench.check_cubes(*paths)
