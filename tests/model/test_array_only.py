"""The modules that make model input and run the network work on arrays: they load no library of labelled arrays, stores or clusters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ai4land

MODULES = sorted(p.stem for p in Path(ai4land.__file__).parent.joinpath("model").glob("[a-z]*.py"))
HEAVY = ("xarray", "pandas", "dask", "distributed", "zarr", "odc", "xbatcher", "scipy", "rasterio")


@pytest.mark.parametrize("name", MODULES)
def test_importing_loads_no_library_of_stores_or_clusters(name):
    code = f"import sys, ai4land.model.{name}; print(*sorted(set(sys.modules) & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == []
