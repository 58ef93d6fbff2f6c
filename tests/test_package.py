from __future__ import annotations

import subprocess
import sys

import pytest

import ai4land


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120).stdout.strip()


def test_importing_the_package_changes_no_option_of_xarray():
    every = "import xarray, importlib, pkgutil; before = dict(xarray.get_options()); import ai4land\n"
    every += "for m in pkgutil.iter_modules(ai4land.__path__): m.name.endswith('__main__') or importlib.import_module(f'ai4land.{m.name}')\n"
    assert python(every + "print(dict(xarray.get_options()) == before)").splitlines()[-1] == "True"


@pytest.mark.parametrize("module", ["ai4land", "ai4land.cli"])
def test_package_and_command_line_load_no_heavy_library(module):
    heavy = {"xarray", "pandas", "dask", "distributed", "zarr", "torch", "rasterio", "odc", "scipy", "numcodecs"}
    loaded = python(f"import sys, {module}; print(*sorted({{n.partition('.')[0] for n in sys.modules}}))").split()
    assert not heavy & set(loaded)


def test_every_public_name_is_there_and_documented():
    for name in ai4land.__all__:
        assert getattr(ai4land, name).__doc__ and name in ai4land.__doc__ and name in dir(ai4land)
    with pytest.raises(AttributeError, match="has no attribute 'colour'"):
        ai4land.colour  # noqa: B018
