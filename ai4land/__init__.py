"""AI4Land: annual high-resolution land cover from coarse land-use scenarios."""

from __future__ import annotations

__version__ = "0.1.0"
