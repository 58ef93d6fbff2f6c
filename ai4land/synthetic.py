"""A tiny planet, made from a seed, to try and test everything without any download.

:func:`make_fields` makes terrain and climate that are seamless on the sphere, :func:`land_use` lets sixty years of land
use spread where terrain and neighbours favour it, and :func:`make_planet` writes all of it in the formats of the real data
(:mod:`ai4land.synthetic_files`). Nothing here is an observation; numbers of a score on this planet say nothing about
the Earth.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

from ai4land.errors import ConfigError
from ai4land.grid import Grid, centres, make_grid
from ai4land.synthetic_files import (
    PlanetPaths,
    StatesFile,
    is_complete,
    prepare,
    write_lai,
    write_map,
    write_marker,
    write_static,
)

__all__ = ["Fields", "PlanetPaths", "land_use", "make_fields", "make_planet"]

_log = logging.getLogger(__name__)

OCEAN, URBAN, CROP, PASTURE, FOREST, GRASS, SPARSE, WATER = 0, 11, 22, 33, 44, 55, 66, 77
"""Codes of the legend ``hildaplus``."""

LAND_SHARE = 0.38
REST_YEARS = 8
"""Years that a cell keeps its class after a change."""
SWAP = 0.03
"""Part of a net demand that is gained and lost once more in the same coarse cell."""
LAI_YEARS = 2

Float = NDArray[np.float32]


@dataclass(frozen=True)
class Fields:
    """Static layers of a planet, each of shape ``(rows, cols)`` on the fine grid.

    Attributes
    ----------
    elevation
        Metres; below 0 is ocean.
    slope
        Degrees, between neighbouring cells.
    temperature, precipitation
        Annual mean in degrees Celsius, annual sum in millimetres.
    soil_depth
        Metres; NaN over the ocean.
    climate_zone
        1 tropical, 2 dry, 3 temperate, 4 continental, 5 polar; 0 over the ocean.
    coast
        Distance to the nearest ocean cell in kilometres; 0 over the ocean.
    natural
        Class code of the vegetation without people, lakes included.
    """

    elevation: Float
    slope: Float
    temperature: Float
    precipitation: Float
    soil_depth: Float
    climate_zone: NDArray[np.uint8]
    coast: Float
    natural: NDArray[np.uint8]


def make_planet(
    folder: str | Path,
    *,
    seed: int = 0,
    years: Sequence[int] = range(1960, 2020),
    coarse_cell: float = 5.0,
    factor: int = 16,
) -> PlanetPaths:
    """Write a small globe in the formats of the real data, or find the same one already there.

    Parameters
    ----------
    folder
        An empty or absent folder, or the folder of an earlier planet. A complete planet of the same parameters is
        used as it is; any other planet is written anew.
    seed
        Seed of the terrain and of the land use.
    years
        Consecutive years of land use.
    coarse_cell
        Side of a coarse cell in degrees; divides 180.
    factor
        Fine cells along one side of a coarse cell.

    Returns
    -------
    PlanetPaths
        Where everything lies. The last two years have LAI.

    Raises
    ------
    ConfigError
        If the years have gaps, the coarse cell does not divide 180, or the folder holds files of something else.
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
    write_static(paths, layers, natural=fields.natural, grid=grid, years=wanted, seed=seed)
    with StatesFile(paths, climate_zone=fields.climate_zone, natural=fields.natural, grid=grid, years=wanted) as states:
        for year, codes, last_used in land_use(fields, grid=grid, years=wanted, seed=seed):
            write_map(paths, year, codes, grid=grid)
            states.write(year, codes, last_used)
            if year > wanted[-1] - LAI_YEARS:
                write_lai(paths, year, codes, temperature=fields.temperature, precipitation=fields.precipitation, grid=grid)
    write_marker(paths, parameters)
    _log.info("planet of %d x %d cells and %d years written to %s", *grid.shape, len(wanted), paths.folder)
    return paths


def _generator(seed: int, purpose: str) -> np.random.Generator:
    """Make a generator of its own for each purpose, so that no field depends on how many numbers another one drew."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def _sphere(lat: NDArray[np.float64], lon: NDArray[np.float64]) -> NDArray[np.float64]:
    """Unit vectors of cell centres in degrees, shape ``(rows, cols, 3)``."""
    phi, lam = np.deg2rad(lat)[:, None], np.deg2rad(lon)[None, :]
    return np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi) * np.ones_like(lam)], axis=-1)


def sphere_noise(
    points: NDArray[np.float64], *, seed: int, purpose: str, degrees: float, cell: float, roughness: float = 0.5
) -> Float:
    """Sample smooth random numbers of unit variance at points on the sphere, seamless at the dateline and the poles.

    Octaves of three-dimensional value noise (quadratic B-splines through a periodic lattice of normal numbers, turned
    at random) are added, from a lattice step of ``degrees`` down to ``cell``.

    Parameters
    ----------
    points
        Unit vectors, shape ``(..., 3)``.
    degrees, cell
        Largest and smallest feature, in degrees along a great circle.
    roughness
        Amplitude of an octave relative to the one before.
    """
    rng = _generator(seed, purpose)
    flat = points.reshape(-1, 3)
    total = np.zeros(len(flat))
    octaves = max(1, int(np.log2(max(degrees / cell, 1.0))) + 1)
    for octave in range(octaves):
        lattice = rng.standard_normal((32, 32, 32))
        turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
        at = flat @ turn.T * (2**octave / np.deg2rad(degrees)) + rng.uniform(0, 32, 3)
        total += roughness**octave * ndimage.map_coordinates(lattice, at.T, order=2, mode="grid-wrap", prefilter=False)
    # A quadratic B-spline leaves 0.55 of the variance of white noise in each of three dimensions.
    spread = 0.55**1.5 * np.sqrt(sum(roughness ** (2 * o) for o in range(octaves)))
    return (total / spread).reshape(points.shape[:-1]).astype(np.float32)


def _top(values: Float, areas: NDArray[np.float64], share: float, among: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mark the cells with the highest values that make up a share of the area of ``among``."""
    chosen = np.zeros(values.shape, dtype=bool)
    index = np.flatnonzero(among)
    order = index[np.argsort(-values.flat[index], kind="stable")]
    summed = np.cumsum(areas.flat[order])
    chosen.flat[order[: int(np.searchsorted(summed, share * summed[-1]))] if order.size else order] = True
    return chosen


def _bump(values: Float, centre: float, width: float) -> Float:
    return np.exp(-(((values - centre) / width) ** 2))


def _gradient(height: Float, lat: NDArray[np.float64], cell: float) -> tuple[Float, Float]:
    """Rise to the east and to the south in metres per kilometre, over the dateline and the poles."""
    half = height.shape[1] // 2
    tall = np.concatenate([np.roll(height[:1], half, axis=1), height, np.roll(height[-1:], half, axis=1)])
    step = 111.2 * cell
    east = (np.roll(height, -1, axis=1) - np.roll(height, 1, axis=1)) / (
        2 * step * np.maximum(np.cos(np.deg2rad(lat)), 0.15)[:, None]
    )
    return east.astype(np.float32), ((tall[2:] - tall[:-2]) / (2 * step)).astype(np.float32)


def make_fields(grid: Grid, *, seed: int) -> Fields:
    """Make terrain, climate, soil and natural vegetation on a global grid.

    Ridges are the zero lines of a noise field, uplifted where belts of mountains lie. Temperature falls towards the poles
    and by 6 K per kilometre of height; rain follows the zonal belts, thins out inland and falls on slopes that face the
    prevailing wind. Climate zones follow the thresholds of Köppen in spirit (annual mean instead of monthly values).
    """
    lat, lon = centres(grid.fine)
    cell = float(grid.fine.affine.a)
    points = _sphere(lat, lon)
    areas = np.broadcast_to(grid.cell_areas()[:, None], grid.shape)

    def noise(purpose: str, degrees: float, roughness: float = 0.5) -> Float:
        return sphere_noise(points, seed=seed, purpose=purpose, degrees=degrees, cell=cell, roughness=roughness)

    phi = np.deg2rad(lat)[:, None]
    height = noise("continents", 30.0, 0.58) - (2.2 * np.sin(phi) ** 6).astype(np.float32)
    land = _top(height, areas, LAND_SHARE, np.ones(grid.shape, dtype=bool))
    level = float(height[land].min())
    above = np.maximum(height - level, 0)
    ridge = np.exp(-((noise("ridges", 30.0, 0.5) / 0.28) ** 2)) * np.clip(0.35 + 0.8 * noise("belts", 45.0), 0, 1.6)
    relief = (
        420 * above**1.3 + 2900 * ridge * np.clip(above / 0.5, 0, 1) + 90 * noise("hills", 8.0, 0.6) * np.clip(above / 0.2, 0, 1)
    )
    elevation = np.where(land, np.maximum(relief, 1), -15 - 3200 * np.maximum(level - height, 0) ** 0.7).astype(np.float32)

    ground = np.maximum(elevation, 0)
    slope = np.degrees(np.arctan(np.hypot(*_gradient(ground, lat, cell)) / 1000)).astype(np.float32)
    coast = np.zeros(grid.shape, dtype=np.float32)
    coast[land] = 6371 * KDTree(points[~land]).query(points[land])[0]

    inland = 1 - np.exp(-coast / 800)
    temperature = 28 - (43 + 7 * inland) * np.abs(np.sin(phi)) ** 2.4 - 0.006 * ground + 2.2 * noise("warmth", 25.0, 0.55)
    smooth = ndimage.gaussian_filter(ground, 1.5 / cell, mode=("nearest", "wrap"))
    uplift = -np.cos(3 * phi) * _gradient(smooth, lat, cell)[0]
    degrees = np.abs(lat)[:, None]
    zonal = 260 + 2100 * np.exp(-((degrees / 13) ** 2)) + 900 * np.exp(-(((degrees - 48) / 15) ** 2))
    wetness = np.exp(-0.8 * inland + np.clip(0.18 * uplift, -0.8, 0.7) + 0.3 * noise("rain", 20.0, 0.55))
    precipitation = np.clip(zonal * wetness, 10, 4000).astype(np.float32)

    moisture = precipitation / (20 * np.maximum(temperature, 0) + 220) + 0.08 * noise("patches", 4.0, 0.7)
    zone = np.select([temperature < -7, moisture < 0.62, temperature >= 18, temperature >= 6], [5, 2, 1, 3], default=4).astype(
        np.uint8
    )
    flat = np.exp(-slope / slope[land].mean())
    soil = np.clip(0.25 + 1.6 * flat * np.clip(moisture, 0.1, 1.2) + 0.35 * noise("soil", 3.0, 0.8), 0.1, 2.5).astype(np.float32)

    wet = land & (coast > 150) & (elevation < 1200) & (moisture > 0.6) & (temperature > -9)
    lake = _top(noise("lakes", 4.0, 0.6), areas, 0.025, wet)
    bare = (moisture < 0.3) | (temperature < -9) | (elevation > 3800)
    natural = np.select(
        [~land, lake, bare, (moisture > 0.95) & (temperature > -5)], [OCEAN, WATER, SPARSE, FOREST], default=GRASS
    )
    return Fields(
        elevation=elevation,
        slope=slope,
        temperature=temperature.astype(np.float32),
        precipitation=precipitation,
        soil_depth=np.where(land, soil, np.float32(np.nan)),
        climate_zone=np.where(land, zone, 0).astype(np.uint8),
        coast=coast,
        natural=natural.astype(np.uint8),
    )


def _blocks(values: NDArray[Any], factor: int) -> NDArray[Any]:
    """Put the fine cells of each coarse cell into a row, shape ``(coarse cells, factor²)``."""
    rows, cols = values.shape
    return values.reshape(rows // factor, factor, cols // factor, factor).swapaxes(1, 2).reshape(-1, factor * factor)


def _unblock(blocks: NDArray[Any], shape: tuple[int, int], factor: int) -> NDArray[Any]:
    return blocks.reshape(shape[0] // factor, shape[1] // factor, factor, factor).swapaxes(1, 2).reshape(shape)


def _best(score: Float, allowed: NDArray[np.bool_], quota: NDArray[np.int64], factor: int) -> NDArray[np.bool_]:
    """Mark in each coarse cell the ``quota`` allowed fine cells with the highest score."""
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
    """Share of a class around each cell, within three cells, over the dateline."""
    return ndimage.gaussian_filter(mask.astype(np.float32), 1.5, truncate=2.0, mode=("nearest", "wrap"))


def land_use(
    fields: Fields, *, grid: Grid, years: Sequence[int], seed: int
) -> Iterator[tuple[int, NDArray[np.uint8], NDArray[np.int16]]]:
    """Let land use spread over a planet, year by year.

    Smooth regional trends give every coarse cell a yearly demand for cropland, pasture and urban land: farming expands
    up to a regional turning point and is abandoned afterwards, cities grow. In each coarse cell the fine cells change whose
    score is best: static suitability, plus the share of the class around the cell in the year before, plus a little noise
    that is fixed for each cell. Abandoned land returns to its natural vegetation. A cell that has changed rests for some years.

    Yields
    ------
    year
        In ascending order.
    codes
        Class codes of ``hildaplus``, shape ``(rows, cols)``; a new array each year.
    last_used
        Last year of urban, crop or pasture use; years before ``years[0] - 1000`` mean never.
    """
    shape, factor = grid.shape, grid.factor
    cell = float(grid.fine.affine.a)
    areas = np.broadcast_to(grid.cell_areas()[:, None], shape)
    points, coarse_points = _sphere(*centres(grid.fine)), _sphere(*centres(grid.coarse))

    def noise(purpose: str, degrees: float) -> Float:
        return sphere_noise(points, seed=seed, purpose=purpose, degrees=degrees, cell=cell)

    def regional(purpose: str) -> Float:
        return sphere_noise(coarse_points, seed=seed, purpose=purpose, degrees=35.0, cell=10.0).ravel()

    natural, rain, warm = fields.natural, fields.precipitation, fields.temperature
    open_land = np.isin(natural, (FOREST, GRASS))
    flat = np.exp(-0.6 * fields.slope / fields.slope[natural != OCEAN].mean())
    crop_fit = _bump(warm, 17, 12) * (1 - np.exp(-rain / 500)) * flat * np.nan_to_num(fields.soil_depth)
    pasture_fit = (
        0.9 * _bump(warm, 14, 16) * _bump(np.log(rain), np.log(600), 1.1) * np.sqrt(flat * np.nan_to_num(fields.soil_depth))
    )
    urban_fit = 0.5 * crop_fit + 0.4 * flat * np.exp(-fields.coast / 400)
    settled = 1 / (1 + np.exp(-1.5 * noise("settled", 40.0)))
    jitter = 0.04 * _generator(seed, "jitter").standard_normal(shape).astype(np.float32)

    codes = natural.copy()
    farms = settled * crop_fit + 0.12 * noise("farms", 5.0)
    codes[_top(farms, areas, 0.12, open_land)] = CROP
    codes[_top(settled * pasture_fit + 0.12 * noise("herds", 6.0), areas, 0.2, np.isin(codes, (FOREST, GRASS)))] = PASTURE
    codes[_top(settled * urban_fit + 0.2 * noise("towns", 1.2), areas, 0.006, open_land)] = URBAN
    old = _top(farms, areas, 0.35, open_land) | np.isin(codes, (URBAN, CROP, PASTURE))
    last_used = np.where(old, years[0] - 25 - 20 * np.tanh(noise("history", 15.0)), -30000).astype(np.int16)
    changed = np.full(shape, years[0] - 100, dtype=np.int16)

    activity = np.exp(0.4 * regional("activity"))
    turning = {CROP: years[0] + 32 + 22 * regional("crop turn"), PASTURE: years[0] + 30 + 22 * regional("pasture turn")}
    pace = {CROP: 0.05 * activity, PASTURE: 0.045 * activity}
    fit = {CROP: crop_fit, PASTURE: pasture_fit, URBAN: urban_fit}
    start = _generator(seed, "carry")
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
