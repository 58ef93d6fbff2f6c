"""Publishing of a run: from its configuration to its catalogue."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from ai4land.errors import ConfigError
from ai4land.places import Place
from ai4land.publish.catalogue import Tell, publish
from ai4land.publish.credits import credits_of
from ai4land.run.config import RunConfig, StaticLayer
from ai4land.run.inputs import cubes_of
from ai4land.sources.known import mix
from ai4land.years import expand_years

_log = logging.getLogger(__name__)


def publish_run(
    run: RunConfig, *, to: Place | None = None, base_url: str = "", cog: Iterable[int | str] = (), tell: Tell = _log.info
) -> Path:
    """Publish the cube and the model of a run; see :func:`publish`.

    Parameters
    ----------
    run
        The run; its cube must exist.
    to
        Folder of the catalogue; default: ``stac`` in the folder of the run.
    base_url, tell
        As in :func:`publish`.
    cog
        Years to export as cloud-optimised GeoTIFF: numbers, or ranges such as ``2000-2009``.

    Raises
    ------
    DataError, ConfigError
        As in :func:`publish`, or if the years to export are invalid.
    """
    try:
        years = expand_years(list(cog))
    except ValueError as error:
        raise ConfigError(
            f"years to export cannot be read: {error}; give numbers such as 2004, or ranges such as 2000-2009"
        ) from error
    credits = credits_of(run.sources, collections_of(run), tell=tell)
    return publish(
        cubes_of(run)["cube"][0],
        to=run.folder / "stac" if to is None else to,
        name=run.name,
        title=run.title or "",
        model=run.folder,
        credits=credits,
        licence=mix({c.licence for c in credits}) if run.sources else None,
        base_url=base_url,
        cog=years,
        tell=tell,
    )


def collections_of(run: RunConfig) -> set[tuple[str, str]]:
    """Return catalogue and id of the STAC collections that a run reads."""
    static = {(s.catalog, s.collection) for s in run.static if isinstance(s, StaticLayer) and s.catalog}
    maps = {(run.landcover.catalog, collection) for collection in run.landcover.collections}
    return {(run.path(str(catalog)), str(collection)) for catalog, collection in static | maps}
