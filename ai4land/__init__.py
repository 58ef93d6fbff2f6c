"""AI4Land: annual high-resolution land cover from coarse land-use scenarios.

For Python: :func:`open_cube` opens a finished cube, :func:`open_store` an analysis-ready store, :func:`make_grid` and
:func:`load_legend` make the grid and the class scheme of a map. They are imported when they are first used. Importing the package
loads nothing else and changes no option of any library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ai4land.cube.cube import open_cube
    from ai4land.grid import make_grid
    from ai4land.legend import load_legend
    from ai4land.store.read import open_store

__version__ = "0.1.0"
__all__ = ["load_legend", "make_grid", "open_cube", "open_store"]

_HOME = {"load_legend": "legend", "make_grid": "grid", "open_cube": "cube.cube", "open_store": "store.read"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
