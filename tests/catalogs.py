"""STAC catalogues and GeoTIFFs."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import numpy as np
import pystac
import rasterio

from ai4land.grid import make_grid

GRID = make_grid((-180, -90, 180, 90), coarse_cell=10, factor=4, shard=36)
VALUES = np.random.default_rng(0).random(GRID.shape).astype("float32")
ZONES = np.random.default_rng(1).integers(0, 9, GRID.shape).astype("uint8")


def write_cog(path: Path, values, transform, *, nodata=None, crs="EPSG:4326") -> Path:
    profile = {"height": values.shape[0], "width": values.shape[1], "count": 1, "dtype": values.dtype, "blocksize": 128}
    with rasterio.open(path, "w", "COG", crs=crs, transform=transform, nodata=nodata, **profile) as file:
        file.write(values, 1)
    return path


def make_item(name, files, transform, shape, *, year=2000, projection=True, extra=None, bbox=None, hrefs="{}"):
    west, north = transform.c, transform.f
    east, south = west + shape[1] * transform.a, north + shape[0] * transform.e
    box = bbox or [west, south, east, north]
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    item = pystac.Item(name, {"type": "Polygon", "coordinates": [ring]}, box, dt.datetime(year, 6, 1, tzinfo=dt.UTC), {})
    described = {"proj:code": "EPSG:4326", "proj:shape": list(shape), "proj:transform": list(transform)[:6]} if projection else {}
    for key, path in files.items():
        fields = {**described, **(extra or {}).get(key, {})}
        item.add_asset(
            key, pystac.Asset(hrefs.format(path), media_type=pystac.MediaType.COG, roles=["data"], extra_fields=fields)
        )
    return item


def save(root: Path, collections) -> Path:
    """Write a self-contained catalogue with relative hrefs; collections by name."""
    catalog = pystac.Catalog("world", "made for tests")
    for name, items in collections.items():
        space, time = pystac.SpatialExtent([[-180, -90, 180, 90]]), pystac.TemporalExtent([[dt.datetime(2000, 1, 1), None]])
        child = pystac.Collection(name, name, pystac.Extent(space, time), license="CC0-1.0")
        child.add_items(items)
        catalog.add_child(child)
    catalog.normalize_hrefs(str(root / "stac"))
    catalog.make_all_asset_hrefs_relative()
    catalog.save(pystac.CatalogType.SELF_CONTAINED)
    return root / "stac" / "catalog.json"
