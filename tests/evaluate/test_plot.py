"""Figures are written whole, in the size and the colours they should have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from PIL import Image

from ai4land.errors import DataError
from ai4land.evaluate.plot import (
    DPI,
    HITS_COLOURS,
    MAX_SIDE,
    curves_figure,
    hits_figure,
    lead_figure,
    map_figure,
    reliability_figure,
    step_of,
    thin,
)
from ai4land.evaluate.reliability import Reliability
from ai4land.grid import Window, tiles
from ai4land.legend import MISSING, load_legend

LEGEND = load_legend("hildaplus")
EXTENT = (10.0, 47.0, 13.0, 49.0)


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def count(path: Path, colour: str) -> int:
    return int((pixels(path) == np.array(list(bytes.fromhex(colour[1:])))).all(axis=-1).sum())


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 90), st.integers(8, 64))
@settings(max_examples=40, deadline=None)
def test_thin_takes_the_middle_of_each_block_whatever_the_windows(rows: int, cols: int, step: int, size: int) -> None:
    codes = (np.arange(rows * cols) % 251).reshape(rows, cols).astype(np.uint8)
    got = thin(lambda w: codes[w.slices], windows=tiles((rows, cols), size), shape=(rows, cols), step=step)
    first = [min(step - 1, n - 1) // 2 for n in codes.shape]
    assert np.array_equal(got, codes[first[0] :: step, first[1] :: step])
    half = thin(lambda w: codes[w.slices], windows=[Window(0, 0, rows, cols // 2)], shape=(rows, cols), step=step, fill=251)
    outside = np.arange(first[1], cols, step) >= cols // 2
    assert (half[:, outside] == 251).all() and np.array_equal(half[:, ~outside], got[:, ~outside])


def test_the_step_keeps_the_limit_and_leaves_a_small_map_alone() -> None:
    assert step_of((MAX_SIDE, 3)) == 1 and step_of((MAX_SIDE + 1, 3)) == 2
    assert math.ceil(129_600 / step_of((64_800, 129_600))) <= MAX_SIDE


def test_map_has_the_colours_of_the_classes_that_occur(tmp_path: Path) -> None:
    index = np.array([[0, 1, 1], [3, 3, MISSING]], np.uint8).repeat(20, 0).repeat(20, 1)
    path = map_figure(LEGEND.decode(index), legend=LEGEND, extent=EXTENT, title="Land cover", path=tmp_path / "sub" / "map.png")
    areas = {c.name: count(path, c.colour) for c in LEGEND.classes}
    assert {name for name, area in areas.items() if area > 100} == {"urban", "cropland", "forest"}
    assert areas["cropland"] == pytest.approx(2 * areas["urban"], rel=0.05)
    assert [p.name for p in path.parent.iterdir()] == ["map.png"]


def test_map_keeps_the_shape_of_the_land(tmp_path: Path) -> None:
    codes = np.full((20, 30), 44, np.uint8)
    path = map_figure(codes, legend=LEGEND, extent=(10, 47, 16, 49), title="t", path=tmp_path / "map.png")
    forest = (pixels(path) == np.array(list(bytes.fromhex(LEGEND.classes[3].colour[1:])))).all(axis=-1)
    height, width = forest.sum(axis=0).max(), forest[len(forest) // 2].sum()
    assert width == pytest.approx(9 * DPI, rel=0.01)
    assert height / width == pytest.approx(2 / 6 / math.cos(math.radians(48)), rel=0.01)


def test_a_short_map_with_many_classes_has_its_legend_below(tmp_path: Path) -> None:
    legend = load_legend("lccs_level1")
    codes = legend.decode((np.arange(440, dtype=np.int64).reshape(4, 110) % legend.n).astype(np.uint8))
    path = map_figure(codes, legend=legend, extent=(-180, -10, 180, 10), title="t", path=tmp_path / "map.png")
    rgb = pixels(path)
    assert rgb.shape[1] < 10.5 * DPI
    below = rgb[int(1.4 * DPI) :]
    for item in legend.classes:
        assert (below == np.array(list(bytes.fromhex(item.colour[1:])))).all(axis=-1).sum() > 50, item.name


def test_map_refuses_unknown_codes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="class codes 5"):
        map_figure(np.full((2, 2), 5, np.uint8), legend=LEGEND, extent=EXTENT, title="t", path=tmp_path / "map.png")
    assert list(tmp_path.iterdir()) == []


def test_change_map_shows_every_kind_with_its_colour(tmp_path: Path) -> None:
    kinds = [  # reference, truth, predicted
        (0, 1, 1),  # hit
        (0, 1, 0),  # miss
        (0, 0, 1),  # false alarm
        (0, 1, 2),  # wrong hit
        (0, 0, 0),  # unchanged
        (0, MISSING, 0),  # no land
    ]
    maps = [np.array([[k[i] for k in kinds]], np.uint8).repeat(6, 0) for i in range(3)]
    path = hits_figure(*maps, extent=EXTENT, title="Change", path=tmp_path / "change.png")
    areas = [count(path, colour) for name, colour in HITS_COLOURS.items() if name != "no land"]
    assert min(areas) > 10_000
    assert max(areas) < 1.03 * min(areas)


def test_change_map_weighs_its_shares_by_area(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels: list[list[str]] = []
    plain = Axes.legend

    def legend(axes: Axes, patches: Any, names: list[str], **style: Any) -> Any:
        labels.append(names)
        return plain(axes, patches, names, **style)

    monkeypatch.setattr(Axes, "legend", legend)
    reference, predicted = np.zeros((2, 2, 2), np.uint8)
    truth = np.array([[1, 1], [0, 0]], np.uint8)
    for areas in (None, np.array([1.0, 3.0])):
        hits_figure(reference, truth, predicted, extent=EXTENT, title="t", path=tmp_path / "hits.png", areas=areas)
    assert labels == [["misses: 50.00%", "unchanged: 50.00%"], ["misses: 25.00%", "unchanged: 75.00%"]]


def test_colours_of_change_are_told_apart_by_the_colour_blind() -> None:
    # Machado, Oliveira & Fernandes 2009: linear RGB as seen without red, without green and without blue receptors.
    seen = {
        "all": np.eye(3),
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }
    srgb = np.array([list(bytes.fromhex(c[1:])) for name, c in HITS_COLOURS.items() if name != "no land"]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    for matrix in seen.values():
        xyz = np.cbrt((linear @ np.array(matrix).T).clip(0, 1) @ to_xyz.T / to_xyz.sum(axis=1))
        lab = np.stack([116 * xyz[:, 1], 500 * (xyz[:, 0] - xyz[:, 1]), 200 * (xyz[:, 1] - xyz[:, 2])], axis=1)
        apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[np.triu_indices(len(lab), 1)]
        assert apart.min() > 35


def test_reliability_draws_a_line_a_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    p = rng.random(3000)
    tables = {}
    for name, power in (("model", 1.0), ("most_likely", 2.0)):
        sums = Reliability()
        sums.add(p, rng.random(p.size) < p**power, np.ones(p.size), source="confidence")
        tables[name] = sums.table()
    one = reliability_figure({"model": tables["model"]}, tmp_path / "one.png")
    two = reliability_figure(tables, tmp_path / "two.png", given="probability of change", came="share that changed")
    assert pixels(two).shape == (6 * DPI, 5 * DPI, 3)
    assert count(one, "#0a5bb5") > 2000 < count(two, "#0a5bb5")
    assert count(one, "#6b6b6b") < 50 < 1000 < count(two, "#6b6b6b")
    with pytest.raises(DataError, match="expected at least one with probabilities"):
        reliability_figure({"model": Reliability().table()}, tmp_path / "none.png")


def test_reliability_of_rare_events_fills_the_figure(tmp_path: Path) -> None:
    p = np.linspace(0, 0.2, 3000)
    sums = Reliability()
    sums.add(p, np.random.default_rng(0).random(p.size) < p, np.ones(p.size), source="change")
    path = reliability_figure({"model": sums.event_table()}, tmp_path / "rare.png")
    blue = (pixels(path)[: 4 * DPI] == np.array(list(bytes.fromhex("0a5bb5")))).all(axis=-1)
    assert np.ptp(np.flatnonzero(blue.any(axis=0))) > 2.5 * DPI


def test_change_map_leaves_out_what_does_not_occur(tmp_path: Path) -> None:
    still = np.zeros((4, 4), np.uint8)
    path = hits_figure(still, still, still, extent=EXTENT, title="Change", path=tmp_path / "change.png")
    assert count(path, HITS_COLOURS["unchanged"]) > 10_000
    assert all(count(path, HITS_COLOURS[name]) == 0 for name in ("hits", "misses", "false alarms", "wrong hits"))
    with pytest.raises(DataError, match="expected equal shapes"):
        hits_figure(still, still, still[:2], extent=EXTENT, title="t", path=path)


def test_curves_draw_both_losses(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"step": s, "loss": 2 / s + 0.1, "lr": 1e-3} for s in range(1, 101)]
    plain = curves_figure(rows, tmp_path / "plain.png")
    for s in (20, 40, 60, 80, 100):
        rows[s - 1]["validation_loss"] = 1.0 - s / 200
    rows[50]["loss"] = float("nan")
    full = curves_figure(rows, tmp_path / "full.png")
    assert pixels(full).shape == (round(4.2 * DPI), 7 * DPI, 3)
    assert count(plain, "#c96a00") == 0
    assert count(full, "#c96a00") > 300
    assert count(full, "#0a5bb5") > 300


def test_curves_refuse_metrics_without_a_loss(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train first"):
        curves_figure([{"step": 1, "lr": 0.1}], tmp_path / "curves.png")


def test_lead_figure_draws_a_line_a_prediction(tmp_path: Path) -> None:
    years = range(2010, 2014)
    model = {str(y): {"overall_accuracy": 0.9 - 0.01 * i, "figure_of_merit": 0.2} for i, y in enumerate(years)}
    same = {str(y): {"overall_accuracy": 0.8 - 0.01 * i, "figure_of_merit": None} for i, y in enumerate(years)}
    one = lead_figure({"model": model}, tmp_path / "one.png")
    two = lead_figure({"model": model, "persistence": same}, tmp_path / "two.png")
    assert pixels(two).shape == (round(3.9 * DPI), 9 * DPI, 3)
    assert count(one, "#0a5bb5") > 1000
    assert count(one, "#6b6b6b") < 50 < count(two, "#6b6b6b")
    assert lead_figure({"model": {2010: {"overall_accuracy": 0.9}}}, tmp_path / "single.png").stat().st_size > 1000
    with pytest.raises(DataError, match="evaluate first"):
        lead_figure({"model": {}}, tmp_path / "none.png")


def test_a_figure_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "map.strange"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="strange"):
        map_figure(np.full((2, 2), 44, np.uint8), legend=LEGEND, extent=EXTENT, title="t", path=path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["map.strange"]


def test_a_figure_can_be_a_vector_file(tmp_path: Path) -> None:
    path = curves_figure([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}], tmp_path / "curves.pdf")
    assert path.read_bytes().startswith(b"%PDF")
