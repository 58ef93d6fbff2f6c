"""Scenarios that are not states of LUH2, and how any scenario becomes class shares.

A scenario is one float32 DataArray ``coarse`` (year, state, coarse_latitude, coarse_longitude) of shares of the cell, NaN
where the source has no data. :func:`open_shares` reads class shares of a map product on a coarse grid, :func:`open_change`
adds yearly changes of area to a base map; in both the states are the class codes. :func:`class_shares` turns the states of
any scenario into shares of the classes of a legend.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import xarray as xr
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

from ai4land.coarse import (
    EARTH_RADIUS_KM,
    SUM_TOLERANCE,
    as_scenario,
    blocks,
    check_shares,
    check_sums,
    open_source,
    pick_years,
    to_shares,
    years_in,
)
from ai4land.errors import DataError, MismatchError
from ai4land.grid import COARSE_DIMS, Grid
from ai4land.legend import MISSING, Crosswalk, Legend
from ai4land.rasterfile import reading
from ai4land.regrid import Footprint, cell_edges, find_centres, footprint, regrid_conservative, sphere_areas, valid_share

_log = logging.getLogger(__name__)

REMAINDER = "icwtr"
"""Row of a crosswalk that takes what the states leave of a cell: ice and water."""
_BLOCK_BYTES = 128e6


def class_shares(coarse: xr.DataArray, *, crosswalk: Crosswalk) -> xr.DataArray:
    """Spread the states of a scenario over the classes of a legend.

    Parameters
    ----------
    coarse
        Scenario (year, state, coarse_latitude, coarse_longitude).
    crosswalk
        Weights for every state of the scenario. With a row ``icwtr`` and no state of this name, what the states leave of a
        cell, 1 - sum, is spread by this row.

    Returns
    -------
    xarray.DataArray
        float64 (year, class, coarse_latitude, coarse_longitude), ``class`` the index in the legend; NaN stays NaN.

    Raises
    ------
    ConfigError
        If the crosswalk has no row for a state.
    """
    states = [str(s) for s in coarse["state"].values]
    remainder = REMAINDER in crosswalk.states and REMAINDER not in states
    chosen = crosswalk.select([*states, REMAINDER] if remainder else states)
    source = coarse.transpose("year", "state", *COARSE_DIMS)
    years, _, rows, cols = source.shape
    out = np.empty((years, chosen.matrix.shape[1], rows, cols))
    for number in range(years):
        shares = np.asarray(source[number].values, dtype=np.float64)
        if remainder:
            shares = np.concatenate([shares, np.clip(1 - shares.sum(axis=0, keepdims=True), 0, None)])
        out[number] = chosen.to_classes(shares)
    kept = {name: coarse[name].values for name in ("year", *COARSE_DIMS)}
    return xr.DataArray(
        out,
        dims=("year", "class", *COARSE_DIMS),
        coords={**kept, "class": np.arange(out.shape[1])},
        name="class_shares",
        attrs={"units": "1", "long_name": "expected share of the class in the cell"},
    )


def open_shares(
    path: str | Path,
    *,
    variable: str,
    grid: Grid,
    years: Iterable[int] | None = None,
    class_dim: str = "class_code",
    year_dim: str = "year",
    state_names: Sequence[str] | None = None,
) -> xr.DataArray:
    """Read the class shares of a map product on the coarse cells of a grid.

    Parameters
    ----------
    path
        NetCDF file or Zarr group.
    variable
        Variable over ``year_dim``, ``class_dim``, latitude and longitude, in shares or percent by its ``units``.
    grid
        The grid; its coarse cells are filled, NaN where the file does not reach.
    years
        Years to read; all by default.
    class_dim
        Dimension of the classes, with their codes as coordinate.
    year_dim
        Dimension of the years: calendar years, or CF time with units.
    state_names
        The codes as text in the order wanted, or new names in the order of the classes; by default the codes as they come.

    Returns
    -------
    xarray.DataArray
        Scenario ``coarse`` (year, state, coarse_latitude, coarse_longitude).

    Raises
    ------
    DataError
        If the file is damaged, lacks the variable, a dimension or a wanted year, is in unknown units, does not overlap the
        grid, or its shares do not sum to 1 within 2e-3 in every cell with data.
    """
    path = Path(path)
    with open_source(path) as dataset:
        if variable not in dataset:
            raise DataError(f"{path} holds {sorted(map(str, dataset.data_vars))}, expected {variable}; give the variable's name")
        array = dataset[variable]
        lat, lon = find_centres(dataset, source=path)
        if set(array.dims) != {year_dim, class_dim, lat, lon} or not {year_dim, class_dim} <= set(dataset.coords):
            raise DataError(
                f"{variable} in {path} is over {array.dims} with the coordinates {sorted(map(str, dataset.coords))}, expected "
                f"{year_dim}, {class_dim}, {lat}, {lon}; give year_dim and class_dim"
            )
        codes = [str(c) for c in dataset[class_dim].values.tolist()]
        names = codes if state_names is None else list(state_names)
        known = set(names) & set(codes)
        if len(set(names)) != len(codes) or len(names) != len(codes) or (known and known != set(codes)):
            raise DataError(
                f"state_names is {names}, expected the classes {codes} of {path} in any order, or a new name for each; "
                "leave it out to keep the codes"
            )
        order = [codes.index(n) for n in names] if known else list(range(len(codes)))
        time = dataset[year_dim]
        held = years_in(time, source=path, units=None if "units" in time.attrs else "years since 0-01-01").tolist()
        wanted = pick_years(held, years, source=path)
        cut = footprint(dataset[lat].values, dataset[lon].values, box=grid.coarse, source=path)
        values = np.empty((len(wanted), len(names), *grid.coarse.shape), dtype=np.float32)
        size = max(1, int(_BLOCK_BYTES // (4 * len(names) * cut.lat.size * cut.lon.size)))
        done = 0
        for steps in blocks([held.index(y) for y in wanted], size):
            with reading(str(path), kind="NetCDF or Zarr"):
                part = cut.cut(array.isel({year_dim: steps}), dims=(lat, lon))
            if array.dims.index(year_dim) > array.dims.index(class_dim):
                part = part.swapaxes(0, 1)
            shares = to_shares(
                part[:, order], units=str(array.attrs.get("units", "")), lat=cut.lat, source=f"{variable} in {path}"
            )
            total = check_shares(shares, names=names, years=held[steps], cut=cut, source=path)
            check_sums(total, want=1.0, what="classes that sum to", years=held[steps], cut=cut, source=path)
            values[done : done + len(shares)] = cut.to_box(shares)
            done += len(shares)
    return as_scenario(values, years=wanted, states=names, grid=grid)


def open_change(
    paths: Mapping[int, str | Path],
    *,
    base: NDArray[Any],
    base_year: int,
    area: NDArray[Any],
    legend: Legend,
    grid: Grid,
) -> xr.DataArray:
    """Add yearly changes of class areas to the class shares of a base year.

    The shares of a year are those of the year before plus change / area, clipped at 0 and brought to the sum 1.

    Parameters
    ----------
    paths
        GeoTIFF of every year after the base year: the change from the year before to this year in km2, a band a class,
        described ``LC<code>``; other bands are ignored, NaN is no change. Where its cells are not those of the grid, the
        change is spread evenly over each cell and conserved.
    base
        Class shares in the base year ``(class, rows, cols)`` on the coarse grid, in the order of the legend.
    base_year
        Year of ``base``, the first year of the result.
    area
        km2 of mapped land in each coarse cell ``(rows, cols)``; 0 for none.
    legend
        The legend whose codes the bands carry.
    grid
        The grid of ``base`` and ``area``.

    Returns
    -------
    xarray.DataArray
        Scenario ``coarse`` (year, state, coarse_latitude, coarse_longitude), states the class codes; NaN where area is 0.

    Raises
    ------
    DataError
        If a file is damaged, not in degrees, without class bands, without overlap with the grid, or its changes are
        greater than its cells; if a year is lacking.
    MismatchError
        If ``base`` or ``area`` is not on the grid, or ``base`` does not sum to 1 within 2e-3 where there is land.
    """
    shape = (legend.n, *grid.coarse.shape)
    if base.shape != shape or area.shape != shape[1:]:
        raise MismatchError(
            f"base is {base.shape} and area {area.shape}, expected {shape} and {shape[1:]}; make both from the map on this grid"
        )
    years = sorted(int(y) for y in paths)
    if years != list(range(base_year + 1, base_year + 1 + len(years))) or not years:
        raise DataError(f"changes are for the years {years}, expected every year from {base_year + 1}; give the files that lack")
    land = np.nan_to_num(area) > 0
    shares = np.where(land, np.asarray(base, np.float64), np.nan)
    off = np.abs(shares.sum(axis=0) - 1)[land]
    if land.any() and not (off.max() <= SUM_TOLERANCE and np.nanmin(shares) >= 0):
        raise MismatchError(
            f"base sums to 1 ± {off.max():g}, expected shares that sum to 1 where area > 0; make both from one map"
        )
    values = np.empty((len(years) + 1, *shape), dtype=np.float32)
    values[0] = shares
    for number, year in enumerate(years, start=1):
        change = _read_change(Path(paths[year]), legend=legend, grid=grid)
        raw = shares + change / np.where(land, area, np.nan)
        total = np.clip(raw, 0, None).sum(axis=0)
        shares = np.where(total > 0, np.clip(raw, 0, None) / np.where(total > 0, total, 1), shares)
        lost = np.where(land, np.clip(-raw, 0, None) * area, 0).sum()
        if lost > 0:
            _log.info("%s: %.1f km2 of loss in %d exceeds what the cells hold and is dropped", paths[year], lost, year)
        values[number] = shares
    return as_scenario(values, years=[base_year, *years], states=[str(c) for c in legend.codes], grid=grid)


def _read_change(path: Path, *, legend: Legend, grid: Grid) -> NDArray[np.float64]:
    """Change in km2 in each coarse cell ``(class, rows, cols)``; 0 beyond the file."""
    try:
        with rasterio.open(path) as file:
            labels = [str(d or "") for d in file.descriptions]
            bands = {n: int(d[2:]) for n, d in enumerate(labels) if d.startswith("LC") and d[2:].isdigit()}
            a, crs, shape = file.transform, file.crs, file.shape
            km2 = file.read([n + 1 for n in bands], out_dtype="float64", masked=True).filled(np.nan) if bands else None
    except rasterio.errors.RasterioError as error:
        raise DataError(f"{path} is truncated or not a GeoTIFF ({error}), expected a whole file; download it again") from error
    if km2 is None:
        raise DataError(f"{path} has the bands {labels}, expected bands described LC<code>; describe its bands")
    if crs is None or not crs.is_geographic or a.b or a.d:
        raise DataError(f"{path} is in {crs}, expected a north-up latitude-longitude file; reproject it")
    lat = a.f + (np.arange(shape[0]) + 0.5) * a.e
    lon = a.c + (np.arange(shape[1]) + 0.5) * a.a
    cells = sphere_areas(cell_edges(lat), a.a, radius=EARTH_RADIUS_KM)[:, None]
    km2 = np.where(np.abs(km2) < np.inf, km2, 0)
    most = float((np.abs(km2) / cells).max())
    if most > 1.02:
        raise DataError(f"change in {path} reaches {most:.3g} times the area of its cell, expected km2; convert the file")
    cut = footprint(lat, lon, box=grid.coarse, source=path)
    index = legend.encode(np.array(list(bands.values())), source=str(path))
    out = np.zeros((legend.n, *grid.coarse.shape))
    for klass, band in zip(index, _on_grid(km2, cells, lat, lon, grid.coarse, cut), strict=True):
        if klass != MISSING:
            out[klass] += band
    return out


def _on_grid(
    km2: NDArray[np.float64], cells: NDArray[np.float64], lat: NDArray[Any], lon: NDArray[Any], box: GeoBox, cut: Footprint
) -> NDArray[np.float64]:
    """Bring amounts ``(band, lat, lon)`` to the coarse cells: picked if nested, else conserved; 0 beyond the file."""
    if cut.nested:
        part = cut.cut(xr.DataArray(km2, dims=("band", "lat", "lon")), dims=("lat", "lon"))
        return np.nan_to_num(cut.to_box(part))
    lat_edges, lon_edges = cell_edges(lat), cell_edges(lon)
    mean = regrid_conservative(km2 / cells, lat_edges=lat_edges, lon_edges=lon_edges, box=box)
    share = valid_share(np.ones(km2.shape[1:], bool), lat_edges=lat_edges, lon_edges=lon_edges, box=box)
    north_south = box.affine.f + np.arange(box.shape[0] + 1) * box.affine.e
    return np.nan_to_num(mean) * share * sphere_areas(north_south, box.affine.a, radius=EARTH_RADIUS_KM)[:, None]
