"""A private SLURM cluster on this machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

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


def squeue(form: str, *options: str) -> list[str]:
    """Ask SLURM for jobs in any state, a line each."""
    done = subprocess.run(["squeue", "-h", "-o", form, *options], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.split("\n")[:-1]


def workers_of(client: Client) -> dict[str, Any]:
    """Describe the workers that a client has, by address."""
    return client.scheduler_info(n_workers=-1)["workers"]
