from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ai4land.constrain.totals import Totals
from ai4land.constrain.walk import walk
from ai4land.crosswalk import Crosswalk
from ai4land.grid import block_sum

N, F, SHAPE = 4, 8, (16, 24)
IDENTITY = Crosswalk(name="one", states=tuple("abcd"), weights=tuple(tuple(float(i == j) for j in range(N)) for i in range(N)))
YEARS = [2000, 2001, 2002, 2003, 2004, 2005, 2006]


def world(seed: int, *, drift: float = 0.15):
    """A reference map, probabilities of the years after it, and a scenario that goes up and down."""
    rng = np.random.default_rng(seed)
    reference = rng.integers(0, N, SHAPE).astype(np.uint8)
    mapped = rng.random(SHAPE) < 0.9
    mapped[:8, :8] = False
    reference[~mapped] = 255
    probabilities, states = {}, {}
    held = np.stack([block_sum(((reference == k) & mapped).astype(float), F) for k in range(N)])
    held /= np.maximum(held.sum(0), 1)
    for i, year in enumerate(YEARS):
        logits = rng.standard_normal((N, *SHAPE)) + 3 * (np.arange(N)[:, None, None] == reference)
        p = np.exp(logits)
        probabilities[year] = (p / p.sum(0)).astype(np.float32)
        swing = drift * np.sin(i) * rng.random(held.shape)
        raw = np.clip(held + swing, 0, None)
        states[year] = held if i == 0 else raw / np.maximum(raw.sum(0), 1e-9)
    return reference, mapped, probabilities, states


def totals_of(reference, mapped, states) -> Totals:
    return Totals(
        states.__getitem__,
        names=list("abcd"),
        crosswalk=IDENTITY,
        mapped=mapped,
        factor=F,
        areas=None,
        reference=reference,
        reference_year=None if reference is None else 2000,
    )


def walked(seed: int, years=None, **options):
    reference, mapped, probabilities, states = world(seed)
    totals = totals_of(reference, mapped, states)
    given_ = ((y, probabilities[y]) for y in (years or YEARS))
    common = {"mapped": mapped, "factor": F, "totals": totals, "reference": reference, "reference_year": 2000}
    return dict(walk(given_, **{**common, **options})), totals, mapped, reference


@given(seed=st.integers(0, 500), keep=st.sampled_from([None, 0.0, 2.0]))
@settings(max_examples=12, deadline=None)
def test_every_year_meets_the_totals_in_both_products(seed, keep):
    made, totals, mapped, reference = walked(seed, keep=keep)
    for year, part in made.items():
        have = np.stack([block_sum(((part.land_cover == k) & mapped).astype(float), F) for k in range(N)])
        assert np.array_equal(have, np.maximum(totals.quotas(year), 0))
        mean = block_sum(part.fractions[1] * mapped, F) / np.maximum(totals.cells, 1)
        there = totals.cells > 0
        assert np.abs(mean - totals.shares(year)[1])[there].max() < 1e-6
        assert (part.land_cover[~mapped] == 255).all() and not part.unmet.any()
    assert np.array_equal(made[2000].land_cover[mapped], reference[mapped])


def test_only_net_change_leaves_the_classes_that_lose_nothing_alone():
    made, totals, mapped, _ = walked(3)
    before = made[2000].land_cover
    for year in YEARS[1:]:
        now = made[year].land_cover
        step = totals.quotas(year) - totals.quotas(year - 1)
        moved = (now != before) & mapped
        for k in range(N):
            lost = block_sum((moved & (before == k)).astype(float), F)
            assert np.array_equal(lost, np.maximum(-step[k], 0))
        before = now


def returns(maps, mapped, *, within: int) -> int:
    """Cells that are again, in any year, what they were up to so many years before, and something else between."""
    count = 0
    for last in range(2, len(YEARS)):
        now = maps[YEARS[last]].land_cover
        for gone in range(max(1, last - within), last):
            was, then = (maps[YEARS[i]].land_cover for i in (gone - 1, gone))
            count += int(((was == now) & (then != now) & mapped & (maps[YEARS[last - 1]].land_cover != now)).sum())
    return count


@pytest.mark.parametrize("keep", [None, 0.0])
def test_cells_do_not_go_back_while_another_can(keep):
    made, _, mapped, _ = walked(5, settle=5, keep=keep)
    loose, *_ = walked(5, settle=0, keep=keep)
    assert returns(made, mapped, within=5) < 0.2 * returns(loose, mapped, within=5)


def test_a_cell_that_was_forced_back_stays_where_it_fits():
    """Class 1 comes and goes; in 2003 class 2 takes its cells where they fit, not from those that were forced back."""
    reference = np.zeros((F, F), np.uint8)
    reference[:, 4:] = 3
    wants = {2000: (0, 0), 2001: (4, 0), 2002: (0, 0), 2003: (0, 4)}
    counts = {y: np.array([32 - a - b, a, b, 32], float) for y, (a, b) in wants.items()}
    states = {y: (c / 64)[:, None, None] for y, c in counts.items()}
    p = np.full((N, F, F), 1e-3)
    p[3, :, 4:], p[0, :, :4] = 1, 1
    p[1, 0, :4], p[2, 7, :4] = 0.5, 0.5
    p = (p / p.sum(0)).astype(np.float32)
    mapped = np.ones((F, F), bool)
    common = {"mapped": mapped, "factor": F, "totals": totals_of(reference, mapped, states), "reference": reference}
    made = dict(walk(((y, p) for y in wants), reference_year=2000, locked=reference == 3, **common))
    assert (made[2001].land_cover[0, :4] == 1).all()
    assert np.array_equal(made[2002].land_cover, reference)
    assert (made[2003].land_cover[7, :4] == 2).all()


def test_locked_cells_keep_their_class_and_contradictions_are_told():
    rng = np.random.default_rng(1)
    locked = rng.random(SHAPE) < 0.9
    made, totals, mapped, reference = walked(7, locked=locked)
    told = 0
    for year, part in made.items():
        hold = locked & mapped
        assert np.array_equal(part.land_cover[hold], reference[hold])
        assert np.allclose(part.confidence[hold], 1)
        have = np.stack([block_sum(((part.land_cover == k) & mapped).astype(float), F) for k in range(N)])
        assert np.array_equal(have - totals.quotas(year) * (totals.quotas(year) >= 0), part.unmet)
        told += np.abs(part.unmet).sum()
    assert told > 0


def test_without_totals_the_published_map_is_the_most_likely_one():
    made, *_ = walked(2, totals=None)
    for part in made.values():
        assert np.array_equal(part.land_cover, part.most_likely)


def test_without_a_reference_map_each_year_stands_alone():
    _, mapped, probabilities, states = world(4)
    totals = totals_of(None, mapped, states)
    common = {"mapped": mapped, "factor": F, "totals": totals, "reference": None, "reference_year": None}
    together = dict(walk(probabilities.items(), **common))
    alone = dict(walk([(2004, probabilities[2004])], **common))
    assert np.array_equal(together[2004].land_cover, alone[2004].land_cover)
    assert together[2004].change_probability is None
    have = np.stack([block_sum(((together[2004].land_cover == k) & mapped).astype(float), F) for k in range(N)])
    assert np.array_equal(have, np.maximum(totals.quotas(2004), 0))


def test_shares_of_change_and_confidence_are_those_of_the_fractions():
    made, _, mapped, reference = walked(6)
    part = made[2003]
    rows, cols = np.nonzero(mapped)
    assert np.allclose(part.change_probability[rows, cols], 1 - part.fractions[reference[rows, cols], rows, cols])
    assert np.allclose(part.confidence[rows, cols], part.fractions[part.land_cover[rows, cols], rows, cols])


def test_mapped_cells_that_the_reference_map_lacks_are_filled():
    reference, mapped, probabilities, states = world(8)
    holes = mapped & (np.arange(SHAPE[0])[:, None] % 5 == 1)
    torn = np.where(holes, 255, reference).astype(np.uint8)
    totals = totals_of(torn, mapped, states)
    common = {"mapped": mapped, "factor": F, "totals": totals, "reference": torn, "reference_year": 2000}
    made = dict(walk(((y, probabilities[y]) for y in YEARS[:3]), **common))
    assert (made[2002].land_cover[mapped] < N).all()
    assert np.isnan(made[2002].change_probability[holes]).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_walk_gives_the_same_maps(seed):
    one, two = (walked(seed)[0] for _ in range(2))
    assert all(np.array_equal(one[y].land_cover, two[y].land_cover) for y in YEARS)
