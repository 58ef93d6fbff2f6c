"""Write the synthetic planet in the formats of the real data.

Annual maps are HILDA+ GeoTIFFs; terrain, climate and soil are cloud-optimised GeoTIFFs in a static STAC catalogue; leaf area
index is CF NetCDF. :mod:`ai4land.synthetic.luh2` writes the LUH2 files.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import pystac
import rasterio
from affine import Affine
from numpy.typing import NDArray

from ai4land.errors import ConfigError
from ai4land.grid import Grid, centres
from ai4land.places import write_atomically

FORMAT_VERSION = 1
TITLE = "AI4Land synthetic planet"
PROJECTION = "https://stac-extensions.github.io/projection/v2.0.0/schema.json"
_LAYERS = {
    # asset: (collection, unit, description)
    "elevation": ("terrain", "m", "Height above sea level; below 0 is ocean"),
    "slope": ("terrain", "deg", "Slope between neighbouring cells"),
    "temperature": ("climate", "degC", "Annual mean temperature"),
    "precipitation": ("climate", "mm yr-1", "Annual precipitation"),
    "climate_zone": ("climate", "1", "1 tropical, 2 dry, 3 temperate, 4 continental, 5 polar"),
    "soil_depth": ("soil", "m", "Depth of the soil; land only"),
}


@dataclass(frozen=True)
class PlanetPaths:
    """Paths of the parts of a planet.

    ``landcover`` and ``lai`` have ``{year}`` in their names. ``marker`` holds the parameters and files of a complete planet
    and is written last.
    """

    folder: Path
    states: Path
    static_data: Path
    landcover: Path
    lai: Path
    catalog: Path
    static: Path
    readme: Path
    marker: Path

    @classmethod
    def inside(cls, folder: str | Path) -> PlanetPaths:
        """Return the paths of a planet in ``folder``."""
        root = Path(folder)
        return cls(
            folder=root,
            states=root / "luh2" / "states.nc",
            static_data=root / "luh2" / "staticData_quarterdeg.nc",
            landcover=root / "landcover" / "HILDAplus_{year}.tif",
            lai=root / "lai" / "lai_{year}.nc",
            catalog=root / "catalog" / "catalog.json",
            static=root / "static",
            readme=root / "README.txt",
            marker=root / "planet.json",
        )


def _files(paths: PlanetPaths) -> list[Path]:
    """List the existing files of a planet except the marker."""
    inner = ("luh2/*.nc", "landcover/HILDAplus_*.tif", "lai/lai_*.nc", "static/*.tif", "catalog/**/*.json")
    found = {p for pattern in inner for p in paths.folder.glob(pattern)} | {paths.readme}
    return sorted(p for p in found if p.is_file())


def is_complete(paths: PlanetPaths, parameters: Mapping[str, Any]) -> bool:
    """Whether the folder holds a planet of these parameters, with all files at their full size."""
    try:
        marker = json.loads(paths.marker.read_text(encoding="utf-8"))
        wanted = {"format_version": FORMAT_VERSION, **parameters}
        if any(marker[key] != value for key, value in wanted.items()):
            return False
        return all((paths.folder / name).stat().st_size == size for name, size in marker["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def prepare(paths: PlanetPaths) -> None:
    """Make the folders, and remove the files of an earlier planet.

    Raises ConfigError if the folder holds files but no planet.
    """
    if paths.folder.is_dir() and any(paths.folder.iterdir()):
        ours = paths.readme.is_file() and paths.readme.read_text(encoding="utf-8", errors="replace").startswith(TITLE)
        if not ours:
            raise ConfigError(
                f"folder {paths.folder} holds files that are not a synthetic planet, expected an empty folder; choose another one"
            )
    paths.marker.unlink(missing_ok=True)
    for path in _files(paths):
        if path != paths.readme:
            path.unlink()
    for part in (paths.states, paths.landcover, paths.lai, paths.static / "x", paths.catalog):
        part.parent.mkdir(parents=True, exist_ok=True)
    paths.readme.write_text(
        f"{TITLE}\n\n"
        "Everything here is SYNTHETIC: made from a seed by ai4land.synthetic.planet to try and test the software.\n"
        "It is no observation of the Earth; scores on it say nothing about real data.\n\n"
        "luh2/states.nc                   land-use states, as LUH2 v2h\n"
        "luh2/staticData_quarterdeg.nc    static data, as LUH2 v2h\n"
        "landcover/HILDAplus_<year>.tif   annual land cover in the codes of HILDA+ (0 is ocean)\n"
        "catalog/catalog.json             STAC catalogue of the terrain, climate and soil layers in static/\n"
        "lai/lai_<year>.nc                monthly leaf area index of the last years\n"
        "planet.json                      parameters and files; without it the planet is incomplete\n",
        encoding="utf-8",
    )


def write_marker(paths: PlanetPaths, parameters: Mapping[str, Any]) -> None:
    """Write the marker of a complete planet; the last step."""
    files = {p.relative_to(paths.folder).as_posix(): p.stat().st_size for p in _files(paths)}
    content = {"title": TITLE, "format_version": FORMAT_VERSION, **parameters, "files": files}
    write_atomically(paths.marker, (json.dumps(content, indent=1) + "\n").encode())


def write_map(paths: PlanetPaths, year: int, codes: NDArray[np.uint8], *, grid: Grid) -> None:
    """Write one annual map as a HILDA+ GeoTIFF."""
    profile = {"driver": "GTiff", "dtype": "uint8", "count": 1, "nodata": 99, "crs": "EPSG:4326", "transform": grid.fine.affine}
    layout = {"height": grid.shape[0], "width": grid.shape[1], "compress": "deflate", "tiled": True}
    with rasterio.open(str(paths.landcover).format(year=year), "w", **profile, **layout, blockxsize=256, blockysize=256) as file:
        file.write(codes, 1)
        file.set_band_description(1, "LULC_states")


def write_static(paths: PlanetPaths, layers: Mapping[str, NDArray[Any]], *, grid: Grid, years: Sequence[int]) -> None:
    """Write the static layers as COGs with a STAC catalogue: terrain as a western and an eastern half, the others whole."""
    half = grid.shape[1] // 2
    pieces = {
        "terrain": {"west": slice(0, half), "east": slice(half, None)},
        "climate": {"globe": slice(None)},
        "soil": {"globe": slice(None)},
    }
    catalog = pystac.Catalog("ai4land-planet", f"{TITLE}: static layers", title=TITLE)
    first, last = dt.datetime(years[0], 1, 1, tzinfo=dt.UTC), dt.datetime(years[-1], 12, 31, tzinfo=dt.UTC)
    extent = pystac.Extent(pystac.SpatialExtent([[-180.0, -90.0, 180.0, 90.0]]), pystac.TemporalExtent([[first, last]]))
    for name, parts in pieces.items():
        collection = pystac.Collection(
            name, f"{TITLE}: {name}, made from a seed", extent, title=name.capitalize(), license="CC0-1.0"
        )
        catalog.add_child(collection)
        for part, columns in parts.items():
            a = grid.fine.affine
            transform = Affine(a.a, 0.0, a.c + (columns.start or 0) * a.a, 0.0, a.e, a.f)
            assets = {}
            for layer in (key for key, entry in _LAYERS.items() if entry[0] == name):
                target = paths.static / (f"{layer}.tif" if part == "globe" else f"{layer}_{part}.tif")
                assets[layer] = _write_cog(target, layer, layers[layer][:, columns], transform)
            west, east = transform.c, transform.c + (half if part != "globe" else grid.shape[1]) * transform.a
            ring = [[west, -90.0], [east, -90.0], [east, 90.0], [west, 90.0], [west, -90.0]]
            item = pystac.Item(
                f"{name}-{part}",
                {"type": "Polygon", "coordinates": [ring]},
                [west, -90.0, east, 90.0],
                first,
                {"title": f"{name.capitalize()}, {part}"},
                start_datetime=first,
                end_datetime=last,
                stac_extensions=[PROJECTION],
                assets=assets,
            )
            collection.add_item(item)
    catalog.normalize_hrefs(str(paths.catalog.parent.resolve()))
    catalog.make_all_asset_hrefs_relative()
    catalog.save(pystac.CatalogType.SELF_CONTAINED)


def _write_cog(path: Path, layer: str, values: NDArray[Any], transform: Affine) -> pystac.Asset:
    """Write a static layer as a cloud-optimised GeoTIFF, and return it as a STAC asset."""
    _, unit, text = _LAYERS[layer]
    nodata = 0 if values.dtype == np.uint8 else float("nan")
    profile = {
        "driver": "COG",
        "dtype": values.dtype.name,
        "count": 1,
        "nodata": nodata,
        "crs": "EPSG:4326",
        "transform": transform,
    }
    layout = {"height": values.shape[0], "width": values.shape[1], "compress": "deflate", "blocksize": 128}
    sampling = "nearest" if values.dtype == np.uint8 else "average"
    with rasterio.open(path, "w", **profile, **layout, overview_resampling=sampling) as file:
        file.write(values, 1)
        file.set_band_description(1, layer)
    # JSON has no NaN; STAC uses the string "nan".
    described = {"data_type": values.dtype.name, "nodata": nodata if nodata == 0 else "nan", "unit": unit}
    extra = {
        **described,
        "bands": [{"name": layer, "description": text}],
        "proj:code": "EPSG:4326",
        "proj:shape": list(values.shape),
        "proj:transform": [float(v) for v in transform[:6]],
    }
    return pystac.Asset(str(path.resolve()), layer, text, pystac.MediaType.COG, ["data"], extra)


def write_lai(
    paths: PlanetPaths, year: int, codes: NDArray[np.uint8], *, temperature: NDArray[Any], precipitation: NDArray[Any], grid: Grid
) -> None:
    """Write the monthly leaf area index of a year, as bytes of 1/30 m² m⁻² like the Copernicus product.

    Class and rain set the peak; a yearly cycle of temperature, stronger at high latitudes, sets the season. Ocean and lakes
    are missing.
    """
    lat, lon = centres(grid.fine)
    peak_of = np.zeros(256)
    peak_of[[11, 22, 33, 44, 55, 66]] = [0.8, 4.0, 2.5, 5.2, 1.9, 0.2]
    peak = peak_of[codes] * np.clip(1.3 * precipitation / (precipitation + 350), 0, 1.2)
    least = np.where(codes == 44, 0.3, 0.1)
    swing = 18 * np.sin(np.deg2rad(lat))[:, None]
    dry = np.isin(codes, (0, 77))
    with netCDF4.Dataset(str(paths.lai).format(year=year), "w", format="NETCDF4") as file:
        file.setncatts({"title": f"{TITLE}: leaf area index", "Conventions": "CF-1.8", "source": "ai4land.synthetic.planet"})
        months = [(dt.date(year, m, 15) - dt.date(1970, 1, 1)).days for m in range(1, 13)]
        axes: dict[str, tuple[Any, dict[str, str]]] = {
            "time": (months, {"standard_name": "time", "units": "days since 1970-01-01", "calendar": "standard", "axis": "T"}),
            "latitude": (lat, {"standard_name": "latitude", "units": "degrees_north", "axis": "Y"}),
            "longitude": (lon, {"standard_name": "longitude", "units": "degrees_east", "axis": "X"}),
        }
        for name, (values, attrs) in axes.items():
            file.createDimension(name, len(values))
            variable = file.createVariable(name, "f8", (name,), fill_value=False)
            variable.setncatts(attrs)
            variable[:] = values
        lai = file.createVariable("lai", "u1", tuple(axes), fill_value=255, compression="zlib", complevel=1)
        lai.setncatts(
            {"standard_name": "leaf_area_index", "units": "1", "scale_factor": np.float32(1 / 30), "cell_methods": "time: mean"}
        )
        lai.set_auto_scale(False)
        for month in range(12):
            warmth = temperature + swing * np.cos(2 * np.pi * (month - 6.5) / 12)
            value = peak * np.clip(warmth / 14, least, 1)
            lai[month] = np.where(dry, 255, np.rint(30 * value).clip(0, 210)).astype(np.uint8)
