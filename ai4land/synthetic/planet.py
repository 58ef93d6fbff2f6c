"""A tiny planet, made from a seed, to try and test everything without downloads.

:mod:`ai4land.synthetic.fields` makes terrain and climate, :func:`land_use` spreads land use where terrain and neighbours
favour it, and :func:`make_planet` writes all of it in the formats of the real data (:mod:`ai4land.synthetic.files`). Nothing
here is an observation: scores on this planet say nothing about the Earth.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ai4land.errors import ConfigError
from ai4land.grid import Grid, centres, make_grid
from ai4land.synthetic.fields import (
    CROP,
    FOREST,
    GRASS,
    OCEAN,
    PASTURE,
    URBAN,
    Fields,
    Float,
    bump,
    generator,
    make_fields,
    sphere_noise,
    sphere_points,
    top_cells,
)
from ai4land.synthetic.files import PlanetPaths, is_complete, prepare, write_lai, write_map, write_marker, write_static
from ai4land.synthetic.luh2 import StatesFile, write_luh2_static

__all__ = ["Fields", "PlanetPaths", "land_use", "make_fields", "make_planet"]
_log = logging.getLogger(__name__)

REST_YEARS = 8
"""Years that a cell keeps its class after a change."""
SWAP = 0.03
"""Share of the demand (gain plus loss) that is also gained and lost again in the same coarse cell."""
LAI_YEARS = 2


def make_planet(
    folder: str | Path,
    *,
    seed: int = 0,
    years: Sequence[int] = range(1960, 2020),
    coarse_cell: float = 5.0,
    factor: int = 16,
) -> PlanetPaths:
    """Write a small globe in the formats of the real data, or return the same one if it exists.

    Parameters
    ----------
    folder
        An empty or absent folder, or the folder of an earlier planet, which is reused if complete and of the same parameters
        and otherwise replaced.
    years
        Consecutive years of land use; the last two get LAI.
    coarse_cell, factor
        Side of a coarse cell in degrees, which must divide 180, and fine cells along it.

    Raises
    ------
    ConfigError
        If a parameter is out of range, the years have gaps, or the folder holds files of something else.
    """
    wanted = [int(y) for y in years]
    if not wanted or wanted != list(range(wanted[0], wanted[-1] + 1)):
        raise ConfigError(f"years of the planet are {wanted}, expected consecutive years; give range(first, last + 1)")
    if coarse_cell <= 0 or abs(180 / coarse_cell - round(180 / coarse_cell)) > 1e-9:
        raise ConfigError(f"coarse_cell is {coarse_cell:g} degrees, expected a part of 180 degrees; try 5")
    if factor < 1 or 180 / coarse_cell * factor < 8:
        raise ConfigError(f"factor is {factor}, expected at least 8 fine cells from pole to pole; try factor=16")
    if seed < 0:
        raise ConfigError(f"seed is {seed}, expected 0 or more; try seed=0")
    paths = PlanetPaths.inside(folder)
    parameters: dict[str, Any] = {
        "seed": int(seed),
        "first_year": wanted[0],
        "last_year": wanted[-1],
        "coarse_cell": float(coarse_cell),
        "factor": int(factor),
    }
    if is_complete(paths, parameters):
        _log.info("planet in %s is complete; it is used as it is", paths.folder)
        return paths
    prepare(paths)
    grid = make_grid((-180, -90, 180, 90), coarse_cell=coarse_cell, factor=factor, shard=factor)
    fields = make_fields(grid, seed=seed)
    layers = {
        name: getattr(fields, name)
        for name in ("elevation", "slope", "temperature", "precipitation", "climate_zone", "soil_depth")
    }
    write_luh2_static(paths, fields.natural, grid=grid, seed=seed)
    write_static(paths, layers, grid=grid, years=wanted)
    with StatesFile(paths, climate_zone=fields.climate_zone, natural=fields.natural, grid=grid, years=wanted) as states:
        for year, codes, last_used in land_use(fields, grid=grid, years=wanted, seed=seed):
            write_map(paths, year, codes, grid=grid)
            states.write(year, codes, last_used)
            if year > wanted[-1] - LAI_YEARS:
                write_lai(paths, year, codes, temperature=fields.temperature, precipitation=fields.precipitation, grid=grid)
    write_marker(paths, parameters)
    _log.info("planet of %d x %d cells and %d years written to %s", *grid.shape, len(wanted), paths.folder)
    return paths


def _blocks(values: NDArray[Any], factor: int) -> NDArray[Any]:
    """Put the fine cells of each coarse cell into a row, shape ``(coarse cells, factor²)``."""
    rows, cols = values.shape
    return values.reshape(rows // factor, factor, cols // factor, factor).swapaxes(1, 2).reshape(-1, factor * factor)


def _unblock(blocks: NDArray[Any], shape: tuple[int, int], factor: int) -> NDArray[Any]:
    return blocks.reshape(shape[0] // factor, shape[1] // factor, factor, factor).swapaxes(1, 2).reshape(shape)


def _best(score: Float, allowed: NDArray[np.bool_], quota: NDArray[np.int64], factor: int) -> NDArray[np.bool_]:
    """Mark in each coarse cell the ``quota`` allowed fine cells with the highest scores."""
    candidates = _blocks(allowed, factor)
    count = np.minimum(quota, candidates.sum(axis=1))
    active = np.flatnonzero(count)
    rows = np.where(candidates[active], _blocks(score, factor)[active], -np.inf)
    ordered = np.sort(rows, axis=1)
    limit = ordered[np.arange(len(active)), factor * factor - count[active]]
    chosen = np.zeros(candidates.shape, dtype=bool)
    chosen[active] = rows >= limit[:, None]
    return _unblock(chosen, score.shape, factor)


def _near(mask: NDArray[np.bool_]) -> Float:
    """Return the smoothed share of a class within three cells of each cell, across the dateline."""
    return ndimage.gaussian_filter(mask.astype(np.float32), 1.5, truncate=2.0, mode=("nearest", "wrap"))


def land_use(
    fields: Fields, *, grid: Grid, years: Sequence[int], seed: int
) -> Iterator[tuple[int, NDArray[np.uint8], NDArray[np.int16]]]:
    """Simulate the spread of land use over a planet; yield each year with its maps.

    Smooth regional trends give every coarse cell a yearly demand for cropland, pasture and urban land: farming expands up to
    a regional turning point and then retreats, cities grow. Within a coarse cell, the fine cells with the best scores
    change. A score sums static suitability, the share of the class nearby in the year before, and a little noise fixed per
    cell. Abandoned land returns to its natural vegetation. A changed cell then rests for some years.

    Yields
    ------
    year, codes, last_used
        Ascending years; class codes of ``hildaplus``, shape ``(rows, cols)``, a new array each year; last year of urban,
        crop or pasture use, where years before ``years[0] - 1000`` mean never.
    """
    shape, factor = grid.shape, grid.factor
    cell = float(grid.fine.affine.a)
    areas = np.broadcast_to(grid.cell_areas()[:, None], shape)
    points, coarse_points = sphere_points(*centres(grid.fine)), sphere_points(*centres(grid.coarse))

    def noise(purpose: str, degrees: float) -> Float:
        return sphere_noise(points, seed=seed, purpose=purpose, degrees=degrees, cell=cell)

    def regional(purpose: str) -> Float:
        return sphere_noise(coarse_points, seed=seed, purpose=purpose, degrees=35.0, cell=10.0).ravel()

    natural, rain, warm = fields.natural, fields.precipitation, fields.temperature
    open_land = np.isin(natural, (FOREST, GRASS))
    flat = np.exp(-0.6 * fields.slope / fields.slope[natural != OCEAN].mean())
    crop_fit = bump(warm, 17, 12) * (1 - np.exp(-rain / 500)) * flat * np.nan_to_num(fields.soil_depth)
    pasture_fit = (
        0.9 * bump(warm, 14, 16) * bump(np.log(rain), np.log(600), 1.1) * np.sqrt(flat * np.nan_to_num(fields.soil_depth))
    )
    urban_fit = 0.5 * crop_fit + 0.4 * flat * np.exp(-fields.coast / 400)
    settled = 1 / (1 + np.exp(-1.5 * noise("settled", 40.0)))
    jitter = 0.04 * generator(seed, "jitter").standard_normal(shape).astype(np.float32)

    codes = natural.copy()
    farms = settled * crop_fit + 0.12 * noise("farms", 5.0)
    codes[top_cells(farms, areas, 0.12, open_land)] = CROP
    codes[top_cells(settled * pasture_fit + 0.12 * noise("herds", 6.0), areas, 0.2, np.isin(codes, (FOREST, GRASS)))] = PASTURE
    codes[top_cells(settled * urban_fit + 0.2 * noise("towns", 1.2), areas, 0.006, open_land)] = URBAN
    old = top_cells(farms, areas, 0.35, open_land) | np.isin(codes, (URBAN, CROP, PASTURE))
    last_used = np.where(old, years[0] - 25 - 20 * np.tanh(noise("history", 15.0)), -30000).astype(np.int16)
    changed = np.full(shape, years[0] - 100, dtype=np.int16)

    activity = np.exp(0.4 * regional("activity"))
    turning = {CROP: years[0] + 32 + 22 * regional("crop turn"), PASTURE: years[0] + 30 + 22 * regional("pasture turn")}
    pace = {CROP: 0.05 * activity, PASTURE: 0.045 * activity}
    fit = {CROP: crop_fit, PASTURE: pasture_fit, URBAN: urban_fit}
    start = generator(seed, "carry")
    carry = {(k, way): start.uniform(0, 1, len(activity)) for k in fit for way in ("gain", "loss")}

    def quota(code: int, way: str, demand: NDArray[Any]) -> NDArray[np.int64]:
        carry[code, way] += demand
        whole = np.floor(carry[code, way])
        carry[code, way] -= whole
        return whole.astype(np.int64)

    for year in years:
        if year > years[0]:
            before = codes
            codes = before.copy()
            near = {k: _near(before == k) for k in (URBAN, CROP, PASTURE, FOREST)}
            count = {k: _blocks(before == k, factor).sum(axis=1) for k in fit}
            rested = year - changed > REST_YEARS
            for code in (URBAN, CROP, PASTURE):
                if code == URBAN:
                    gain, loss = 0.016 * activity * count[URBAN], np.zeros(len(activity))
                else:
                    trend = pace[code] * np.tanh((turning[code] - year) / 10)
                    front = _blocks(near[code] * fit[code] * np.isin(before, (FOREST, GRASS)), factor).sum(axis=1)
                    gain, loss = 10 * np.maximum(trend, 0) * front, np.maximum(-trend, 0) * count[code]
                    gain, loss = gain + SWAP * (gain + loss), loss + SWAP * (gain + loss)
                    leave = 0.5 * near[FOREST] - fit[code] - 1.2 * near[code] + jitter
                    given = _best(leave, (codes == code) & rested, quota(code, "loss", loss), factor)
                    codes[given] = natural[given]
                sources = (CROP, PASTURE, FOREST, GRASS) if code == URBAN else (FOREST, GRASS)
                score = fit[code] + 1.2 * near[code] - 0.15 * (before == FOREST) + jitter
                allowed = np.isin(codes, sources) & (codes == before) & rested & (fit[code] + near[code] > 0.25)
                codes[_best(score, allowed, quota(code, "gain", gain), factor)] = code
            changed[codes != before] = year
        last_used[np.isin(codes, (URBAN, CROP, PASTURE))] = year
        yield year, codes, last_used
