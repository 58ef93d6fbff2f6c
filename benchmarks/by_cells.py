"""Score the last test year by counting all mapped cells, as in published numbers.

`python benchmarks/by_cells.py runs/uk runs/uk_1` prints means and standard deviations over the runs. By contrast,
`evaluation.json` weights test cells by area.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import yaml
from tables import row, text

from ai4land.cube.cube import open_cube
from ai4land.grid import Window
from ai4land.legend import MISSING
from ai4land.store.read import Source


def scores(folder: Path) -> dict[str, list[float]]:
    """Compute accuracy and Figure of Merit of each map in the last test year."""
    source = Source(folder / "store.zarr")
    test = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["split"]["test"]
    whole, year = Window(0, 0, *source.grid.shape), test["years"][-1]
    before, truth = source.map_of(test["reference"], whole), source.map_of(year, whole)
    there = np.asarray(source.mask[...], dtype=bool) & (before != MISSING) & (truth != MISSING)
    cube = open_cube(folder / "cube.zarr").swap_dims(time="year").sel(year=year)
    maps = {name: source.legend.encode(cube[name].values) for name in ("land_cover", "most_likely")}
    out = {}
    for name, guess in {**maps, "persistence": before}.items():
        right, changed = (guess == truth)[there], ((before != truth) | (guess != before))[there]
        out[name] = [float(right.mean()), float((right & changed).sum() / changed.sum())]
    return out


if __name__ == "__main__":
    runs = [scores(Path(f)) for f in sys.argv[1:]]
    print("\n".join([row(["map", "accuracy", "Figure of Merit"]), "|---|---|---|"]))
    for name in runs[0]:
        print(row([name, *(text([r[name][i] for r in runs]) for i in (0, 1))]))
