"""Which blocks of space and years a cube is made in."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ai4land.cube.cube import Block, time_shards
from ai4land.cube.template import YEARS_A_SHARD
from ai4land.grid import Window
from ai4land.store.read import Source


def plan_blocks(
    path: Path | str,
    *,
    years: Iterable[int],
    reference: int | None,
    done: Iterable[tuple[int, int, int]] = (),
    years_a_shard: int = YEARS_A_SHARD,
) -> list[Block]:
    """List the blocks to compute, the longest first: shards with cells to map, one block a side of the reference year.

    A block holds whole shards of years, without those that are finished. A shard with years of both sides belongs to the side
    of most of its years.

    Parameters
    ----------
    path
        Path of the analysis-ready store.
    years
        All years of the cube.
    reference
        Year of the reference map; None without one.
    done
        Row and column of the shard, and year, of everything finished.
    years_a_shard
        Years in a shard of the cube.
    """
    source, finished = Source(path), set(done)
    blocks = []
    for groups in sides_of(years, reference=reference, years_a_shard=years_a_shard):
        for w in land_of(source):
            missing = tuple(y for g in groups if any((w.row, w.col, y) not in finished for y in g) for y in g)
            if missing:
                blocks.append(Block(w, missing))
    return sorted(blocks, key=lambda b: -len(b.years))


def sides_of(years: Iterable[int], *, reference: int | None, years_a_shard: int) -> list[list[tuple[int, ...]]]:
    """Group the shards of years by the side of the reference year that holds most of their years: one block of each shard.

    >>> sides_of(range(2000, 2006), reference=2003, years_a_shard=2)
    [[(2004, 2005)], [(2000, 2001), (2002, 2003)]]
    """
    groups = time_shards(years, years_a_shard=years_a_shard)
    ahead = [g for g in groups if reference is None or sum(1 if y >= reference else -1 for y in g) > 0]
    return [side for side in (ahead, [g for g in groups if g not in ahead]) if side]


def land_of(source: Source) -> list[Window]:
    """List the shards that have cells to map."""
    return [w for w in source.grid.shards() if np.asarray(source.mask[w.slices]).any()]
