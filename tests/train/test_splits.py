from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ai4land.errors import ConfigError, DataError, MismatchError
from ai4land.train.splits import (
    BUFFER,
    TEST,
    TRAIN,
    VALIDATION,
    Scored,
    Split,
    block_roles,
    load_split,
    make_split,
    training_pairs,
)

YEARS = st.sets(st.integers(2000, 2008), min_size=1, max_size=4)
SCORED = st.none() | st.builds(lambda r, y: Scored(r, tuple(sorted(y))), st.none() | st.integers(2000, 2008), YEARS)
SPACE = st.fixed_dictionaries(
    {"block": st.integers(1, 4), "validation": st.floats(0, 0.6), "test": st.floats(0, 0.6), "buffer": st.integers(0, 3)}
)
SHAPE = st.tuples(st.integers(1, 10), st.integers(1, 14))


def chebyshev(shape, *, wraps: bool):
    rows, cols = (v.ravel() for v in np.indices(shape))
    dx = abs(cols[:, None] - cols)
    if wraps:
        dx = np.minimum(dx, shape[1] - dx)
    return np.maximum(abs(rows[:, None] - rows), dx)


@given(
    shape=SHAPE, train=YEARS, lead=st.integers(0, 4), backward=st.booleans(), validation=SCORED, test=SCORED,
    space=st.none() | SPACE, seed=st.integers(0, 99), wraps=st.booleans(),
)  # fmt: skip
@settings(max_examples=400, deadline=None)
def test_no_cell_year_is_scored_twice(shape, train, lead, backward, validation, test, space, seed, wraps):
    try:
        split = make_split(
            shape,
            train=train,
            max_lead=lead,
            backward=backward,
            validation=validation,
            test=test,
            space=space,
            seed=seed,
            wraps=wraps,
        )
    except ConfigError:
        assume(False)
    count = np.zeros((2010, *shape), int)
    for year in {y for _, y in split.pairs}:
        count[year] += split.roles == TRAIN
    for scored, role in ((split.validation, VALIDATION), (split.test, TEST)):
        if scored is not None:
            assert scored.reference is None or scored.reference not in scored.years
            for year in scored.years:
                count[year] += split.cells(role)
    assert count.max() == 1
    assert not count[:, split.roles == BUFFER].any()


@given(shape=SHAPE, space=SPACE, seed=st.integers(0, 999), wraps=st.booleans())
@settings(max_examples=150, deadline=None)
def test_buffer_keeps_roles_apart(shape, space, seed, wraps):
    roles = block_roles(shape, seed=seed, wraps=wraps, **space)
    assert roles.shape == shape
    assert roles.dtype == np.uint8
    distance, flat = chebyshev(shape, wraps=wraps), roles.ravel()
    for one, other in ((TRAIN, VALIDATION), (TRAIN, TEST), (VALIDATION, TEST)):
        apart = distance[np.ix_(flat == one, flat == other)]
        assert apart.size == 0 or apart.min() > space["buffer"]
    # The buffer is no wider than it must be: each of its cells is near a held-out block.
    held = block_roles(shape, seed=seed, wraps=wraps, **{**space, "buffer": 0}).ravel()
    near = distance[np.ix_(flat == BUFFER, np.isin(held, [VALIDATION, TEST]))]
    assert near.shape[0] == 0 or (near.min(axis=1) <= space["buffer"]).all()
    assert (flat[flat != BUFFER] == held[flat != BUFFER]).all()


def test_whole_blocks_are_held_out_in_the_wanted_shares():
    roles = block_roles((40, 60), block=4, validation=0.1, test=0.2, buffer=0, seed=1)
    blocks = roles.reshape(10, 4, 15, 4).swapaxes(1, 2).reshape(150, 16)
    assert (blocks == blocks[:, :1]).all()
    assert [int((blocks[:, 0] == r).sum()) for r in (VALIDATION, TEST)] == [15, 30]


def test_wrapping_matters_at_the_dateline():
    roles = {w: block_roles((6, 12), block=2, validation=0.2, test=0.2, buffer=1, seed=4, wraps=w) for w in (False, True)}
    assert (roles[False] != roles[True]).any()
    changed = np.nonzero(roles[False] != roles[True])[1]
    assert set(changed.tolist()) <= {0, 11}


def split_of(**changes) -> Split:
    values = {
        "train": range(2000, 2004), "max_lead": 2, "backward": True, "validation": Scored(2003, (2004,)), "test": Scored(2004, (2005, 2006)),
        "space": {"block": 2, "validation": 0.1, "test": 0.2, "buffer": 1}, "seed": 3,
    }  # fmt: skip
    return make_split((12, 16), **{**values, **changes})


def test_same_seed_same_hash_and_other_seed_another():
    assert split_of().hash == split_of().hash
    hashes = {
        split_of().hash,
        split_of(seed=4).hash,
        split_of(max_lead=1).hash,
        split_of(test=None).hash,
        split_of(backward=False).hash,
    }
    assert len(hashes) == 5


@given(space=st.none() | SPACE, validation=SCORED, seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_saved_split_loads_equal(space, validation, seed, tmp_path_factory):
    try:
        split = split_of(space=space, validation=validation, seed=seed)
    except ConfigError:
        assume(False)
    path = tmp_path_factory.mktemp("split") / "deep" / "splits.json"
    split.save(path)
    again = load_split(path)
    assert np.array_equal(again.roles, split.roles)
    assert again.roles.dtype == split.roles.dtype
    assert (again.pairs, again.validation, again.test, again.hash) == (split.pairs, split.validation, split.test, split.hash)


@pytest.mark.parametrize("key", ["pairs", "validation", "test", "roles"])
def test_edited_file_is_refused(tmp_path, key):
    path = tmp_path / "splits.json"
    split_of().save(path)
    values = json.loads(path.read_text())
    if key == "roles":
        values["roles"][0] = "".join("0" if c == "3" else "3" for c in values["roles"][0])
    elif key == "pairs":
        values["pairs"].pop()
    else:
        values[key][0] += 1
    path.write_text(json.dumps(values))
    with pytest.raises(MismatchError, match="it was edited"):
        load_split(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"roles": ["x"], "pairs": [], "validation": null, "test": null, "hash": ""}']
)
def test_damaged_file_is_refused(tmp_path, text):
    path = tmp_path / "splits.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"splits\.json cannot be read"):
        load_split(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": Scored(2004, (2004, 2005)), "space": None}, "validation scores 2004, the year of its own reference map"),
        ({"test": Scored(2005, (2005,))}, "test scores 2005, the year of its own reference map"),
        ({"validation": Scored(2004, (2003,)), "space": None}, r"validation scores years \[2003\] that training has seen"),
        ({"test": Scored(2004, (2002, 2005)), "space": None}, r"test scores years \[2002\] that training has seen"),
        ({"validation": Scored(2003, (2004, 2005)), "space": None}, r"validation and test both score years \[2005\]"),
        (
            {"test": Scored(1999, (1998, 2006)), "space": None},
            r"training or validation uses the maps of \[2000, 2001, 2002, 2003\]",
        ),
        ({"validation": Scored(2005, (2004,)), "space": None}, r"uses the maps of \[2005\]"),
        ({"space": {"block": 1, "validation": 0.5, "test": 0.5, "buffer": 1}}, "leaves no coarse cell .* to train on"),
        ({"train": [2000, 2010]}, r"years \[2000, 2010\] give no pair with a lead of 1 to 2"),
    ],
)
def test_leaks_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        split_of(**changes)


def test_held_out_blocks_may_share_years_with_training():
    split = split_of(validation=Scored(2000, (2001,)), test=Scored(2000, (2002, 2003)))
    assert split.in_space
    assert (split.roles[split.cells(TEST)] == TEST).all()
    assert not split_of(space=None).in_space
    assert split_of(space=None).cells(TEST).all()


def test_without_a_reference_map_years_are_shared_in_space_alone(tmp_path):
    alone = {"max_lead": 0, "validation": Scored(None, (2001, 2002)), "test": Scored(None, (2001, 2003, 2005))}
    split = split_of(**alone)
    assert set(split.training_years) >= {2001, 2002, 2003} and all(a == b for a, b in split.pairs)
    roles = [split.cells(role) for role in (TRAIN, VALIDATION, TEST)]
    assert all(r.any() for r in roles) and np.sum(roles, axis=0).max() == 1
    split.save(tmp_path / "splits.json")
    again = load_split(tmp_path / "splits.json")
    assert (again.validation, again.test, again.hash) == (split.validation, split.test, split.hash)
    assert split.hash != split_of(**{**alone, "test": Scored(1999, (2001, 2003, 2005))}).hash
    with pytest.raises(ConfigError, match=r"test scores years \[2001, 2003\] that training has seen"):
        split_of(**alone, space={"block": 2, "validation": 0.3, "test": 0.0, "buffer": 0})
    for space in (None, {"block": 2, "validation": 0.0, "test": 0.3, "buffer": 0}):
        with pytest.raises(ConfigError, match=r"validation scores years \[2001, 2002\] that training has seen"):
            split_of(**alone, space=space)


@given(years=st.sets(st.integers(1990, 2010), min_size=2), lead=st.integers(0, 8), backward=st.booleans())
def test_training_pairs_are_all_pairs_within_the_lead(years, lead, backward):
    expected = {(a, b) for a in years for b in years if (a == b if lead == 0 else 0 < abs(a - b) <= lead and (backward or b > a))}
    assume(expected)
    pairs = training_pairs(years, max_lead=lead, backward=backward)
    assert len(pairs) == len(expected)
    assert set(pairs) == expected
