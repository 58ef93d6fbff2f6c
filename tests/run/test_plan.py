from __future__ import annotations

import pytest

from ai4land.reconstruct.plan import plan_blocks
from ai4land.run.config import RunConfig
from ai4land.run.plan import plan
from tests.scored import YEARS, make_cube, prepare, run_in


@pytest.fixture
def run(tiny_store, tmp_path) -> RunConfig:
    run = run_in(tmp_path)
    prepare(run, tiny_store.path)
    return run


def test_plan_before_anything_is_done(tmp_path):
    lines = list(plan(run_in(tmp_path / "runs")))
    rows = dict(lines)
    assert len(rows) == len(lines)
    assert rows["grid"].startswith("64 x 128 fine cells of 2.8125, 8 x 16 coarse cells, 8 shards of 32")
    assert rows["legend"] == "hildaplus: 7 classes; scenario: shares; 2 static maps"
    assert rows["align"].startswith("to do") and "done" not in rows["train"]
    assert "4 years from the map of 2001" in rows["cube.zarr"] and "blocks" not in rows["cube.zarr"]
    assert "2 years from the map of 2001" in rows["score test"]
    assert not (tmp_path / "runs").exists()


def test_plan_counts_what_is_done(run):
    card = (run.folder / "model.json").rename(run.folder / "card.json")
    assert not dict(plan(run))["train"].endswith("done")
    blocks = len(plan_blocks(run.folder / "store.zarr", years=YEARS, reference=2001))
    assert f"0 of {blocks} blocks done" in dict(plan(run))["cube.zarr"]
    make_cube(run, "cube", observed=True, keep=3)
    card.rename(run.folder / "model.json")
    rows = dict(plan(run))
    assert f"3 of {blocks} blocks done" in rows["cube.zarr"] and rows["align"] == "done" and rows["train"].endswith("; done")
    assert rows["work"].startswith(f"{blocks + len(plan_blocks(run.folder / 'store.zarr', years=[2001], reference=2000))} blocks")


def test_plan_knows_a_legend_beside_the_data(tmp_path):
    text = "title: two\nfill: {code: 0, name: sea, colour: '#ffffff'}\nclasses:\n"
    text += "".join(f"  - {{code: {c}, name: c{c}, colour: '#00000{c}'}}\n" for c in (1, 2))
    (tmp_path / "two.yaml").write_text(text)
    run = run_in(tmp_path / "runs", data=str(tmp_path), landcover={"source": "x", "legend": "two.yaml"})
    assert dict(plan(run))["legend"].startswith("two: 2 classes")
