"""One layer of a raster file in its stored values, whatever the format.

:func:`open_layer` opens a GeoTIFF band (rasterio) or a NetCDF or Zarr variable (xarray) as a :class:`RasterLayer`: north up,
with its transform and reference system, read lazily by rows and columns and never from an overview. Files that could exhaust
memory or reach other files are refused first (:mod:`ai4land.sources.check`). :mod:`ai4land.rasters.read` resamples a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import rasterio.errors
import rasterio.windows
import xarray as xr
import zarr
from affine import Affine
from numpy.typing import NDArray
from odc.geo.crs import CRS
from pyproj import CRS as ProjCRS
from pyproj.exceptions import CRSError
from xarray.backends.netCDF4_ import NETCDF4_PYTHON_LOCK

from ai4land.errors import DataError
from ai4land.sources.check import check_block, open_raster_file

_XARRAY_SUFFIXES = (".nc", ".nc4", ".cdf", ".h5", ".hdf5", ".zarr")
_LATITUDE = (("latitude", "lat", "nav_lat", "y"), ("latitude", "projection_y_coordinate"))
_LONGITUDE = (("longitude", "lon", "long", "nav_lon", "x"), ("longitude", "projection_x_coordinate"))
_REGULAR = 0.02

Read = Callable[[slice, slice], tuple[NDArray[Any], NDArray[np.bool_]]]


@dataclass(frozen=True)
class RasterLayer:
    """One layer of a file, north up.

    Attributes
    ----------
    source
        File name, for messages.
    name
        Band description (the file's stem if there is none) or variable name.
    shape, transform
        ``(rows, columns)``, and the transform from column and row to coordinates in ``crs``.
    read
        Takes slices of rows and columns; returns stored values and a mask that is True where they are valid.
    scale, offset
        The true value is ``stored * scale + offset``.
    attrs
        ``units`` and ``long_name``, if the file has them.
    """

    source: str
    name: str
    shape: tuple[int, int]
    transform: Affine
    crs: CRS
    read: Read
    scale: float
    offset: float
    attrs: dict[str, str]

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east, north."""
        t, (rows, cols) = self.transform, self.shape
        return t.c, t.f + rows * t.e, t.c + cols * t.a, t.f

    @property
    def wraps(self) -> bool:
        """Whether the columns span the whole globe."""
        return bool(self.crs.geographic) and abs(self.shape[1] * self.transform.a - 360) < 0.1 * self.transform.a


def open_layer(
    path: str | Path, *, band: int | str | None = None, variable: str | None = None
) -> AbstractContextManager[RasterLayer]:
    """Open one layer of a file in a ``with`` statement.

    Parameters
    ----------
    path
        Path, or URL that GDAL or xarray reads.
    band
        Number (from 1) or description of a GeoTIFF band; number or label along the third dimension of a variable.
    variable
        NetCDF or Zarr variable; required if the file has several.

    Raises
    ------
    DataError
        If the file is missing, truncated, rotated, irregular or has no reference system, or the layer is ambiguous.
    """
    name = str(path)
    if "://" not in name and not name.startswith("/vsi") and not Path(name).exists():
        raise DataError(f"{name} does not exist, expected a raster file; check the path")
    return _open_xarray(name, band, variable) if is_xarray(path) else _open_gdal(name, band)


def is_xarray(path: str | Path) -> bool:
    """Whether xarray reads the file (NetCDF, Zarr; by suffix or Zarr metadata) rather than GDAL.

    >>> is_xarray("maps.nc"), is_xarray("maps.tif")
    (True, False)
    """
    place = Path(str(path).rstrip("/"))
    return place.suffix.lower() in _XARRAY_SUFFIXES or any((place / n).exists() for n in ("zarr.json", ".zgroup"))


@contextmanager
def reading(name: str, *, kind: str = "a raster") -> Iterator[None]:
    """Turn errors of the file libraries into a DataError that names the file and its expected ``kind``."""
    try:
        yield
    except DataError:
        raise
    except (rasterio.errors.RasterioError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise DataError(
            f"{name} is truncated or not {kind} ({error}), expected a whole file; write or download it again"
        ) from error


def open_dataset(path: str | Path) -> xr.Dataset:
    """Open a NetCDF file or Zarr group lazily with stored values: not masked, not scaled, times as numbers.

    Raises DataError if it is missing, truncated, in another format, or stored in blocks that would fill the memory.
    """
    name = str(path)
    with reading(name, kind="NetCDF or Zarr"):
        if Path(name).is_file():
            with NETCDF4_PYTHON_LOCK, netCDF4.Dataset(name) as file:  # not thread-safe; xarray takes the same lock
                for part in file.variables.values():
                    chunks = [] if part.dtype is str else part.chunking()
                    block = () if chunks == "contiguous" else tuple(int(c) for c in chunks or ())
                    check_block(f"{part.name} of {name}", part.shape, block, 1 if part.dtype is str else part.dtype.itemsize)
                least = sum(v.size * v.dtype.itemsize for v in file.variables.values() if v.dtype is not str)
                if file.data_model.startswith("NETCDF3") and Path(name).stat().st_size < least:
                    raise OSError(f"{Path(name).stat().st_size} bytes, the header promises at least {least}")
        options: dict[str, Any] = {"chunks": None, "mask_and_scale": False, "decode_times": False}
        if Path(name).is_dir():
            for key, array in zarr.open_group(name, mode="r", use_consolidated=False).arrays():
                check_block(f"{key} of {name}", array.shape, array.chunks, max(array.dtype.itemsize, 1))
            return xr.open_dataset(name, engine="zarr", consolidated=False, **options)
        return xr.open_dataset(name, engine="zarr" if Path(name.rstrip("/")).suffix == ".zarr" else "netcdf4", **options)


def pick_variable(dataset: xr.Dataset, variable: str | None, *, source: str | Path) -> xr.DataArray:
    """Return the named variable, or the only one with latitude and longitude; raise DataError if there is none or several."""
    dims = {str(_axis(dataset, *axis, source=source)) for axis in (_LATITUDE, _LONGITUDE)}
    maps = [str(n) for n, v in dataset.data_vars.items() if dims <= {str(d) for d in v.dims}]
    if variable is None and len(maps) == 1:
        variable = maps[0]
    if variable not in maps:
        raise DataError(f"variable of {source} is {variable!r}, expected one of {maps}; give variable=")
    return dataset[variable]


def _north_up(rows: slice, count: int, already: bool) -> tuple[slice, slice]:
    """Return the stored rows for ``rows`` of the north-up layer, and the slice that turns them north up."""
    start, stop, _ = rows.indices(count)
    return (slice(start, stop), slice(None)) if already else (slice(count - stop, count - start), slice(None, None, -1))


def _band(source: str, what: str, labels: list[Any], band: int | str | None) -> int:
    """Return the number, from 1, of a layer."""
    number = band
    if band is None and len(labels) == 1:
        number = 1
    elif isinstance(band, str) and labels.count(band) == 1:
        number = labels.index(band) + 1
    if not isinstance(number, int) or not 1 <= number <= len(labels):
        listed = ", ".join(map(str, labels[:40])) + (", …" if len(labels) > 40 else "")
        raise DataError(
            f"band is {band!r}, expected one of the {len(labels)} {what} of {source} by number or name ({listed}); give band="
        )
    return number


@contextmanager
def _open_gdal(name: str, band: int | str | None) -> Iterator[RasterLayer]:
    with open_raster_file(name) as file:
        if file.crs is None:
            raise DataError(f"{name} has no coordinate reference system, expected one; set it: gdal_edit.py -a_srs EPSG:4326")
        t = file.transform
        if t.b or t.d or t.a <= 0:
            raise DataError(f"{name} is rotated or mirrored ({tuple(t)[:6]}), expected columns from west to east; use gdalwarp")
        number = _band(name, "bands", list(file.descriptions), band)
        rows, cols = file.shape
        north_up = t.e < 0

        def read(r: slice, c: slice) -> tuple[NDArray[Any], NDArray[np.bool_]]:
            stored, turn = _north_up(r, rows, north_up)
            left, right, _ = c.indices(cols)
            window = rasterio.windows.Window(left, stored.start, right - left, stored.stop - stored.start)
            part = file.read(number, window=window, masked=True)[turn]
            return part.data, ~np.ma.getmaskarray(part) & np.isfinite(part.data)

        yield RasterLayer(
            source=name,
            name=file.descriptions[number - 1] or Path(name).stem,
            shape=(rows, cols),
            transform=t if north_up else t * Affine(1, 0, 0, 0, -1, rows),
            crs=CRS(file.crs.to_wkt()),
            read=read,
            scale=file.scales[number - 1],
            offset=file.offsets[number - 1],
            attrs={"units": file.units[number - 1]} if file.units[number - 1] else {},
        )


@contextmanager
def _open_xarray(name: str, band: int | str | None, variable: str | None) -> Iterator[RasterLayer]:
    with open_dataset(name) as dataset:
        field = pick_variable(dataset, variable, source=name)
        y, x = (_axis(dataset, *axis, source=name) for axis in (_LATITUDE, _LONGITUDE))
        field = _plane(field, [str(d) for d in field.dims if d not in (y, x)], name, band).transpose(y, x)
        top, dy = _regular(dataset[y], name)
        left, dx = _regular(dataset[x], name)
        if dx < 0:
            raise DataError(f"{x} of {name} runs from east to west, expected west to east; sort it")
        rows, cols = field.shape
        attrs = field.attrs
        marks = [np.asarray(attrs[k]).ravel() for k in ("_FillValue", "missing_value") if attrs.get(k) is not None]
        unsigned = str(attrs.get("_Unsigned", "")).lower() == "true" and field.dtype.kind == "i"

        def read(r: slice, c: slice) -> tuple[NDArray[Any], NDArray[np.bool_]]:
            stored, turn = _north_up(r, rows, dy < 0)
            values = np.ascontiguousarray(field[stored, c].values[turn])
            valid = np.isfinite(values)
            for mark in marks:
                with np.errstate(invalid="ignore"):
                    valid &= ~np.isin(values, mark.astype(values.dtype))
            return (values.view(f"u{values.dtype.itemsize}") if unsigned else values), valid

        yield RasterLayer(
            source=name,
            name=str(field.name),
            shape=(rows, cols),
            transform=Affine(dx, 0, left, 0, -abs(dy), top if dy < 0 else top + rows * dy),
            crs=_crs(dataset, field, dataset[y], name),
            read=read,
            scale=float(np.ravel(attrs.get("scale_factor", 1.0))[0]),
            offset=float(np.ravel(attrs.get("add_offset", 0.0))[0]),
            attrs={k: str(attrs[k]) for k in ("units", "long_name") if k in attrs},
        )


def _plane(field: xr.DataArray, extra: list[str], name: str, band: int | str | None) -> xr.DataArray:
    """Cut a variable down to latitude and longitude."""
    long = [d for d in extra if field.sizes[d] > 1]
    if len(long) > 1:
        raise DataError(
            f"variable {field.name} of {name} varies along {long}, expected at most one dimension beside the map; cut it"
        )
    along = next(iter(long or extra), None)
    if along is not None:
        labels = (
            [str(v) for v in field[along].values] if along in field.coords else [str(i) for i in range(1, field.sizes[along] + 1)]
        )
        field = field.isel({along: _band(name, f"steps of {along}", labels, band) - 1})
    elif band not in (None, 1):
        raise DataError(f"band is {band!r}, but variable {field.name} of {name} has one map, expected none; leave it out")
    return field.isel({d: 0 for d in extra if d in field.dims})


def _axis(dataset: xr.Dataset, names: tuple[str, ...], standards: tuple[str, ...], *, source: str | Path) -> str:
    one = [str(n) for n in dataset.coords if dataset[n].dims == (n,)]
    by_name = [n for want in names for n in one if n.lower() == want]
    by_standard = [n for n in one if dataset[n].attrs.get("standard_name") in standards]
    if not by_name and not by_standard:
        raise DataError(
            f"{source} has the coordinates {sorted(map(str, dataset.coords))}, expected a 1-D {names[0]}, named or with that "
            "standard_name; rename it, or regrid a curvilinear file"
        )
    return (by_name or by_standard)[0]


def _regular(axis: xr.DataArray, name: str) -> tuple[float, float]:
    """Return the first cell's edge and the signed step of regular cell centres, allowing for the stored type's rounding."""
    values = axis.values.astype(np.float64)
    if values.size < 2:
        raise DataError(f"{axis.name} of {name} has {values.size} cells, expected two or more; keep neighbours when cutting")
    step = float(values[-1] - values[0]) / (values.size - 1)
    noise = 4 * np.finfo(axis.dtype).eps * float(np.abs(values).max()) if axis.dtype.kind == "f" else 0.0
    worst = float(np.abs(values[0] + step * np.arange(values.size) - values).max())
    if step == 0 or not worst <= _REGULAR * abs(step) + noise:
        raise DataError(
            f"{axis.name} of {name} is up to {worst:g} off regular steps of {step:g}, expected regular ones; regrid it"
        )
    return float(values[0]) - step / 2, step


def _crs(dataset: xr.Dataset, field: xr.DataArray, y: xr.DataArray, name: str) -> CRS:
    """Read the reference system from the grid mapping or an ESRI string; degrees without either are WGS 84."""
    mapping = str(field.attrs.get("grid_mapping", field.encoding.get("grid_mapping", ""))).split(":")[0]
    attrs = next((dataset[n].attrs for n in (mapping, "spatial_ref", "crs") if n in dataset.variables), {})
    text = next((a[k] for a in (attrs, field.attrs) for k in ("crs_wkt", "spatial_ref", "esri_pe_string") if k in a), None)
    try:
        if text is not None:
            return CRS(str(text))
        if "grid_mapping_name" in attrs:
            return CRS(ProjCRS.from_cf(attrs))
    except CRSError as error:
        raise DataError(f"grid mapping of {name} is not valid ({error}), expected a CF one; correct it") from error
    degrees = str(y.attrs.get("units", "")).startswith("degree") or y.attrs.get("standard_name") == "latitude"
    if not degrees and str(y.name).lower() not in _LATITUDE[0][:-1]:
        raise DataError(
            f"{name} has {y.name} in {y.attrs.get('units', 'no units')} and no coordinate reference system, expected degrees or a "
            "CF grid_mapping; write one (rioxarray: rio.write_crs)"
        )
    return CRS("EPSG:4326")
