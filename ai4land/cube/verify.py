"""Verify a cube against its ledger: read every object again and compare checksums.

Missing and damaged objects are listed and can be struck from the ledger, so that reconstruction makes them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ai4land.cube import ledger
from ai4land.cube.cube import encode, public_documents, template_of, whole_years
from ai4land.cube.template import VARIABLES
from ai4land.places import Place, delete, names, read

_READERS = 8


@dataclass(frozen=True)
class Damage:
    """One missing, damaged or unexpected object, or a shard missing from the ledger.

    ``keys`` are the shards and years to make again; empty for metadata, which are simply rewritten.
    """

    name: str
    what: str
    keys: tuple[ledger.Key, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


def verify(place: Place, *, progress: Callable[[int, int], None] | None = None) -> list[Damage]:
    """Read every object of a cube, or of a part of one, and compare it with the ledger.

    Parameters
    ----------
    progress
        Called with the number of objects read and their total.

    Returns
    -------
    list of Damage
        Empty for an intact cube. Years that are not visible yet may lack shards.

    Raises
    ------
    DataError
        If the ledger has no readable template.
    """
    template = template_of(place)
    there = set(names(place))
    wanted: dict[str, tuple[str | None, tuple[ledger.Key, ...]]] = {
        name: (sum_, ()) for name, sum_ in template["objects"].items()
    }
    for entry in ledger.entries(place):
        keys = tuple((entry["row"], entry["col"], year) for year in entry["years"])
        wanted.update({name: (sum_, keys) for name, sum_ in entry["files"].items()})
    found = list(_lacking(place, template, there))

    def look(item: tuple[str, tuple[str | None, tuple[ledger.Key, ...]]]) -> Damage | None:
        name, (sum_, keys) = item
        if sum_ is None:
            return Damage(name, "is there, though the shard has nothing in it", keys) if name in there else None
        data = read(place, name)
        if data is None:
            return Damage(name, "is missing", keys)
        if ledger.checksum(data) != sum_:
            return Damage(name, f"is damaged: {len(data)} bytes whose checksum is not that of the ledger", keys)
        return None

    with ThreadPoolExecutor(_READERS) as pool:
        for number, damage in enumerate(pool.map(look, wanted.items()), start=1):
            found += [] if damage is None else [damage]
            if progress is not None:
                progress(number, len(wanted))
    for name in sorted(there - set(wanted)):
        if "/c/" in name and name.split("/c/")[0].removeprefix("overviews/").split("/")[-1] in VARIABLES:
            found.append(Damage(name, "is there, but no shard of the ledger has it"))
    return found


def _lacking(place: Place, template: dict[str, object], there: set[str]) -> Iterator[Damage]:
    """Compare the metadata and the visible years with the ledger."""
    years: list[int] = template["years"]  # type: ignore[assignment]
    shards: list[list[int]] = template["shards"]  # type: ignore[assignment]
    done = set(ledger.recorded(place))
    have = read(place, "zarr.json")
    shown = next((n for n in range(len(years), -1, -1) if have == encode(public_documents(template, n)[""])), None)
    if shown is None:
        yield Damage("zarr.json", "is missing" if have is None else "is not what the ledger's template says")
        shown = len(whole_years(place, done=done))
    for name, document in public_documents(template, shown).items():
        key = f"{name}/zarr.json"
        if name and read(place, key) != encode(document):
            yield Damage(key, "is not what the ledger's template says" if key in there else "is missing")
    for row, col in shards:
        gone = tuple((row, col, year) for year in years[:shown] if (row, col, year) not in done)
        if gone:
            yield Damage(f"shard at row {row}, column {col}", f"the ledger lacks {len(gone)} years that are to be seen", gone)


def strike(place: Place, damages: list[Damage]) -> set[ledger.Key]:
    """Remove damaged objects from ledger and cube; return the shards and years to make again. No task may be writing."""
    keys = {key for damage in damages for key in damage.keys}
    ledger.strike(place, keys)
    for damage in damages:
        if not damage.name.startswith("shard "):
            delete(place, damage.name)
    return keys
