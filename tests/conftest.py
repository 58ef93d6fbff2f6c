"""Shared fixtures. Two cores: every test keeps its own thread count low."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import dask
import numpy as np
import pystac
import pytest
from affine import Affine
from distributed import Client
from pystac.stac_io import DefaultStacIO
from pystac.validation.stac_validator import JsonSchemaSTACValidator

from ai4land import places
from ai4land.model.checkpoint import save_model
from ai4land.synthetic.planet import make_planet
from ai4land.workers.cluster import SETTINGS
from ai4land.workers.slurm import slurm
from tests import ROOT
from tests.catalogs import GRID, VALUES, ZONES, make_item, save, write_cog
from tests.gangs import client, lessons, unbroken  # noqa: F401 fixtures
from tests.models import card, network
from tests.proxy import Proxy, s3_environment
from tests.published import GRID as RELIEF
from tests.runs import TINY, TINY_YEARS, ai4land, write_run
from tests.slurm import JOBS, squeue, start_slurm
from tests.stores import TinyStore, write_tiny_store
from tests.waiting import until


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


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> TinyStore:
    return write_tiny_store(tmp_path_factory.mktemp("tiny") / "store.zarr")


# -- SLURM --------------------------------------------------------------------------------------------------------------


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
    places._remote.cache_clear()
    yield _s3_started
    _s3_started.mode = "pass"
    places._remote.cache_clear()


@pytest.fixture
def bucket(s3: Proxy) -> str:
    """URL of an empty bucket."""
    import boto3

    name = f"b{time.monotonic_ns()}"
    boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name="us-east-1").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A catalogue in a folder with a blank: terrain in two halves of other years, soil as one."""
    root = tmp_path_factory.mktemp("my world")
    half = GRID.shape[1] // 2
    items = []
    for name, cut, year in (("west", slice(0, half), 2000), ("east", slice(half, None), 2005)):
        t = GRID.fine.affine * Affine.translation(cut.start, 0)
        files = {
            "elevation": write_cog(root / f"h_{name}.tif", VALUES[:, cut], t, nodata=np.nan),
            "zone": write_cog(root / f"z_{name}.tif", ZONES[:, cut], t, nodata=0),
        }
        extra = {"elevation": {"nodata": "nan", "data_type": "float32"}, "zone": {"nodata": 0, "data_type": "uint8"}}
        items.append(make_item(name, files, t, VALUES[:, cut].shape, year=year, extra=extra))
    fine = np.kron(np.nan_to_num(VALUES), np.ones((4, 4), "float32")) + np.tile(
        np.float32([[0, 8], [8, 0]]), 2 * np.array(GRID.shape)
    )
    t = GRID.fine.affine * Affine.scale(0.25)
    soil = make_item("globe", {"depth": write_cog(root / "soil.tif", fine, t)}, t, fine.shape, projection=False)
    return save(root, {"terrain": items, "soil": [soil]})


@pytest.fixture
def saved(tmp_path) -> Path:
    net = network()
    save_model(tmp_path / "model", [net.state_dict()], card(net))
    return tmp_path / "model"


@pytest.fixture(scope="session")
def planet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_planet(tmp_path_factory.mktemp("planet") / "p", coarse_cell=15.0, factor=8, years=range(2000, 2008)).folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was finished on this machine alone."""
    planet = make_planet(tmp_path_factory.mktemp("planet") / "p", coarse_cell=15.0, factor=8, years=TINY_YEARS).folder
    file = write_run(tmp_path_factory.mktemp("whole"), planet, **TINY)
    ai4land("run", file)
    return file


@pytest.fixture(scope="module")
def terrain(tmp_path_factory) -> Path:
    """A catalogue that a static map comes from, with a licence and a producer."""
    root = tmp_path_factory.mktemp("terrain")
    t, values = RELIEF.fine.affine, np.ones(RELIEF.shape, np.float32)
    item = make_item("globe", {"height": write_cog(root / "h.tif", values, t)}, t, RELIEF.shape)
    catalog = save(root, {"relief": [item]})
    path = catalog.parent / "relief" / "collection.json"
    said = json.loads(path.read_text())
    said |= {
        "license": "CC-BY-4.0",
        "title": "Relief",
        "providers": [{"name": "Hill Survey", "roles": ["host"], "url": "javascript:x"}],
    }
    said["links"].append({"rel": "license", "href": "https://example.org/terms"})
    path.write_text(json.dumps(said))
    return catalog
