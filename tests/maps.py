"""Small cubes with maps, overviews and legends, as the viewer reads them."""

from __future__ import annotations

import io
import json

import numpy as np
import zarr
from affine import Affine
from odc.geo.geobox import GeoBox
from PIL import Image
from zarr.codecs import ZstdCodec

from ai4land.cube.template import days_since_1970
from ai4land.grid import centres, spatial_ref
from ai4land.legend import load_legend
from ai4land.serve.atlas import open_atlas

HILDA = load_legend("hildaplus")
FLAGS = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in HILDA.flag_attrs().items()}
CODES = HILDA.codes
WORLD = GeoBox((64, 128), Affine(2.8125, 0, -180, 0, -2.8125, 90), "EPSG:4326")


def some_codes(shape=(3, 64, 128), *, seed=0, fill=True):
    """Random codes in blocks of 4 x 4 cells, some of them the fill code."""
    rng = np.random.default_rng(seed)
    choice = np.concatenate([CODES, [HILDA.fill.code]]) if fill else CODES
    small = rng.choice(choice, (shape[0], -(-shape[1] // 4), -(-shape[2] // 4))).astype(np.uint8)
    return small.repeat(4, 1).repeat(4, 2)[:, : shape[1], : shape[2]]


def plain(attrs):
    return json.loads(json.dumps(attrs, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v)))


def write_maps(path, *, codes, years=(2000, 2001, 2005), box=WORLD, flags=FLAGS, levels=None, attrs=None, group="", shard=32):
    """Write a small cube: sharded ``land_cover`` and ``confidence`` with their coordinates, and overviews as given: factor to codes."""
    root = zarr.open_group(path, mode="a", zarr_format=3)
    root = root.require_group(group) if group else root
    layout = [{"asset": "land_cover"}]

    def write(parent, codes, box, years, extra):
        def array(name, data, dims, chunks=None, shards=None, **more):
            made = parent.create_array(
                name,
                shape=data.shape,
                dtype=data.dtype,
                chunks=chunks or data.shape,
                shards=shards,
                dimension_names=dims,
                compressors=ZstdCodec(level=1),
                **more,
            )
            made[...] = data

        plane = {"chunks": (1, shard // 2, shard // 2), "shards": (1, shard, shard)}
        dims = ("time", "latitude", "longitude")
        about = {"grid_mapping": "spatial_ref", "coordinates": "year"}
        array("land_cover", codes, dims, fill_value=HILDA.fill.code, attributes={**about, **flags}, **plane)
        for name, values in zip(dims[1:], centres(box), strict=True):
            array(name, values, (name,))
        times = np.array([days_since_1970(y, 7, 2) for y in years], np.int32)
        array("time", times, ("time",), attributes={"units": "days since 1970-01-01", "calendar": "proleptic_gregorian"})
        array("year", np.array(years, np.int32), ("time",))
        array("spatial_ref", np.int32(0).reshape(()), (), attributes=plain(spatial_ref(box).attrs))
        for name, data in extra.items():
            array(name, data, dims, attributes={**about, "scale_factor": 1 / 250, "_FillValue": 255}, fill_value=255, **plane)

    sure = np.where(codes == HILDA.fill.code, 255, 200).astype(np.uint8)
    write(root, codes, box, years, {"confidence": sure})
    for number, (factor, (seen, when)) in enumerate((levels or {}).items(), 1):
        name = f"overviews/{number}"
        write(root.require_group(name), seen, box.zoom_out(factor), when, {})
        layout.append({"asset": f"{name}/land_cover", "derived_from": "land_cover", "transform": {"scale": [factor, factor]}})
    if levels:
        root.attrs["multiscales"] = {"layout": layout}
    root.attrs.update({"title": "Maps for a test", "source": "made up", "license": "CC-BY-4.0", **(attrs or {})})
    zarr.consolidate_metadata(path)
    return path


def pixels(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGBA"))


def only(path):
    (part,) = open_atlas(str(path)).parts.values()
    return part
