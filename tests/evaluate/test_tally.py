"""What is read of the maps, how often, and what the sums of windows and years are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ai4land.errors import DataError
from ai4land.evaluate.tally import TRUTH, Change, Maps, Sums, Tally, add_window
from ai4land.grid import Window, make_grid, tiles
from ai4land.legend import MISSING

GRID = make_grid((0, 0, 16, 16), coarse_cell=4, factor=4, shard=8)
YEARS = (2001, 2002, 2003)
INDEX = {year: np.random.default_rng(year).integers(0, 3, GRID.shape).astype(np.uint8) for year in (2000, *YEARS)}
MAPS = Maps(
    grid=GRID,
    classes=("a", "b", "c"),
    observed=lambda year, w: INDEX[year][w.slices],
    predictions={"model": lambda year, w: INDEX[year - 1][w.slices]},
    where=lambda w: np.ones((w.height, w.width), bool),
    reference=2000,
)


def add(maps: Maps, windows: Any, years: Any = YEARS) -> Sums:
    sums = Sums(maps, years)
    for window in windows:
        add_window(sums, maps, window, block=2, min_coverage=0.999)
    return sums


def pooled(sums: Sums) -> Tally:
    out = Tally(MAPS.names, 3, 4)
    for tally in sums.years.values():
        out.add(tally)
    return out


def test_every_map_is_read_once_a_year_and_window_all_years_of_a_window_in_a_row() -> None:
    asked: list[tuple[str, int, Window]] = []

    def noted(name: str, read: Any) -> Any:
        def noting(year: int, w: Window) -> Any:
            asked.append((name, year, w))
            return read(year, w)

        return noting

    maps = replace(MAPS, observed=noted(TRUTH, MAPS.observed), predictions={"model": noted("model", MAPS.predictions["model"])})
    windows = list(GRID.shards())
    add(maps, windows)
    want = Counter((name, year, w) for w in windows for year in YEARS for name in (TRUTH, "model"))
    assert Counter(asked) == want + Counter((TRUTH, 2000, w) for w in windows)
    assert list(dict.fromkeys(w for *_, w in asked)) == [asked[i][2] for i in range(0, len(asked), 7)] == windows


def test_nothing_is_read_where_nothing_is_scored() -> None:
    def never(year: int, w: Window) -> Any:
        raise AssertionError(f"{year} of {w} was read")

    nowhere = replace(MAPS, observed=never, where=lambda w: np.zeros((w.height, w.width), bool))
    assert not add(nowhere, GRID.shards()).flicker.any()


def test_sums_of_windows_are_those_of_the_whole() -> None:
    rows, cols = (int(v) for v in GRID.shape)
    whole = add(MAPS, [Window(0, 0, rows, cols)])
    parts = add(MAPS, reversed(list(tiles((rows, cols), 8))))
    for got, want in zip(pooled(parts).blocks.merged(), pooled(whole).blocks.merged(), strict=True):
        np.testing.assert_allclose(got, want)
    np.testing.assert_allclose(pooled(parts).merit, pooled(whole).merit)
    np.testing.assert_allclose(parts.flicker, whole.flicker)
    assert pooled(parts).change.table() == pytest.approx(pooled(whole).change.table())
    assert pooled(whole).change.pair.sum() == pytest.approx(3 * (GRID.cell_areas() * cols).sum())


def test_change_has_shares_and_the_bound_of_net_changes() -> None:
    pair = np.array([[6.0, 2.0], [1.0, 1.0]])
    assert Change(pair, net=1.5).table() == {
        "gross": pytest.approx(0.3),
        "net": pytest.approx(0.1),
        "coarse_net": pytest.approx(0.15),
        "figure_of_merit_bound": pytest.approx(0.5),
    }
    assert set(Change(np.zeros((2, 2))).table().values()) == {None}


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (np.zeros((8, 4), np.uint8), r"model map of 2001 is \(8, 4\), expected \(8, 8\)"),
        (np.full((8, 8), 3, np.uint8), r"model map of 2001 holds index 3, expected 0..2 or 255"),
    ],
)
def test_a_map_that_does_not_fit_is_named(index: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        replace(MAPS, predictions={"model": lambda year, w: index}).read("model", 2001, GRID.shards()[0])


def test_cells_without_a_class_are_no_error() -> None:
    maps = replace(MAPS, observed=lambda year, w: np.full((w.height, w.width), MISSING, np.uint8))
    sums = add(maps, GRID.shards())
    assert not pooled(sums).blocks.merged()[1].any() and not sums.flicker.any()
