"""Output cubes and their metadata."""

from __future__ import annotations

import numpy as np
import zarr

from ai4land.cube.cube import Block
from ai4land.cube.numbers import FRACTION_SCALE, SCALE
from ai4land.cube.writer import Writer
from ai4land.grid import Window, make_grid, spatial_ref
from ai4land.legend import load_legend

GRID = make_grid((-180, -90, 180, 90), coarse_cell=45.0, factor=8, shard=16)
LEGEND = load_legend("hildaplus")
YEARS = [2000, 2001, 2005, 2006, 2007]
ABOUT = {"grid": GRID, "legend": LEGEND, "years": YEARS, "title": "t", "source": "s", "totals": "exact", "years_a_shard": 4}
PAIRS = [Window(0, 0, 16, 16), Window(16, 32, 16, 16)]


def cells(block: Block, seed: int = 0, legend=LEGEND):
    rng = np.random.default_rng(seed)
    shape = (len(block.years), block.window.height, block.window.width)
    index = rng.integers(0, legend.n, shape).astype(np.uint8)
    fraction = np.zeros((shape[0], legend.n, *shape[1:]), np.uint16)
    np.put_along_axis(fraction, index[:, None].astype(np.int64), FRACTION_SCALE, axis=1)
    sure = np.full(shape, SCALE, np.uint8)
    codes = legend.decode(index)
    return {
        "land_cover": codes,
        "most_likely": codes[:, ::-1],
        "fraction": fraction,
        "confidence": sure,
        "change_probability": sure,
    }


def write_block(place, block: Block, arrays) -> None:
    """Write years of a shard, and record it if they are whole shards of years; arrays as in ``Writer.add``, with the years before."""
    writer = Writer(place, block.window)
    for i, year in enumerate(block.years):
        writer.add(year, {name: data[i] for name, data in arrays.items()})


def fill(path, windows, years=YEARS, seed=0):
    for i, window in enumerate(windows):
        block = Block(window, tuple(years))
        write_block(path, block, cells(block, seed=seed + i))


LAND = {"flag_values": [0, 5], "flag_meanings": "sea land", "flag_colors": "#ffffff #00aa00"}


def bare_cube(path, *, grid=None, land=LAND, years=(850,), **attrs):
    """The little of a cube that a catalogue reads."""
    grid = grid or make_grid((-180, -90, 180, 90), coarse_cell=45.0, factor=4, shard=8)
    group = zarr.create_group(path, attributes={"history": "2026-05-06T07:08:09Z created by ai4land 1.2.3 on", **attrs})
    shape, dims = (len(years), *grid.shape), ("time", "latitude", "longitude")
    group.create_array("land_cover", shape=shape, dtype="uint8", fill_value=0, dimension_names=dims, attributes=land)
    share = {"scale_factor": 0.004, "units": "1", "long_name": "how *sure*"}
    group.create_array("confidence", shape=shape, dtype="uint8", fill_value=255, dimension_names=dims, attributes=share)
    group.create_array("year", data=np.array(years, np.int32))
    for name in ("latitude", "longitude"):
        group.create_array(name, data=grid.coords()[name])
    group.create_array(
        "spatial_ref", shape=(), dtype="int32", attributes={k: str(v) for k, v in spatial_ref(grid.fine).attrs.items()}
    )
    return path
