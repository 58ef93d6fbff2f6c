"""AI4Land: annual high-resolution land cover from coarse land-use scenarios."""

from __future__ import annotations

import xarray as xr

__version__ = "0.1.0"

xr.set_options(arithmetic_join="exact")
