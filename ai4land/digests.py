"""Digests of settings, of arrays and of other digests: equal digests mean equal contents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES = 16
"""Length of the digests of data."""


def digest(value: Any) -> str:
    """Hash any JSON value to 16 hexadecimal digits.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def digest_of(*arrays: NDArray[Any]) -> str:
    """Hash the values, types and shapes of arrays."""
    made = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for values in arrays:
        made.update(f"{values.dtype.str}{values.shape}".encode())
        made.update(np.ascontiguousarray(values).data)
    return made.hexdigest()


def combine_digests(digests: Mapping[Any, str]) -> str:
    """Hash named digests into one, whatever their order."""
    made = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name, value in sorted(digests.items()):
        made.update(f"{name}={value};".encode())
    return made.hexdigest()
