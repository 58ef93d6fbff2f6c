"""A cube keeps the CF conventions, by the compliance checker of IOOS, as the NetCDF file that it becomes."""

from __future__ import annotations

import pytest
import xarray as xr

from ai4land.cube import cube
from ai4land.grid import Window, make_grid
from ai4land.legend import load_legend
from tests.cubes import ABOUT, LEGEND, fill

GRID = make_grid((-180, -90, 180, 90), coarse_cell=45.0, factor=48, shard=96)
ALLOWED = (
    "proj:code should begin with a letter",  # the name is that of GeoZarr's convention
    "fraction's spatio-temporal dimensions are not in the recommended order",  # a recommendation: years are read, not classes
    "Variable is not of type byte, short, or int",  # CF 1.9 and later allow the unsigned types (section 2.2), of which the checker does not know
)


@pytest.mark.parametrize("legend", ["hildaplus", "lccs_level1"])
@pytest.mark.parametrize("group", [None, "overviews/1"])
def test_a_cube_keeps_the_conventions(tmp_path, group, legend):
    runner = pytest.importorskip("compliance_checker.runner")
    path, land = tmp_path / "cube.zarr", [Window(96, 0, 96, 96)]
    cube.create(path, identity={}, land=land, **{**ABOUT, "grid": GRID, "legend": load_legend(legend)})
    if legend == LEGEND.name:
        fill(path, land)
    cube.show(path)
    ds = xr.open_zarr(path, group=group, decode_cf=False, chunks=None)
    for variable in ds.variables.values():
        variable.encoding = {"_FillValue": None} if "_FillValue" not in variable.attrs else {}
        for name in {"flag_values", "valid_range", "_FillValue"} & set(variable.attrs):  # JSON has one type of whole numbers
            variable.attrs[name] = variable.dtype.type(variable.attrs[name])
    ds.attrs = {k: v for k, v in ds.attrs.items() if isinstance(v, str)}  # NetCDF has no nested attributes
    ds.to_netcdf(tmp_path / "cube.nc", engine="netcdf4")
    runner.CheckSuite.load_all_available_checkers()
    suite = runner.CheckSuite()
    ((groups, errors),) = suite.run_all(suite.load_dataset(str(tmp_path / "cube.nc")), ["cf:1.11"]).values()
    said = [text for result in groups if result.value[0] != result.value[1] for text in result.msgs]
    assert not errors and len(groups) > 10
    assert [text for text in said if not any(part in text for part in ALLOWED)] == []
