"""Crosswalks: the built-in ones and a user's own, and what they make of the states of a scenario."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ai4land.crosswalk import REMAINDER, Crosswalk, load_crosswalk
from ai4land.errors import ConfigError
from ai4land.legend import Legend, load_legend
from ai4land.scenario.luh2 import STATES

CROSSWALKS = sorted(p.stem for p in (Path(str(files("ai4land"))) / "data" / "crosswalks").glob("*.csv"))
HILDA = load_legend("hildaplus")


def legend_of(crosswalk: str) -> Legend:
    return load_legend(crosswalk.split("_to_")[1])


def test_built_in_crosswalks_are_there():
    assert {"luh2_to_hildaplus", "luh2_to_lccs_level1", "luh2_to_ipcc", "lccs_level1_to_ipcc", "isimip2b_to_igbp"} <= set(
        CROSSWALKS
    )


@pytest.mark.parametrize("name", CROSSWALKS)
def test_crosswalk_loads_and_rows_sum_to_one(name):
    legend = legend_of(name)
    walk = load_crosswalk(name, legend)
    assert walk.matrix.shape == (len(walk.states), legend.n)
    assert np.allclose(walk.matrix.sum(1), 1, atol=1e-6)
    assert (walk.matrix >= 0).all()
    assert len(set(walk.states)) == len(walk.states)


def test_crosswalk_of_luh2_places_its_states():
    walk = load_crosswalk("luh2_to_hildaplus", HILDA)
    place = {s: HILDA.names[int(row.argmax())] for s, row in zip(walk.states, walk.matrix, strict=True)}
    assert {s: place[s] for s in ("primf", "urban", "c3ann", "pastr")} == {
        "primf": "forest", "urban": "urban", "c3ann": "cropland", "pastr": "pasture_rangeland",
    }  # fmt: skip


@pytest.mark.parametrize("name", [*CROSSWALKS, "identity"])
@given(data=st.data())
def test_to_classes_conserves_the_sum(name, data):
    walk = load_crosswalk(name, HILDA if name == "identity" else legend_of(name))
    shares = data.draw(hnp.arrays(np.float32, (len(walk.states), 2, 3), elements=st.floats(0, 1, width=32)))
    classes = walk.to_classes(shares)
    assert classes.shape == (walk.matrix.shape[1], 2, 3)
    assert np.allclose(classes.sum(0), shares.sum(0, dtype=np.float64), rtol=1e-6, atol=1e-9)
    assert (classes >= 0).all()


def test_identity_maps_each_class_to_itself():
    walk = load_crosswalk("identity", HILDA)
    assert walk.states == tuple(str(c) for c in HILDA.codes)
    shares = np.random.default_rng(0).random((HILDA.n, 3))
    assert np.array_equal(walk.to_classes(shares), shares)


def test_rows_of_a_scenario_are_picked_in_its_order():
    walk = load_crosswalk("luh2_to_hildaplus", HILDA)
    rows = walk.for_states(["urban", "primf"])
    assert rows.states == ("urban", "primf", REMAINDER)
    assert np.array_equal(rows.matrix, walk.matrix[[walk.states.index(s) for s in rows.states]])
    assert walk.for_states([REMAINDER, "urban"]).states == (REMAINDER, "urban")
    with pytest.raises(ConfigError, match=r"no row for the states \['moss'\]"):
        walk.for_states(["urban", "moss"])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_ice_and_water_take_what_the_states_leave_of_a_cell(seed, rest):
    shares = np.moveaxis(np.random.default_rng(seed).dirichlet(np.ones(len(STATES)), size=(3, 4)) * (1 - rest), -1, 0)
    shares[:, 0, 0] = np.nan
    walk = load_crosswalk("luh2_to_ipcc", load_legend("ipcc"))
    classes = walk.for_states(STATES).to_classes(shares)
    assert np.isnan(classes[:, 0, 0]).all() and np.isfinite(classes[:, 1:]).all()
    np.testing.assert_allclose(classes.sum(axis=0)[1:], 1, atol=1e-6)
    np.testing.assert_allclose(classes[6, 1:], rest, atol=1e-6)
    np.testing.assert_allclose(classes[4], shares[STATES.index("urban")], rtol=1e-6)


def test_without_a_row_for_the_rest_it_is_left_out():
    walk = Crosswalk(name="w", states=("b", "a"), weights=((0, 1), (0.5, 0.5)))
    shares = np.random.default_rng(0).dirichlet(np.ones(2), size=5).T * 0.8
    classes = walk.for_states(["a", "b"]).to_classes(shares)
    np.testing.assert_allclose(classes[0], shares[0] / 2)
    np.testing.assert_allclose(classes.sum(axis=0), 0.8)
    with pytest.raises(ValueError, match="mismatch"):
        walk.to_classes(shares[:1])


def test_a_users_own_file_loads(tmp_path):
    (tmp_path / "walk.csv").write_text("# a comment\nstate,22\nwood,1\n\ngrass,1.0\n")
    walk = load_crosswalk(tmp_path / "walk.csv", HILDA)
    row = tuple(float(code == 22) for code in HILDA.codes)
    assert walk == Crosswalk(name="walk", states=("wood", "grass"), weights=(row, row))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("state,11,22\na,0.5,0.4\n", "row 'a' sums to 0.9"),
        ("state,11,23\na,0.5,0.5\n", r"columns \[23\] are not codes of legend hildaplus"),
        ("state,11,11\na,0,1\n", "each class code once"),
        ("state,11,22\na,1,0\na,0,1\n", "row 'a' is given twice"),
        ("state,11,22\na,1\n", "row 'a' has 2 cells, expected 3"),
        ("state,11,22\na,2,-1\n", "expected weights of 0..1"),
        ("state,11,22\na,nan,1\n", "expected weights of 0..1"),
        ("state,11,22\na,x,1\n", "could not convert"),
        ("", "is not valid"),
        ("state,11\nß,1\n".encode("latin-1"), "is not valid"),
    ],
)
def test_bad_crosswalk_files_are_refused(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message):
        load_crosswalk(path, HILDA)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.csv does not exist"):
        load_crosswalk(tmp_path / "gone.csv", HILDA)
    with pytest.raises(ConfigError, match=r"'gone', expected one of \['"):
        load_crosswalk("gone", HILDA)
