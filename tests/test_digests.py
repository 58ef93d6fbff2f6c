"""Digests: equal for equal contents, different otherwise, and independent of order."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ai4land.digests import combine_digests, digest, digest_of


@given(st.dictionaries(st.text(max_size=4), st.integers(), max_size=5))
def test_digest_ignores_order_alone(values):
    assert digest(values) == digest(dict(reversed(values.items())))
    assert digest(values) != digest({**values, "another key": 0})
    assert len(digest(values)) == 16


def test_values_type_and_shape_tell_arrays_apart():
    values = np.arange(6, dtype=np.int16)
    arrays = [values, values.reshape(2, 3), values.astype(np.int32), values + 1]
    assert len({digest_of(a) for a in arrays}) == 4
    assert digest_of(values.reshape(2, 3).T) == digest_of(values.reshape(2, 3).T.copy())
    assert digest_of(values, values) != digest_of(values)


def test_order_of_parts_does_not_matter_but_their_names_do():
    assert (
        combine_digests({(0, 1): "a", (1, 0): "b"})
        == combine_digests({(1, 0): "b", (0, 1): "a"})
        != combine_digests({(0, 1): "b", (1, 0): "a"})
    )
