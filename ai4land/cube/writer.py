"""Write cells into a cube: encode whole shards in memory, store them, then record them in the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.array import AsyncArray
from zarr.core.metadata.v3 import ArrayV3Metadata
from zarr.storage import MemoryStore, StorePath

from ai4land.cube import ledger
from ai4land.cube.claim import check_claim
from ai4land.cube.cube import template_of
from ai4land.cube.overviews import reduce_classes
from ai4land.cube.template import VARIABLES
from ai4land.grid import Window
from ai4land.legend import MISSING, Legend
from ai4land.places import Place, delete, write


class Writer:
    """Write the years of one shard; nothing else writes cells into a cube.

    Each year waits in memory for the other years of its shard. A shard is recorded once all its variables are written.
    ``token`` is that of the claim on the cube (:mod:`ai4land.cube.claim`); None: unclaimed.

    Raises
    ------
    ValueError
        If the window is not a whole shard.
    """

    def __init__(self, place: Place, window: Window, *, token: str | None = None) -> None:
        template = template_of(place)
        self._place, self._window, self._token = place, window, token
        self._documents, self._years = template["documents"], template["years"]
        self._deep = template["years_a_shard"]
        self._legend = Legend(**template["legend"])
        shard = self._documents["land_cover"]["chunk_grid"]["configuration"]["chunk_shape"][-1]
        w = window
        if w.row % shard or w.col % shard or (w.height, w.width) != (shard, shard):
            raise ValueError(f"block {w} is not a whole shard of {shard} cells; blocks must be shards of the cube")
        self._levels = {
            k: shard // d["chunk_grid"]["configuration"]["chunk_shape"][-1] for k, d in self._documents.items() if _level(k)
        }
        self._waiting: dict[tuple[str, int], dict[int, NDArray[Any]]] = {}
        self._files: dict[int, dict[str, str | None]] = {}
        self._notes: dict[int, list[dict[str, Any]]] = {}
        self._book = ledger.Book(place, row=w.row, col=w.col)

    def add(self, year: int, arrays: Mapping[str, NDArray[Any]], notes: Mapping[str, Any] | None = None) -> None:
        """Add a year; write and record every shard that it completes.

        Parameters
        ----------
        arrays
            Stored numbers of every variable, ``([class,] rows, columns)``: codes in ``land_cover`` and ``most_likely``,
            scaled numbers in ``fraction``, ``confidence`` and ``change_probability``.
        notes
            Plain values for the ledger about the result of the year.

        Raises
        ------
        ValueError
            If an array is missing, or its shape or type is not the cube's.
        StoreError
            If a shard cannot be written.
        MismatchError
            If another run has taken the claim.
        """
        w, time = self._window, self._years.index(year)
        if set(arrays) != set(VARIABLES):
            raise ValueError(f"block {w} has the arrays {sorted(arrays)}, expected {sorted(VARIABLES)}")
        for name, data in arrays.items():
            document = self._documents[name]
            wanted, kind = (*document["shape"][1:-2], w.height, w.width), np.dtype(document["data_type"])
            if data.shape != wanted or data.dtype != kind:
                raise ValueError(f"{name} of block {w} is {data.dtype} {data.shape}, expected {kind} {wanted}")
        views = dict(arrays)
        if self._levels:
            index = self._legend.encode(arrays["land_cover"])
            factors = list(self._levels.values())
            for name, coarse in zip(self._levels, reduce_classes(index, classes=self._legend.n, factors=factors), strict=True):
                views[name] = np.where(coarse == MISSING, self._legend.fill.code, self._legend.decode(coarse)).astype(np.uint8)
        group = time // self._deep
        self._notes.setdefault(group, []).append({"year": year, **(notes or {})})
        for name, data in views.items():
            depth = self._documents[name]["chunk_grid"]["configuration"]["chunk_shape"][0]
            first = time // depth * depth
            part = self._waiting.setdefault((name, first), {})
            part[time] = data
            if len(part) == min(depth, len(self._years) - first):
                self._write(name, first, np.stack([part[t] for t in sorted(part)]), self._files.setdefault(group, {}))
                del self._waiting[name, first]
        if len(self._notes[group]) == min(self._deep, len(self._years) - group * self._deep):
            years = self._years[group * self._deep : (group + 1) * self._deep]
            said = sorted(self._notes.pop(group), key=lambda note: note["year"])
            self._book.enter(years=years, files=self._files.pop(group), notes={"notes": said})

    def _write(self, name: str, first: int, data: NDArray[Any], files: dict[str, str | None]) -> None:
        """Encode a shard of one variable in memory and store it whole."""
        held: dict[str, Any] = {}
        metadata = ArrayV3Metadata.from_dict(self._documents[name])
        array: Any = zarr.Array(AsyncArray(metadata=metadata, store_path=StorePath(MemoryStore(store_dict=held), name)))
        factor = self._levels.get(name, 1)
        place = tuple(slice(s.start // factor, s.stop // factor) for s in self._window.slices)
        array[(slice(first, first + len(data)), ..., *place)] = data
        chunk = metadata.chunk_grid.chunk_shape  # type: ignore[attr-defined]
        row, col = (s.start // n for s, n in zip(place, chunk[-2:], strict=True))
        key = f"{name}/c/" + "/".join(map(str, (first // chunk[0], *(0,) * (len(chunk) - 3), row, col)))
        if set(held) - {key}:
            raise ValueError(
                f"shard {key} was encoded as {sorted(held)}, expected one object; report this with the versions of zarr"
            )
        if self._token is not None:
            check_claim(self._place, self._token)
        if key in held:
            content = held[key].to_bytes()
            write(self._place, key, content)
            files[key] = ledger.checksum(content)
        else:
            delete(self._place, key)
            files[key] = None


def _level(name: str) -> bool:
    return name.startswith("overviews/") and name.endswith("/land_cover")
