from __future__ import annotations

import dataclasses
import math

from ai4land.calibrate import calibrate
from ai4land.cost import count, estimate
from ai4land.runfile import load_run

SMALL = [
    "grid.factor=20",
    "grid.shard=80",
    "train.patch=40",
    "train.batch=2",
    "model.base=4",
    "model.depth=2",
    "train.members=2",
    "train.threads=1",
]


def test_rates_of_a_run_that_is_not_begun(tmp_path):
    run = load_run("bavaria.yaml", [f"runs={tmp_path}", *SMALL])
    lines: list[str] = []
    rates = calibrate(run, tell=lines.append)
    values = [v for k, v in dataclasses.asdict(rates).items() if k != "about"]
    assert all(math.isfinite(v) and v >= 0 for v in values) and rates.step > 0 and rates.forward > 0
    assert "a practice store, a practice model" in rates.about and len(lines) == 2
    cost = estimate(count(run), rates, workers=2)
    assert cost.train > 0 and cost.reconstruct > 0
    assert not list(tmp_path.iterdir())
