"""Workers on this machine: what they start with, and that none is left."""

import os

import dask
import psutil
import pytest
from distributed import Client, LocalCluster

from ai4land.errors import ConfigError
from ai4land.workers.cluster import connect, local
from ai4land.workers.srun import allocation
from tests.strangers import assert_strangers_are_refused


def surroundings() -> tuple[str | None, str | None, str]:
    """Tell what a worker starts with; it runs there."""
    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX")
    return *(os.environ.get(name) for name in names), dask.config.get("distributed.worker.profile.interval")


def test_workers_start_with_our_settings_also_anew_and_leave_dask_as_it_was(monkeypatch):
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    before = dask.config.get("distributed.nanny.pre-spawn-environ")
    with local(1, dashboard=False) as client:
        assert list(client.run(surroundings).values()) == [(None, "1", "500ms")]
        assert dask.config.get("distributed.nanny.pre-spawn-environ") == before
        client.restart()
        assert list(client.run(surroundings).values()) == [(None, "1", "500ms")]


def test_settings_can_be_those_of_dask():
    with local(1, dashboard=False, settings={}) as client:
        assert [interval for *_, interval in client.run(surroundings).values()] == ["10ms"]


def test_workers_listen_on_the_loopback_and_end_with_the_block():
    before = dask.config.get("distributed.deploy.lost-worker-timeout")
    with local(2, threads=3) as client:
        assert dask.config.get("distributed.deploy.lost-worker-timeout") == "5 minutes"  # as long as it is there
        info = client.scheduler_info(n_workers=-1)["workers"]
        assert len(info) == 2
        assert all(address.startswith("tls://127.0.0.1:") and w["nthreads"] == 3 for address, w in info.items())
        assert "127.0.0.1" in client.dashboard_link
        pids = list(client.run(os.getpid).values())
    assert dask.config.get("distributed.deploy.lost-worker-timeout") == before
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def test_another_user_of_the_machine_is_refused_by_scheduler_and_workers():
    with local(1, dashboard=False) as client:
        (worker,) = client.scheduler_info(n_workers=-1)["workers"].items()
        for address in (client.scheduler.address, worker[0], worker[1]["nanny"]):
            assert_strangers_are_refused(address)
        assert client.submit(sum, [1, 2]).result() == 3


SHAPE = {"workers": 1, "threads": 1, "cores": 1, "memory": 1e9}


def test_a_scheduler_that_is_there_is_joined_and_left_running(tmp_path):
    told: list[str] = []
    with (
        LocalCluster(1, processes=False, protocol="tcp://", dashboard_address=None) as cluster,
        Client(cluster, set_as_default=False) as owner,
    ):
        with connect(cluster.scheduler_address, **SHAPE, folder=tmp_path, tell=told.append) as client:
            assert client.submit(sum, [1, 2]).result() == 3
        assert len(told) == 1 and owner.submit(sum, [2, 2]).result() == 4


def test_a_cluster_that_is_none_is_refused(tmp_path):
    refused = pytest.raises(ConfigError, match=r"'marenostrum', expected local, slurm, allocation or the address")
    with refused, connect("marenostrum", **SHAPE, folder=tmp_path, tell=print):
        pass


def test_an_allocation_is_begun_by_srun(tmp_path, monkeypatch):
    for name in ("SLURM_PROCID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    refused = pytest.raises(ConfigError, match=r"no task of srun.*srun -n 4 ai4land run")
    with refused, allocation(folder=tmp_path, threads=1, settings={}, tell=print):
        pass
    with (
        pytest.raises(ConfigError, match=r"no scheduler is there.*srun"),
        connect("allocation", **SHAPE, folder=tmp_path, tell=print),
    ):
        pass
    assert not list(tmp_path.iterdir())
