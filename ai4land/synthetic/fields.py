"""Terrain and climate of the synthetic planet, seamless on the sphere, made from a seed alone."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

from ai4land.grid import Grid, centres

OCEAN, URBAN, CROP, PASTURE, FOREST, GRASS, SPARSE, WATER = 0, 11, 22, 33, 44, 55, 66, 77
"""Codes of the legend ``hildaplus``."""


LAND_SHARE = 0.38

Float = NDArray[np.float32]


@dataclass(frozen=True)
class Fields:
    """Static layers of a planet, each of shape ``(rows, cols)`` on the fine grid.

    Attributes
    ----------
    elevation, slope, soil_depth
        Metres (below 0 is ocean), degrees between neighbouring cells, and metres (NaN over the ocean).
    temperature, precipitation
        Annual mean in degrees Celsius, annual sum in millimetres.
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


def generator(seed: int, purpose: str) -> np.random.Generator:
    """Make a generator for one purpose, so that no field depends on how many numbers another field drew."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def sphere_points(lat: NDArray[np.float64], lon: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return unit vectors of cell centres, shape ``(rows, cols, 3)``; latitudes and longitudes in degrees."""
    phi, lam = np.deg2rad(lat)[:, None], np.deg2rad(lon)[None, :]
    return np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi) * np.ones_like(lam)], axis=-1)


def sphere_noise(
    points: NDArray[np.float64], *, seed: int, purpose: str, degrees: float, cell: float, roughness: float = 0.5
) -> Float:
    """Sample smooth noise of unit variance at points on the sphere, seamless at the dateline and the poles.

    Adds octaves of three-dimensional value noise: quadratic B-splines through a periodic, randomly turned lattice of normal
    numbers. ``points`` are unit vectors, shape ``(..., 3)``; ``degrees`` and ``cell`` are the largest and smallest feature
    in degrees along a great circle; ``roughness`` is the amplitude of an octave relative to the one before.
    """
    rng = generator(seed, purpose)
    flat = points.reshape(-1, 3)
    total = np.zeros(len(flat))
    octaves = max(1, int(np.log2(max(degrees / cell, 1.0))) + 1)
    for octave in range(octaves):
        lattice = rng.standard_normal((32, 32, 32))
        turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
        at = flat @ turn.T * (2**octave / np.deg2rad(degrees)) + rng.uniform(0, 32, 3)
        total += roughness**octave * ndimage.map_coordinates(lattice, at.T, order=2, mode="grid-wrap", prefilter=False)
    # A quadratic B-spline keeps 0.55 of the variance of white noise in each of three dimensions.
    spread = 0.55**1.5 * np.sqrt(sum(roughness ** (2 * o) for o in range(octaves)))
    return (total / spread).reshape(points.shape[:-1]).astype(np.float32)


def top_cells(values: Float, areas: NDArray[np.float64], share: float, among: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mark the cells of ``among`` with the highest values, up to a share of its area."""
    chosen = np.zeros(values.shape, dtype=bool)
    index = np.flatnonzero(among)
    order = index[np.argsort(-values.flat[index], kind="stable")]
    summed = np.cumsum(areas.flat[order])
    chosen.flat[order[: int(np.searchsorted(summed, share * summed[-1]))] if order.size else order] = True
    return chosen


def bump(values: Float, centre: float, width: float) -> Float:
    """Evaluate a Gaussian that is 1 at the centre and 1/e one width away."""
    return np.exp(-(((values - centre) / width) ** 2))


def _gradient(height: Float, lat: NDArray[np.float64], cell: float) -> tuple[Float, Float]:
    """Return the rise to the east and to the south in metres per kilometre, across the dateline and the poles."""
    half = height.shape[1] // 2
    tall = np.concatenate([np.roll(height[:1], half, axis=1), height, np.roll(height[-1:], half, axis=1)])
    step = 111.2 * cell
    east = (np.roll(height, -1, axis=1) - np.roll(height, 1, axis=1)) / (
        2 * step * np.maximum(np.cos(np.deg2rad(lat)), 0.15)[:, None]
    )
    return east.astype(np.float32), ((tall[2:] - tall[:-2]) / (2 * step)).astype(np.float32)


def make_fields(grid: Grid, *, seed: int) -> Fields:
    """Make terrain, climate, soil and natural vegetation on a global grid.

    Ridges follow the zero lines of a noise field inside mountain belts. Temperature falls towards the poles and by 6 K per
    kilometre of height. Rain follows the zonal belts, decreases inland and increases on slopes that face the prevailing
    wind. Climate zones imitate the thresholds of Köppen with annual means instead of monthly values.
    """
    lat, lon = centres(grid.fine)
    cell = float(grid.fine.affine.a)
    points = sphere_points(lat, lon)
    areas = np.broadcast_to(grid.cell_areas()[:, None], grid.shape)

    def noise(purpose: str, degrees: float, roughness: float = 0.5) -> Float:
        return sphere_noise(points, seed=seed, purpose=purpose, degrees=degrees, cell=cell, roughness=roughness)

    phi = np.deg2rad(lat)[:, None]
    height = noise("continents", 30.0, 0.58) - (2.2 * np.sin(phi) ** 6).astype(np.float32)
    land = top_cells(height, areas, LAND_SHARE, np.ones(grid.shape, dtype=bool))
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
    lake = top_cells(noise("lakes", 4.0, 0.6), areas, 0.025, wet)
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
