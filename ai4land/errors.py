"""The package's own errors: every one says what it found, what it wanted and how to mend it."""

from __future__ import annotations


class AI4LandError(ValueError):
    """Input, configuration or state that AI4Land refuses to work with."""


class DataError(AI4LandError):
    """An input file that is damaged, in the wrong units, on the wrong grid or out of range."""


class StoreError(DataError):
    """A disk or an object store that cannot be written: full, without permission, or away for longer than is waited for."""


class ConfigError(AI4LandError):
    """A run file that cannot be carried out as it is written."""


class MismatchError(AI4LandError):
    """Two things that do not belong together: a store, a checkpoint or a cube of another run."""


class Unfinished(AI4LandError):
    """Work that was saved and left before its end, as its time was over; the same command goes on with it."""


class WorkerError(AI4LandError):
    """Workers that fail again and again at the same place."""
