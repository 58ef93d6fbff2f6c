"""The modules that make model input and run the network work on arrays: they load no library of labelled arrays, stores or clusters."""

from __future__ import annotations

import subprocess
import sys

import pytest

MODULES = ("norm", "unet", "features", "ensemble", "forward", "checkpoint", "device")
HEAVY = ("xarray", "pandas", "dask", "distributed", "zarr", "odc", "xbatcher", "scipy", "rasterio")


@pytest.mark.parametrize("name", MODULES)
def test_importing_loads_no_library_of_stores_or_clusters(name):
    code = f"import sys, ai4land.{name}; print(*sorted(set(sys.modules) & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == []
