from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ai4land.errors import DataError
from ai4land.grid import Window, make_grid
from ai4land.legend import MISSING
from ai4land.model.features import LEAD_SCALE, Feature, FeatureSpec, features
from ai4land.train.normalise import fit_spec

SPEC = FeatureSpec(
    features=(Feature(name="height", mean=10.0, std=2.0), Feature(name="zone", codes=(3, 7)), Feature(name="rain")),
    states=("a", "b"),
    codes=(1, 2, 3),
    difference_std=(0.1, 0.001),
)
FACTOR, YEARS, STATES = 3, [2000, 2001, 2002, 2003], ["a", "b"]
PAIRS = ((2000, 2001), (2001, 2000), (2000, 2002))
CELLS = np.arange(20).reshape(4, 5) % 3 != 0

PLACE = np.linspace(50, 40, 3), np.linspace(0, 15, 4)


def store(seed: int = 0) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    shape = (4 * FACTOR, 5 * FACTOR)
    static = rng.normal(50, 20, (3, *shape)).astype(np.float32)
    static[1] = rng.integers(1, 4, shape)
    static[2] = 7.0
    static[0, rng.random(shape) < 0.1] = np.nan
    return xr.Dataset(
        {
            "mask": (("latitude", "longitude"), rng.random(shape) < 0.8),
            "static": (("feature", "latitude", "longitude"), static),
            "categorical": ("feature", [False, True, False]),
            "coarse": (("year", "state", "coarse_latitude", "coarse_longitude"), rng.random((4, 2, 4, 5)).astype(np.float32)),
        },
        coords={"feature": ["height", "zone", "flat"], "year": YEARS, "state": STATES},
    )


def fit(ds: xr.Dataset, **changes) -> FeatureSpec:
    return fit_spec(ds, **{"cells": CELLS, "pairs": PAIRS, "codes": [1, 2], "factor": FACTOR, **changes})


def test_fit_gives_the_moments_of_the_training_cells():
    ds = store()
    spec = fit(ds)
    chosen = np.kron(CELLS, np.ones((FACTOR, FACTOR), bool)) & ds["mask"].values
    values = ds["static"].values[0][chosen].astype(np.float64)
    assert spec.features[0].mean == pytest.approx(np.nanmean(values), rel=1e-6)
    assert spec.features[0].std == pytest.approx(np.nanstd(values), rel=1e-5)
    assert spec.features[1] == Feature(name="zone", codes=(1, 2, 3))
    coarse = ds["coarse"].values[:, :, CELLS].astype(np.float64)
    changes = np.stack([coarse[YEARS.index(b)] - coarse[YEARS.index(a)] for a, b in PAIRS])
    assert spec.difference_std == pytest.approx(np.sqrt((changes**2).mean(axis=(0, 2))), rel=1e-5)
    assert (spec.states, spec.codes) == (("a", "b"), (1, 2))


@given(seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_fit_sees_training_cells_and_training_years_alone(seed):
    rng, ds = np.random.default_rng(seed), store()
    before = fit(ds)
    unseen = ~(np.kron(CELLS, np.ones((FACTOR, FACTOR), bool)) & ds["mask"].values)
    ds["static"].values[:, unseen] = rng.normal(0, 1e4, (3, int(unseen.sum())))
    ds["coarse"].values[:, :, ~CELLS] = rng.normal(0, 1e4, (4, 2, int((~CELLS).sum())))
    ds["coarse"].values[YEARS.index(2003)] = np.nan
    assert fit(ds) == before


def test_fit_does_see_what_it_trains_on():
    before, ds = fit(store()), store()
    ds["coarse"].values[0][:, CELLS] += 1
    assert fit(ds).difference_std != before.difference_std
    assert fit(store(), pairs=PAIRS[:1]).difference_std != before.difference_std
    assert fit(store(), cells=~CELLS).features[0] != before.features[0]


def test_constant_layers_and_states_do_not_divide_by_zero():
    ds = store()
    ds["coarse"].values[:] = 0.5
    spec = fit(ds)
    assert spec.features[2] == Feature(name="flat", mean=7.0, std=1.0)
    assert all(v > 0 for v in spec.difference_std)
    assert (spec.static_channels(ds["static"].values)[-1] == 0).all()
    shares = np.full((2, 4, 5), 0.5)
    made = features(
        spec.static_channels(ds["static"].values),
        reference=None,
        wanted=shares,
        start=shares,
        lead=0,
        spec=spec,
        place=(np.arange(4.0), np.arange(5.0)),
    )
    assert np.isfinite(made.coarse).all()


def test_missing_coarse_cells_do_not_spoil_the_fit():
    ds = store()
    first = tuple(np.argwhere(CELLS)[0])
    ds["coarse"].values[:, 0, first[0], first[1]] = np.nan
    without = CELLS.copy()
    without[first] = False
    assert fit(ds).difference_std == pytest.approx(fit(ds, cells=without).difference_std)


def test_a_map_without_values_is_refused():
    ds = store()
    ds["static"].values[0] = np.nan
    with pytest.raises(DataError, match="static map height has no value on the training cells"):
        fit(ds)


@given(
    hnp.arrays(
        np.float32, (3, 2, 3), elements=st.floats(-1e6, 1e6, width=32) | st.sampled_from([np.nan, np.inf, -np.inf, 3.0, 7.0])
    )
)
def test_static_channels_are_normalised_clipped_and_one_hot(raw):
    got = SPEC.static_channels(raw)
    assert SPEC.static_names == ["height", "zone=3", "zone=7", "rain"]
    assert got.shape == (len(SPEC.static_names), 2, 3)
    assert got.dtype == np.float16
    assert np.isfinite(got).all()
    assert (abs(got) <= 20).all()
    assert (got[[0, 3]][np.isnan(raw[[0, 2]])] == 0).all()
    assert np.array_equal(got[1], raw[1] == 3)
    assert np.array_equal(got[2], raw[1] == 7)
    plain = np.isfinite(raw[0]) & (abs(raw[0] - 10) < 40)
    assert np.allclose(got[0][plain], (raw[0][plain] - 10) / 2, rtol=1e-3, atol=1e-6)
    assert (got[0][raw[0] == np.inf] == 20).all()
    assert (got[0][raw[0] == -np.inf] == -20).all()


def test_static_channels_refuse_another_number_of_maps():
    with pytest.raises(ValueError, match="zip"):
        SPEC.static_channels(np.zeros((2, 4, 4), np.float32))


def inputs(seed: int = 0):
    rng = np.random.default_rng(seed)
    reference = rng.integers(0, 3, (6, 6)).astype(np.uint8)
    return SPEC.static_channels(rng.normal(size=(3, 6, 6))), reference, rng.random((2, 3, 4)), rng.random((2, 3, 4))


def test_coarse_channels_are_what_their_names_say():
    static, reference, wanted, start = inputs()
    made = features(static, reference=reference, wanted=wanted, start=start, lead=-5, spec=SPEC, place=PLACE)
    assert made.static is static
    assert np.array_equal(made.reference, reference)
    assert made.coarse.dtype == np.float32
    assert made.coarse.shape == (len(SPEC.coarse_names), 3, 4)
    channel = dict(zip(SPEC.coarse_names, made.coarse, strict=True))
    assert len(channel) == len(SPEC.coarse_names)
    for i, state in enumerate(SPEC.states):
        assert np.allclose(channel[f"{state}:wanted"], wanted[i])
        assert np.allclose(channel[f"{state}:reference"], start[i])
        expected = ((wanted - start)[i] / SPEC.difference_std[i]).clip(-20, 20)
        assert np.allclose(channel[f"{state}:difference"], expected, rtol=1e-5)
    assert abs(channel["b:difference"]).max() == 20
    assert (channel["lead"] == np.float32(-5 / LEAD_SCALE)).all()
    assert (channel["known"] == 1).all()


def test_place_channels_are_waves_of_the_coarse_centres():
    spec = SPEC.model_copy(update={"position": (360.0, 90.0)})
    static, reference, wanted, start = inputs()
    made = features(static, reference=reference, wanted=wanted, start=start, lead=1, spec=spec, place=PLACE)
    channel = dict(zip(spec.coarse_names, made.coarse, strict=True))
    y, x = np.broadcast_to(PLACE[0][:, None], (3, 4)), np.broadcast_to(PLACE[1], (3, 4))
    assert np.allclose(channel["sin(y / 360)"], np.sin(np.radians(y)))
    assert np.allclose(channel["cos(x / 90)"], np.cos(np.radians(4 * x)), atol=1e-6)
    assert len(channel) == len(SPEC.coarse_names) + 8


def test_place_is_the_same_on_both_sides_of_the_dateline():
    grid = make_grid((-180, -90, 180, 90), coarse_cell=10.0, factor=4, shard=24)
    spec = SPEC.model_copy(update={"position": (360.0, 120.0, 40.0)})
    west = spec.place_channels(*grid.coarse_centres(Window(0, -2, 3, 5)))
    east = spec.place_channels(*grid.coarse_centres(Window(0, 34, 3, 5)))
    assert np.array_equal(west, east)
    assert grid.coarse_centres(Window(-1, 0, 2, 1))[0].tolist() == [95.0, 85.0]


@given(seed=st.integers(0, 100), lead=st.integers(-50, 50))
@settings(deadline=None)
def test_without_a_map_start_and_lead_do_not_matter(seed, lead):
    static, reference, wanted, start = inputs(seed)
    start[:, 0, 0] = np.nan
    made = features(static, reference=None, wanted=wanted, start=start, lead=lead, spec=SPEC, place=PLACE)
    plain = features(
        static, reference=np.full_like(reference, MISSING), wanted=wanted, start=wanted, lead=0, spec=SPEC, place=PLACE
    )
    for name in ("static", "reference", "coarse"):
        assert np.array_equal(getattr(made, name), getattr(plain, name))
    assert (made.reference == MISSING).all()


@given(hole=hnp.arrays(bool, (2, 2, 3, 4)))
def test_coarse_cells_without_data_are_marked_unknown(hole):
    static, reference, wanted, start = inputs()
    wanted[hole[0]], start[hole[1]] = np.nan, np.nan
    made = features(static, reference=reference, wanted=wanted, start=start, lead=1, spec=SPEC, place=PLACE)
    unknown = hole.any(axis=(0, 1))
    assert np.isfinite(made.coarse).all()
    assert np.array_equal(made.coarse[-1] == 0, unknown)
    assert (made.coarse[:-2, unknown] == 0).all()
