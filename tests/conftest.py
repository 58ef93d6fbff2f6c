"""Shared fixtures. Two cores: every test keeps its own thread count low."""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import dask
import numpy as np
import pystac
import pytest
import xarray as xr
from distributed import Client
from proxy import Proxy
from pystac.stac_io import DefaultStacIO
from pystac.validation.stac_validator import JsonSchemaSTACValidator
from scipy import ndimage

from ai4land import stores
from ai4land.align import write_store
from ai4land.cluster import SETTINGS
from ai4land.grid import COARSE_DIMS, Grid, block_sum, make_grid
from ai4land.legend import Legend, load_legend
from ai4land.materialise import Layer, of_array
from ai4land.slurm import slurm

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real test data, from ``AI4LAND_TEST_DATA`` or beside the project; skips where it is absent."""
    folder = Path(os.environ.get("AI4LAND_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real test data not found at {folder}; set AI4LAND_TEST_DATA")
    return folder


@pytest.fixture(scope="module")
def schemas() -> Iterator[JsonSchemaSTACValidator]:
    """A validator of STAC that finds the extensions' schemas in a folder, from ``AI4LAND_STAC_SCHEMAS`` or beside the project; skips where it is absent."""
    folder = Path(os.environ.get("AI4LAND_STAC_SCHEMAS", ROOT.parent / "shared" / "stac-schemas"))
    if not folder.is_dir():
        pytest.skip(f"STAC schemas not found at {folder}; set AI4LAND_STAC_SCHEMAS")

    class Offline(DefaultStacIO):
        def read_text_from_href(self, href, **more):
            if href.startswith("https://"):
                return (folder / href.split("://")[1].split("#")[0]).read_text(encoding="utf-8")
            return super().read_text_from_href(href, **more)

    before = pystac.StacIO.default
    pystac.StacIO.set_default(Offline)
    yield JsonSchemaSTACValidator()
    pystac.StacIO.default = before


@dataclass(frozen=True)
class TinyStore:
    """A global analysis-ready store small enough to train and map in a second."""

    path: Path
    grid: Grid
    legend: Legend
    years: tuple[int, ...]


def write_tiny_store(
    path: Path, *, shard: int = 32, years: tuple[int, ...] = (2000, 2001, 2002, 2003), seed: int = 0
) -> TinyStore:
    """Write a store of 64 x 128 fine cells (factor 8): smooth random land cover that drifts, two static maps, 7 states."""
    rng = np.random.default_rng(seed)
    grid = make_grid((-180, -90, 180, 90), coarse_cell=22.5, factor=8, shard=shard)
    legend = load_legend("hildaplus")
    noise = rng.standard_normal((legend.n, *grid.shape))
    noise = ndimage.gaussian_filter(noise, (0, 3, 3), mode=("nearest", "nearest", "wrap"))
    noise /= noise.std()
    trend = np.linspace(-1, 1, legend.n)[:, None, None] * 0.3
    land = ndimage.gaussian_filter(rng.standard_normal(grid.shape), 5, mode=("nearest", "wrap")) > -0.02
    land[:, 32:64] &= np.arange(64)[:, None] < 32
    maps = {y: legend.decode(np.where(land, (noise + i * trend).argmax(0), 255).astype(np.uint8)) for i, y in enumerate(years)}
    index = {y: legend.encode(m) for y, m in maps.items()}
    shares = (
        np.stack([[block_sum((index[y] == k).astype(float), grid.factor) for k in range(legend.n)] for y in years])
        / grid.factor**2
    )
    coords = grid.coords()
    coarse = xr.DataArray(
        shares.astype(np.float32),
        dims=("year", "state", *COARSE_DIMS),
        coords={"year": list(years), "state": [str(c) for c in legend.codes], **{d: coords[d] for d in COARSE_DIMS}},
    )
    layers = [
        Layer("height", False, of_array(noise[0].astype(np.float32) * 100)),
        Layer("zone", True, of_array((noise[1] > 0).astype(np.float32) + 1)),
    ]
    write_store(
        path,
        grid=grid,
        legend=legend,
        mask=of_array(land),
        maps={year: of_array(codes) for year, codes in maps.items()},
        coarse=coarse,
        layers=layers,
        identity={"made": "by the tests"},
    )
    return TinyStore(path, grid, legend, years)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> TinyStore:
    return write_tiny_store(tmp_path_factory.mktemp("tiny") / "store.zarr")


# -- SLURM --------------------------------------------------------------------------------------------------------------

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
JOBS = {"DASK_JOBQUEUE__SLURM__INTERFACE": "lo", "DASK_JOBQUEUE__SLURM__WALLTIME": "00:10:00"}
"""What a command line in a process of its own needs to submit jobs here."""


def start_slurm(home: Path, *, needs: tuple[str, ...] = DAEMONS, **setting: str) -> Iterator[dict[str, str]]:
    """Start a private SLURM cluster, give the environment that its commands need, and stop it."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in needs if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"SLURM is not installed ({', '.join(missing)}): make test-slurm installs it")
    script = Path(__file__).with_name("slurm_local.sh")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1] % 20000 + 10000
    setting = {
        "SLURM_LOCAL_HOME": str(home),
        "SLURM_LOCAL_PORT": str(port),
        "SLURM_LOCAL_GPUS_PER_NODE": "2",
        "SLURM_LOCAL_CPUS": "4",
        **setting,
    }
    env = {**os.environ, **setting}
    subprocess.run([script, "start"], check=True, env=env, timeout=60)
    try:
        yield {"SLURM_CONF": str(home / "etc" / "slurm.conf"), **setting}
    finally:
        subprocess.run([script, "stop"], check=True, env=env, timeout=120)


@pytest.fixture(scope="session")
def _slurm_started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    yield from start_slurm(tmp_path_factory.mktemp("slurm"))


@pytest.fixture
def slurm_cluster(_slurm_started: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder of a real SLURM cluster of this session: two nodes of 4 CPUs and 2 GPUs, and one without; without jobs afterwards."""
    for name, value in {**_slurm_started, **JOBS}.items():
        monkeypatch.setenv(name, value)
    importlib.import_module("dask_jobqueue")  # its settings come with it and would go with ours
    with dask.config.set({"jobqueue.slurm.interface": "lo", "jobqueue.slurm.walltime": "00:10:00"}):
        yield Path(_slurm_started["SLURM_LOCAL_HOME"])
    subprocess.run(["scancel", "--me"], check=True, timeout=60)
    until(lambda: not squeue("%i"))


@pytest.fixture
def jobs(slurm_cluster: Path, tmp_path: Path) -> Any:
    """Start workers as jobs of this cluster; ``jobs.told`` is what was told."""
    told: list[str] = []

    def start(count: int, **others: Any) -> AbstractContextManager[Client]:
        shape = {"threads": 1, "cores": 1, "memory": 1e9, "every": 0.5} | others
        return slurm(count, folder=tmp_path, settings=SETTINGS, tell=told.append, **shape)

    start.told = told  # type: ignore[attr-defined]
    return start


def squeue(form: str, *options: str) -> list[str]:
    """Ask SLURM for jobs in any state, a line each."""
    done = subprocess.run(["squeue", "-h", "-o", form, *options], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.split("\n")[:-1]


def until(what: Callable[[], Any], *, seconds: float = 60.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come to hold")


def workers_of(client: Client) -> dict[str, Any]:
    """Describe the workers that a client has, by address."""
    return client.scheduler_info(n_workers=-1)["workers"]


# -- S3 -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _s3_started() -> Iterator[Proxy]:
    """A real S3 endpoint (moto) behind a proxy that can fail; what it holds is gone with it."""
    pytest.importorskip("moto")
    pytest.importorskip("obstore")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    proxy = Proxy(port)
    try:
        until(lambda: _listens(port))
        yield proxy
    finally:
        proxy.close()
        server.kill()
        server.wait()


def _listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def s3(_s3_started: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The proxy of an S3 endpoint that ``s3://`` means in this test."""
    for name, value in s3_environment(_s3_started).items():
        monkeypatch.setenv(name, value)
    _s3_started.mode = "pass"
    stores._remote.cache_clear()
    yield _s3_started
    _s3_started.mode = "pass"
    stores._remote.cache_clear()


def s3_environment(proxy: Proxy) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }


@pytest.fixture
def bucket(s3: Proxy) -> str:
    """URL of an empty bucket."""
    import boto3

    name = f"b{time.monotonic_ns()}"
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name="us-east-1")
    client.create_bucket(Bucket=name)
    return f"s3://{name}"
