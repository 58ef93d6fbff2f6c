"""A run as values: pydantic models of a run file, its ``key=value`` overrides and its fingerprints.

Relative paths start at ``data``. The resolved run is saved with its results. No function below the command line takes
these models: the modules of :mod:`ai4land.run` pass on the few values that each needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlparse

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from ai4land.digests import digest
from ai4land.errors import ConfigError
from ai4land.years import expand_years

Years = Annotated[list[int], BeforeValidator(expand_years), Field(min_length=1)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _no_flag_for_a_number(cls, values: Any) -> Any:
        """Refuse ``true`` and ``false`` where they would silently count as 1 and 0."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(str(name))
            flags = bool in map(type, value if isinstance(value, list) else [value])
            if flags and field is not None and field.annotation is not bool:
                raise ValueError(f"{name} is {value}, expected no true or false; give a number or a name")
        return values


def plain_path(value: str) -> str:
    """Turn a ``file://`` URL into the path that it names; leave paths and other URLs alone.

    >>> plain_path("file:///data/my%20maps"), plain_path("s3://bucket/cube.zarr")
    ('/data/my maps', 's3://bucket/cube.zarr')
    """
    return unquote(urlparse(value).path) if value.startswith("file:/") else value


def _folder(value: str) -> str:
    if "://" in (path := plain_path(value)):
        raise ValueError(f"folder is {value!r}, expected one on this machine; only the inputs and reconstruct.cube may be URLs")
    return path


Folder = Annotated[str, AfterValidator(_folder)]


class GridConfig(_Model):
    """The target grid; see :func:`ai4land.grid.make_grid`."""

    bbox: tuple[float, float, float, float]
    coarse_cell: float = Field(gt=0)
    factor: int = Field(ge=1)
    shard: int = Field(ge=1)
    origin: tuple[float, float] = (-180.0, 90.0)
    crs: str = "EPSG:4326"


class LandCoverConfig(_Model):
    """Annual land-cover maps: one file, a pattern with ``{year}`` or a path a year (``source``), or an asset of STAC collections."""

    source: str | dict[int, str] | None = None
    legend: str
    variable: str | None = None
    catalog: str | None = None
    collection: str | list[str] | None = Field(default=None, description="or several that follow one another")
    asset: str | None = None
    resampling: Literal["exact", "nearest", "mode"] = "exact"

    @model_validator(mode="after")
    def _source(self) -> LandCoverConfig:
        stac = (self.catalog, self.collection, self.asset)
        if (self.source is None) == (stac == (None, None, None)) or (self.source is None and None in stac):
            raise ValueError("landcover needs either a source, or catalog, collection and asset")
        if self.source is None and self.resampling == "mode":
            raise ValueError(
                "landcover.resampling is mode, expected exact or nearest for a STAC collection, whose codes are merged after they are read"
            )
        return self

    @property
    def collections(self) -> list[str]:
        """Ids of the STAC collections."""
        return [self.collection] if isinstance(self.collection, str) else self.collection or []


class Luh2Config(_Model):
    """LUH2 or LUH3 states; see :func:`ai4land.scenario.luh2.open_states`."""

    kind: Literal["luh2"]
    paths: list[str] = Field(min_length=1)
    static: str | None = None
    crosswalk: str = "luh2_to_hildaplus"
    units: str | None = None
    time_units: str | None = None
    cell_degrees: float | None = None
    weights: Literal["area", "cells"] = "area"


class SharesConfig(_Model):
    """Coarse class shares of a map product; see :func:`ai4land.scenario.shares.open_shares`."""

    kind: Literal["shares"]
    path: str
    variable: str
    crosswalk: str = "identity"
    weights: Literal["area", "cells"] = "cells"


class FractionsFile(_Model):
    """One file of :class:`FractionsConfig`: of one ``year``, or of the years along ``year_dim``."""

    path: str
    year: int | None = None
    year_dim: str | None = None
    select: dict[str, str | int] = Field(default={}, description="what to take along the other dimensions, such as rcp and gcm")

    @model_validator(mode="after")
    def _years(self) -> FractionsFile:
        if (self.year is None) == (self.year_dim is None):
            raise ValueError(f"file {self.path} needs either year, or year_dim, the dimension of its years")
        return self


class FractionsConfig(_Model):
    """Fractions of some land uses, one variable each; see :func:`ai4land.scenario.fractions.open_fractions`."""

    kind: Literal["fractions"]
    files: list[FractionsFile] = Field(min_length=1)
    states: dict[str, str] = Field(min_length=1, description="variable of each state")
    remainder: str = Field(default="other", description="state that takes what the others leave of the cell")
    interpolate: bool = Field(default=False, description="make years between those of the files linearly")
    mask: bool = Field(default=False, description="map only the coarse cells that the files know")
    crosswalk: str
    weights: Literal["area", "cells"] = "area"


class ChangeConfig(_Model):
    """Coarse yearly change of class areas on top of the map of ``base_year``; see :func:`ai4land.scenario.areachange.open_change`."""

    kind: Literal["change"]
    paths: dict[int, str]
    base_year: int
    merge: bool = Field(default=True, description="land without data takes part in the change of the cell it was merged into")
    crosswalk: str = "identity"
    weights: Literal["area", "cells"] = "area"


class StaticLayer(_Model):
    """One static map: a raster file (``path``) or an asset of a STAC collection (``catalog``, ``collection``, ``asset``)."""

    name: str = Field(pattern=r"^[A-Za-z0-9_]+$")
    path: str | None = None
    band: int | str | None = None
    variable: str | None = None
    catalog: str | None = None
    collection: str | None = None
    asset: str | None = None
    categorical: bool = False
    resampling: Literal["exact", "nearest", "bilinear", "average", "mode", "min", "max"] | None = None

    @model_validator(mode="after")
    def _source(self) -> StaticLayer:
        stac = (self.catalog, self.collection, self.asset)
        if (self.path is None) == (stac == (None, None, None)) or (self.path is None and None in stac):
            raise ValueError(f"static layer {self.name} needs either a path, or catalog, collection and asset")
        if self.categorical and self.resampling in ("bilinear", "average"):
            raise ValueError(
                f"static layer {self.name} is categorical with resampling {self.resampling}, expected nearest, mode or exact"
            )
        return self

    @property
    def method(self) -> str:
        """Resampling onto the grid; default: nearest for categories, bilinear otherwise."""
        return self.resampling or ("nearest" if self.categorical else "bilinear")


class Coordinate(_Model):
    """The latitude or the longitude of each cell as a static map, in degrees (units of ``grid.crs``)."""

    name: str = Field(pattern=r"^[A-Za-z0-9_]+$")
    coordinate: Literal["latitude", "longitude"]

    @property
    def categorical(self) -> bool:
        """A coordinate is a number."""
        return False


def _layer_kind(value: Any) -> str:
    return "coordinate" if isinstance(value, Coordinate) or (isinstance(value, dict) and "coordinate" in value) else "layer"


Static = Annotated[Annotated[StaticLayer, Tag("layer")] | Annotated[Coordinate, Tag("coordinate")], Discriminator(_layer_kind)]


class Experiment(_Model):
    """Years to score, and the year of the map that they are predicted from; None: without a reference map."""

    reference: int | None
    years: Years


class SpaceConfig(_Model):
    """Hold whole blocks of coarse cells out of training."""

    block: int = Field(default=4, ge=1, description="coarse cells along the side of a block")
    validation: float = Field(default=0.1, ge=0, lt=1)
    test: float = Field(default=0.2, ge=0, lt=1)
    buffer: int = Field(default=1, ge=0, description="coarse cells around held-out blocks that nothing uses")


class SplitConfig(_Model):
    """Which cells and years train, validate and test."""

    train: Years
    max_lead: int = Field(default=10, ge=0, description="longest lead of a training pair in years; 0: only a year with itself")
    backward: bool = Field(default=True, description="train on pairs that go back in time too")
    validation: Experiment | None = None
    test: Experiment | None = None
    space: SpaceConfig | None = None


class ModelConfig(_Model):
    """Size of the U-Net."""

    base: int = Field(default=16, ge=1)
    depth: int = Field(default=3, ge=1, le=5)
    coarse_features: int = Field(default=16, ge=1)


class TrainConfig(_Model):
    """How long and how the network learns."""

    members: int = Field(default=1, ge=1, description="networks, alike but for their seed, whose log probabilities are averaged")
    steps: int = Field(default=1000, ge=1)
    batch: int = Field(default=16, ge=1)
    patch: int = Field(default=128, ge=8, description="fine cells along the side of a patch")
    learning_rate: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    warmup: int = Field(default=50, ge=0)
    clip: float = Field(default=1.0, gt=0)
    ema: float = Field(default=0.99, ge=0, lt=1)
    change_weight: float = Field(default=5.0, ge=1, description="weight of a cell that changes, against one that stays")
    totals_share: float = Field(default=1.0, ge=0, le=1, description="share of the loss with the coarse totals imposed")
    class_balance: float = Field(default=0.0, ge=0, le=1, description="class weights are frequency to the minus this power")
    mix: int = Field(
        default=8, ge=1, description="shards that the patches of 16 steps are drawn from; the more, the more alike the steps"
    )
    position: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(),
        description="wavelengths, in units of the grid, of the place that the network sees; none: it does not see where it is",
    )
    mask_all: float = Field(default=0.1, ge=0, le=1, description="share of patches that do not see the reference map")
    mask_some: float = Field(default=0.1, ge=0, le=1, description="share of patches that see it with holes")
    disturb: float = Field(default=0.0, ge=0, le=1, description="share of the reference map's cells that is changed at random")
    focus: float = Field(default=0.5, ge=0, le=1, description="share of patches drawn by their cells that change")
    turn: bool = Field(default=True, description="show patches mirrored and turned at random")
    validate_every: int = Field(default=100, ge=1)
    validation_batches: int = Field(default=8, ge=1)
    patience: int = Field(default=10, ge=1, description="validations without improvement before training stops")
    checkpoint_every: int = Field(default=100, ge=1)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int | None = Field(default=None, description="of a worker; default: the cores of its job, or this machine's, shared")
    seed: int = 0
    workers: int = Field(default=1, ge=1, description="processes that share every batch, each on a GPU or on cores of its own")
    timeout: float = Field(
        default=300, gt=0, description="seconds that a worker may keep the others waiting before it is given up"
    )
    wait: float = Field(
        default=60, ge=0, description="seconds to wait for the rest of the workers before training goes on with fewer"
    )
    leave: float = Field(
        default=300, ge=0, description="seconds before the end of a SLURM job at which training is saved and left"
    )


HOW_TRAINED = {"workers", "timeout", "wait", "leave"}
"""Training settings that change the weights only by rounding; training may resume with different ones."""


class ConstrainConfig(_Model):
    """How the published map meets the scenario's totals; see :mod:`ai4land.constrain.totals` and :mod:`ai4land.constrain.walk`."""

    method: Literal["change", "level", "none"] = Field(
        default="change",
        description="the scenario's change on top of the reference map (without one: its level), its level, or nothing",
    )
    keep: float | None = Field(
        default=None, ge=0, description="preference for the class before, as log odds; none: only net change"
    )
    settle: int = Field(default=5, ge=0, description="years in which a cell does not go back to a class that it left")
    lock: list[int] = Field(default=[], description="class codes that keep their cells, such as water and ice")
    protected: str | None = Field(default=None, description="static map whose cells above 0.5 keep their class")


class ReconstructConfig(_Model):
    """Years to predict, the reference map (None: without one) and the workers."""

    reference: int | None
    years: Years
    cube: str | None = Field(
        default=None,
        description="folder or URL (s3://…) of the cube, its name ending in .zarr; default: cube.zarr in the run's folder",
    )
    part: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_-]+$",
        description="name of the part of the cube that this run makes, such as historical or ssp126; default: the cube is this run's alone",
    )
    years_a_shard: int = Field(
        default=10, ge=1, le=100, description="years that lie in one shard of the cube, a file or object: 1 or an even number"
    )
    workers: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, description="threads of a worker; default: the cores shared by the workers")
    at_once: int | None = Field(
        default=None,
        ge=1,
        description="blocks that a worker has in hand, a thread each (on a CUDA device one at a time is in the network); "
        "default: 2, or 1 where a worker has one thread",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="of the network; auto: bfloat16 where the model's card allows it and the device gains by it"
    )

    @model_validator(mode="after")
    def _cube(self) -> ReconstructConfig:
        if self.years_a_shard > 1 and self.years_a_shard % 2:
            raise ValueError(f"years_a_shard is {self.years_a_shard}, expected 1 or an even number; try {self.years_a_shard + 1}")
        if self.cube is not None and not self.cube.rstrip("/").endswith(".zarr"):
            raise ValueError(f"cube is {self.cube!r}, expected a name that ends in .zarr; the ledger goes beside it as .ledger")
        return self

    @property
    def cores(self) -> int:
        """Threads of a worker on this machine."""
        from dask.system import CPU_COUNT

        return self.threads or max(1, CPU_COUNT // self.workers)

    @property
    def hands(self) -> int:
        """Blocks in flight per worker on this machine."""
        return self.at_once or min(2, self.cores)


class EvaluateConfig(_Model):
    """How the evaluation is done."""

    boosting: int = Field(default=60000, ge=0, description="cells that the gradient-boosting rival is fitted on; 0: without it")
    block: int = Field(default=2, ge=1, description="coarse cells along the side of a block of the bootstrap")


class RunConfig(_Model):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    title: str = ""
    runs: Folder = "runs"
    data: Folder = "."
    cluster: str = Field(
        default="local",
        description="what trains and maps: local, slurm, allocation (the tasks of this srun), or the address of a Dask scheduler (tcp://…)",
    )
    seed: int = 0
    sources: list[str] = Field(
        default=[],
        description="input catalogue ids of what this run is made from; their licences and citations go into its results",
    )
    grid: GridConfig
    landcover: LandCoverConfig
    scenario: Annotated[Luh2Config | SharesConfig | FractionsConfig | ChangeConfig, Field(discriminator="kind")]
    static: list[Static] = Field(min_length=1)
    split: SplitConfig
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    constrain: ConstrainConfig = ConstrainConfig()
    reconstruct: ReconstructConfig
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        names = [layer.name for layer in self.static]
        if len(set(names)) != len(names):
            raise ValueError(f"static layers are named {names}, expected each name once")
        stride = 2**self.model.depth
        for what, size in (("grid.shard", self.grid.shard), ("train.patch", self.train.patch)):
            if size % stride:
                raise ValueError(
                    f"{what} is {size}, expected a multiple of {stride} (2 to the power of model.depth={self.model.depth}); "
                    f"try {stride * max(1, round(size / stride))}"
                )
        if self.train.workers > self.train.batch:
            raise ValueError(f"train.workers is {self.train.workers}, expected at most train.batch={self.train.batch}")
        if self.train.patch > self.grid.shard:
            raise ValueError(f"train.patch is {self.train.patch}, expected at most the shard of {self.grid.shard} fine cells")
        if self.constrain.protected is not None and self.constrain.protected not in names:
            raise ValueError(f"constrain.protected is {self.constrain.protected!r}, expected a static map of {names}")
        parts = {"split.validation": self.split.validation, "split.test": self.split.test, "reconstruct": self.reconstruct}
        without = [name for name, part in parts.items() if part is not None and part.reference is None]
        if without and self.train.mask_all == 0:
            raise ValueError(
                f"train.mask_all is 0, expected more, because {without} have no reference map and the network must learn to do "
                "without; set train.mask_all, to 1 where nothing has one"
            )
        return self

    @property
    def folder(self) -> Path:
        """Folder of the results."""
        return Path(self.runs) / self.name

    def path(self, value: str) -> str:
        """Resolve a path of the run file against ``data``; a ``file://`` URL becomes a path, other URLs stay."""
        value = plain_path(value)
        return value if "://" in value or Path(value).is_absolute() else str(Path(self.data) / value)

    def file(self, value: str) -> Path:
        """Resolve the path of an input that must be on this machine.

        Raises
        ------
        ConfigError
            If it is a remote URL.
        """
        path = self.path(value)
        if "://" in path:
            raise ConfigError(f"input is {value}, expected a file on this machine; fetch it and give its path")
        return Path(path)

    def fingerprint(self, *sections: str) -> str:
        """Hash the named sections: equal hashes mean equal settings."""
        values = self.model_dump(mode="json")
        return digest({name: values[name] for name in sections})

    def save(self, path: Path) -> None:
        """Write the resolved run as YAML, unless the file already says the same."""
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
