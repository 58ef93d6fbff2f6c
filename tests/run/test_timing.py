from __future__ import annotations

import dataclasses
import math

import pytest

from ai4land.cube.cube import Block
from ai4land.grid import Window
from ai4land.run.cost import count, estimate
from ai4land.run.file import load_run
from ai4land.run.timing import _line, _outward, calibrate

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


def test_time_of_a_year_is_a_share_of_the_land_and_a_start_that_never_help():
    assert _line([10, 20, 40], [2.0, 3.0, 5.0]) == pytest.approx((0.1, 1.0))
    assert _line([10, 20], [3.0, 2.0])[0] == 0
    assert _line([10, 20], [0.0, 2.0])[1] == 0
    assert _line([10, 10], [1.0, 3.0]) == (0.2, 0.0)


def test_years_are_timed_outward_and_the_map_itself_only_if_it_is_alone():
    window = Window(0, 0, 8, 8)
    assert _outward(Block(window, (2001, 2002, 2003)), 2003).years == (2002, 2001)
    assert _outward(Block(window, (2003,)), 2003).years == (2003,)
    assert _outward(Block(window, (2001, 2002)), None).years == (2001, 2002)
