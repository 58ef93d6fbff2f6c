"""Annual land-cover maps of any legend, one year at a time.

A source is a path with ``{year}``, a dict from year to path, one GeoTIFF whose band descriptions are years, or one NetCDF or
Zarr variable with a time or year dimension. :func:`find_maps` finds each year's :class:`AnnualMap`, and
:func:`find_catalog_maps` finds maps in STAC catalogues. A map reads itself, or a window, onto the fine grid as legend codes,
with aliases replaced and unknown codes refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pystac
import xarray as xr
from numpy.typing import NDArray

from ai4land.errors import ConfigError, DataError
from ai4land.grid import Grid, Window
from ai4land.legend import Legend
from ai4land.rasters.file import is_xarray, open_dataset, pick_variable
from ai4land.rasters.items import items_in, load_asset
from ai4land.rasters.read import open_raster
from ai4land.sources.check import open_raster_file
from ai4land.sources.search import years_of_item
from ai4land.years import years_in

MapResampling = Literal["exact", "nearest", "mode"]
MapSource = str | Path | Mapping[int, str | Path]
_VARIABLES = ("lccs_class", "land_cover", "LULC_states")
_YEAR = re.compile(r"(?<!\d)(\d{4})(?!\d)")


@dataclass(frozen=True)
class AnnualMap:
    """The map of one year, read on demand."""

    year: int
    path: str
    band: int | None
    variable: str | None
    grid: Grid
    legend: Legend
    resampling: MapResampling

    def read(self, window: Window | None = None) -> NDArray[np.uint8]:
        """Read class codes on the grid's fine cells or a window of them; cells without a class hold the fill code.

        Raises DataError if the map holds a code outside the legend, has no class on the whole grid (a window may have none),
        or cannot be read; see :func:`ai4land.rasters.read.open_raster`.
        """
        field = open_raster(
            self.path,
            grid=self.grid,
            resampling=self.resampling,
            band=self.band,
            variable=_variable(self.path, self.variable) if is_xarray(self.path) else None,
            dtype=np.uint8,
            nodata=self.legend.fill.code,
            recode=partial(_recode, legend=self.legend, name=f"land-cover map of {self.year} ({self.path})"),
            window=window,
        )
        return np.asarray(field.values, dtype=np.uint8)


def find_maps(
    source: MapSource,
    *,
    grid: Grid,
    legend: Legend,
    years: Iterable[int] | None = None,
    resampling: MapResampling = "exact",
    variable: str | None = None,
) -> dict[int, AnnualMap]:
    """Locate the maps of a source, sorted by year, without reading their cells.

    Parameters
    ----------
    source
        Path with ``{year}`` (and optionally ``*``), dict from year to path, multi-band GeoTIFF whose band descriptions are
        years, or NetCDF file or Zarr group with a time (dates) or year (numbers) dimension.
    variable
        NetCDF or Zarr variable; by default ``lccs_class``, ``land_cover``, ``LULC_states`` or the only map in the file.
    legend
        Aliases become the code they stand for; nodata, NaN and cells outside the file become the fill code.
    years
        Years to find; all if None.
    resampling
        ``exact`` for maps on the grid's lattice; ``nearest``; or ``mode``, the most frequent class, ignoring empty cells.

    Raises
    ------
    DataError
        If there is no map, a year is missing or duplicated, or the years cannot be read.
    ConfigError
        If the resampling is unknown.
    """
    if resampling not in ("exact", "nearest", "mode"):
        raise ConfigError(f"resampling of land cover is {resampling!r}, expected exact, nearest or mode; codes have no average")
    maps = _locate(source, variable)
    wanted = sorted(maps) if years is None else sorted({int(y) for y in years})
    lacking = [y for y in wanted if y not in maps]
    if lacking:
        raise DataError(
            f"land-cover maps of {lacking} are not in {_shown(source)}, expected years out of {sorted(maps)}; choose these"
        )
    return {year: AnnualMap(year, *maps[year], variable, grid, legend, resampling) for year in wanted}


@dataclass(frozen=True)
class CatalogMap:
    """The map of one year from the items of a STAC collection, read on demand."""

    year: int
    path: str
    collection: str
    asset: str
    grid: Grid
    legend: Legend
    resampling: MapResampling

    def read(self, window: Window | None = None) -> NDArray[np.uint8]:
        """Read class codes as :meth:`AnnualMap.read` does, except that a map without any class is not refused."""
        w = window or Window(0, 0, *self.grid.shape)
        fill = self.legend.fill.code
        items = items_in(self.path, collection=self.collection, grid=self.grid, window=w)
        items = [item for item in items if _year_of(item) == self.year]
        if not items:
            return np.full((w.height, w.width), fill, dtype=np.uint8)
        # int32 keeps unknown codes as stored, so that the legend refuses them instead of a truncated value.
        field = load_asset(
            items, asset=self.asset, grid=self.grid, resampling=self.resampling, dtype=np.int32, nodata=fill, window=w
        )
        codes = np.asarray(field.compute(scheduler="synchronous").values)
        return _recode(codes, legend=self.legend, name=f"land-cover map of {self.year} ({self.collection} of {self.path})")


def find_catalog_maps(
    catalog: str, *, collections: Sequence[str], asset: str, grid: Grid, legend: Legend, resampling: MapResampling = "exact"
) -> dict[int, CatalogMap]:
    """Find the maps of STAC collections, sorted by year.

    Each year is merged from its items; a cell that no item covers gets the fill code.

    Parameters
    ----------
    catalog
        Path or URL of a static catalogue or an API, such as a mirror written by ``ai4land fetch``.
    collections, asset
        Collection ids, and the key of the asset that holds the codes.
    legend
        As in :func:`find_maps`.
    resampling
        ``exact`` or ``nearest``, because aliases are replaced after reading.

    Raises
    ------
    DataError
        If the catalogue cannot be read, an item does not cover exactly one year, or two collections have the same year.
    ConfigError
        If the resampling is neither of these.
    """
    if resampling not in ("exact", "nearest"):
        raise ConfigError(f"resampling of land cover from a catalogue is {resampling!r}, expected exact or nearest; choose one")
    found: dict[int, CatalogMap] = {}
    for collection in collections:
        items = items_in(catalog, collection=collection, grid=grid, window=Window(0, 0, *grid.shape))
        for year in {_year_of(item) for item in items}:
            if year in found:
                raise DataError(
                    f"{found[year].collection} and {collection} both have a map of {year}, expected one; leave one out"
                )
            found[year] = CatalogMap(year, catalog, collection, asset, grid, legend, resampling)
    return dict(sorted(found.items()))


def _year_of(item: pystac.Item) -> int:
    start, end = years_of_item(item)
    if start is None or start != end:
        raise DataError(f"item {item.id} is of the years {start}-{end}, expected one year; give a collection of annual maps")
    return start


def _recode(codes: NDArray[Any], *, legend: Legend, name: str) -> NDArray[np.uint8]:
    return legend.decode(legend.encode(codes, source=name))


def _shown(source: MapSource) -> str:
    return "the given files" if isinstance(source, Mapping) else str(source)


def _locate(source: MapSource, variable: str | None) -> dict[int, tuple[str, int | None]]:
    """Map each year to its file, and to its layer number if the file holds several."""
    if isinstance(source, Mapping):
        if not source:
            raise DataError("land-cover source is an empty dict, expected a path for every year; fill it in")
        return {int(year): (str(path), None) for year, path in source.items()}
    text = str(source)
    if "{year}" in text:
        return _by_pattern(text)
    if not Path(text).exists() and "://" not in text and not text.startswith("/vsi"):
        raise DataError(f"land-cover source {text} does not exist, expected a file or a pattern with {{year}}; check the path")
    if is_xarray(text):
        return {year: (text, k + 1) for k, year in enumerate(_years_of_variable(text, variable))}
    if Path(text).is_dir():
        raise DataError(f"land-cover source {text} is a folder, expected a pattern with {{year}}; write {text}/name_{{year}}.tif")
    return {year: (text, k + 1) for k, year in enumerate(_years_of_bands(text))}


def _by_pattern(pattern: str) -> dict[int, tuple[str, int | None]]:
    parts = Path(pattern).parts
    first = next(k for k, part in enumerate(parts) if "{year}" in part or "*" in part)
    below = "/".join(parts[first:]).replace("[", "[[]").replace("{year}", "[0-9]" * 4)
    text = re.escape(Path(pattern).as_posix()).replace(r"\*", "[^/]*")
    regex = re.compile(text.replace(r"\{year\}", r"(?P<year>\d{4})", 1).replace(r"\{year\}", "(?P=year)"))
    found: dict[int, tuple[str, int | None]] = {}
    for path in sorted(p.as_posix() for p in Path(*parts[:first]).glob(below)):
        match = regex.fullmatch(path)
        if match is None:
            continue
        year = int(match["year"])
        if year in found:
            raise DataError(f"{found[year][0]} and {path} are both of {year}, expected one map a year; make the pattern narrower")
        found[year] = (path, None)
    if not found:
        raise DataError(f"no file matches {pattern}, expected one for every year; check the folder and the name around {{year}}")
    return found


def _years_of_bands(path: str) -> list[int]:
    with open_raster_file(path) as file:
        labels = list(file.descriptions)
    years = [_YEAR.findall(label or "") for label in labels]
    if any(len(set(y)) != 1 for y in years):
        raise DataError(
            f"bands of {path} are described as {labels[:6]}, expected a year each; describe them, "
            "or give a dict from year to path for single maps"
        )
    return _once([int(y[0]) for y in years], path)


def _years_of_variable(path: str, variable: str | None) -> list[int]:
    with open_dataset(path) as dataset:
        field = pick_variable(dataset, _variable(path, variable), source=path)
        dim = next((str(d) for d in field.dims if str(d).lower() in ("time", "year", "years", "t")), None)
        if dim is None or dim not in field.coords:
            raise DataError(
                f"variable {field.name} of {path} has the dimensions {field.dims}, expected time or year; give {{year: path}}"
            )
        return _once(_years(field[dim], path), path)


def _years(time: xr.DataArray, path: str) -> list[int]:
    """Decode a stored time axis: dates, or years as plain numbers."""
    values = np.asarray(time.values)
    if values.dtype.kind == "M":
        return [int(y) for y in time.dt.year.values]
    plain = "since" not in str(time.attrs.get("units", ""))
    if plain and values.dtype.kind in "iuf" and np.all((values >= 500) & (values <= 3000) & (values == np.floor(values))):
        return [int(y) for y in values]
    return [int(y) for y in years_in(time, source=path)]


def _once(years: list[int], path: str) -> list[int]:
    twice = sorted({y for y in years if years.count(y) > 1})
    if twice:
        raise DataError(f"{path} holds the years {twice} more than once, expected one map a year; cut it")
    return years


def _variable(path: str, variable: str | None) -> str | None:
    """Return the given variable, or the first usual name in the file; None if there is neither."""
    if variable is not None:
        return variable
    with open_dataset(path) as dataset:
        return next((v for v in _VARIABLES if v in dataset.data_vars), None)
