"""Runs with a model and a cube that can be published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ai4land.cube import cube
from ai4land.cube.numbers import FRACTION_EMPTY, SCALE
from ai4land.grid import Window, make_grid
from ai4land.legend import Legend, load_legend
from ai4land.model.checkpoint import save_model
from ai4land.run.config import RunConfig
from tests.cubes import write_block
from tests.models import card, network

GRID = make_grid((-180, -90, 180, 90), coarse_cell=45.0, factor=16, shard=64)
HILDA = load_legend("hildaplus")
YEARS = [850, 2004, 2005, 2100]
CREATED = "2026-01-02T03:04:05Z"


def codes_of(legend: Legend, year: int) -> np.ndarray:
    """Bands of classes with some noise, and no land in the south."""
    rng = np.random.default_rng(year)
    index = (np.arange(GRID.shape[1])[None] // 9 + rng.integers(0, 2, GRID.shape)) % legend.n
    index[-30:] = 255
    return legend.decode(index.astype(np.uint8))


def write_years(place: str | Path, window: Window, years: list[int], legend: Legend) -> None:
    """Write whole shards of a cube."""
    codes = np.stack([codes_of(legend, year)[window.slices] for year in years])
    sure = np.full(codes.shape, SCALE, np.uint8)
    fraction = np.full((len(years), legend.n, *codes.shape[1:]), FRACTION_EMPTY, np.uint16)
    arrays = {"land_cover": codes, "most_likely": codes, "fraction": fraction, "confidence": sure, "change_probability": sure}
    write_block(place, cube.Block(window, tuple(years)), arrays)


def make_cube(
    place: str | Path,
    *,
    years: list[int],
    legend: Legend = HILDA,
    model: str = "",
    finish: bool = True,
    whole: int | None = None,
    years_a_shard: int = 10,
    **attrs: str,
) -> None:
    """A small cube, or one part of a cube, by the functions that a run makes it with; its first ``whole`` years are written."""
    about: dict[str, Any] = {
        "title": "t",
        "source": "ai4land <script>x</script>",
        "totals": "exact",
        "years_a_shard": years_a_shard,
    }
    about["attrs"] = {"history": f"{CREATED} created by ai4land 0.1.0 with a model", **attrs}
    cube.create(place, grid=GRID, legend=legend, years=years, identity={"model": model} if model else {}, **about)
    for window in GRID.shards():
        write_years(place, window, years[:whole], legend)
    if finish:
        assert cube.show(place) == years


def run_in(folder: Path, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "name": "tiny.map",
        "title": "A *map* of <i>land</i>",
        "runs": str(folder / "my runs"),
        "data": str(folder),
        "grid": {"bbox": [-180, -90, 180, 90], "coarse_cell": 45.0, "factor": 16, "shard": 64},
        "landcover": {"source": "m.tif", "legend": "hildaplus"},
        "scenario": {"kind": "luh2", "paths": ["s.nc"]},
        "static": [{"name": "height", "path": "h.tif"}],
        "split": {"train": "2000-2003"},
        "train": {"patch": 32},
        "reconstruct": {"reference": 2004, "years": YEARS},
        **changes,
    }
    run = RunConfig(**values)
    run.folder.mkdir(parents=True, exist_ok=True)
    return run


def make_run(folder: Path, *, legend: Legend = HILDA, model: bool = True, **changes: Any) -> RunConfig:
    run = run_in(folder, **changes)
    net = network()
    weights = save_model(run.folder, [net.state_dict()], card(net)).weights if model else ""
    make_cube(run.folder / "cube.zarr", years=YEARS, legend=legend, model=weights)
    return run
