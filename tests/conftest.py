"""Shared fixtures. Two cores: every test keeps its own thread count low."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real test data, from ``AI4LAND_TEST_DATA`` or beside the project; skips where it is absent."""
    folder = Path(os.environ.get("AI4LAND_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real test data not found at {folder}; set AI4LAND_TEST_DATA")
    return folder
