"""Accounts and QoS on a real SLURM that keeps accounts (`make test-slurm`): slurmdbd on a private database."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import dask
import pytest

from ai4land.errors import ConfigError
from ai4land.workers.cluster import SETTINGS
from ai4land.workers.jobs import queue
from ai4land.workers.slurm import slurm
from tests.slurm import DAEMONS, JOBS, start_slurm, workers_of
from tests.waiting import until

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def accounting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A SLURM cluster that knows the account bsc99 and its QoS acc_bscls and acc_debug (one job at a time)."""
    needs = (*DAEMONS, "slurmdbd", "mariadbd", "mariadb-install-db")
    with pytest.MonkeyPatch.context() as patch:
        for env in start_slurm(tmp_path_factory.mktemp("accounting"), needs=needs, SLURM_LOCAL_ACCOUNTING="1"):
            for name, value in {**env, **JOBS}.items():
                patch.setenv(name, value)
            import dask_jobqueue  # noqa: F401  # its settings come with it and would go with ours

            with dask.config.set({"jobqueue.slurm.interface": "lo", "jobqueue.slurm.account": "bsc99"}):
                yield


@pytest.fixture
def jobs(accounting: None, tmp_path: Path):
    told: list[str] = []

    def start(count: int):
        shape = {"threads": 1, "cores": 1, "memory": 1e9, "every": 0.3}
        return slurm(count, folder=tmp_path, settings=SETTINGS, tell=told.append, **shape)

    start.told = told
    yield start
    until(lambda: not queue())


def qos(name: str) -> dict[str, object]:
    return {"jobqueue.slurm.job-extra-directives": [f"--qos={name}"]}


@pytest.mark.parametrize(
    ("settings", "directive"),
    [({"jobqueue.slurm.account": "bsc00"}, "#SBATCH -A bsc00"), (qos("acc_nope"), "#SBATCH --qos=acc_nope")],
)
def test_wrong_account_or_qos_is_refused_at_once_with_its_directive(jobs, settings, directive):
    begin = time.monotonic()
    with dask.config.set(settings), pytest.raises(ConfigError, match=r"SLURM refuses the jobs: .*nvalid") as error, jobs(1):
        pass
    assert time.monotonic() - begin < 30
    assert f"because of {directive}; change it" in str(error.value)
    assert not queue()


def test_right_account_and_qos_get_workers(jobs):
    with dask.config.set(qos("acc_bscls")), jobs(2) as client:
        client.wait_for_workers(2, timeout=60)
        assert client.submit(sum, [1, 2]).result() == 3
        assert list(queue("%a|%q").values()) == [["bsc99", "acc_bscls"]] * 2


def test_jobs_beyond_the_limit_of_the_qos_are_told_and_the_rest_works(jobs):
    with dask.config.set(qos("acc_debug")), jobs(2) as client:
        client.wait_for_workers(1, timeout=60)
        until(lambda: any("1 jobs could not be submitted (" in line and "limit" in line for line in jobs.told))
        assert client.submit(sum, [1, 2]).result() == 3
        time.sleep(3)
        assert len(workers_of(client)) == len(queue()) == 1
    assert sum("could not be submitted" in line for line in jobs.told) == 1
