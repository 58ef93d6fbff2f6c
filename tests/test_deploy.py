"""The files for clusters: what they make of a job, whether Dask, bash and SLURM take them, and an installation without internet."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import dask
import dask_jobqueue
import distributed
import pytest
import yaml

from ai4land.errors import ConfigError
from ai4land.workers.cluster import SETTINGS
from ai4land.workers.slurm import slurm
from tests import ROOT
from tests.slurm import squeue, start_slurm
from tests.waiting import until

DEPLOY = ROOT / "deploy"
MN5 = DEPLOY / "mn5"
JOBQUEUES = sorted(MN5.glob("jobqueue-*.yaml"))
SCRIPTS = sorted(p for p in DEPLOY.rglob("*") if p.suffix in (".sh", ".sbatch"))
BATCH = sorted(MN5.glob("*.sbatch"))
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def keys_of(value, *above: str):
    """Every setting of a configuration, as a path of keys and its value."""
    if not isinstance(value, dict) or not value:
        yield above, value
        return
    for key, below in value.items():
        yield from keys_of(below, *above, key)


def configuration(file: Path):
    """Dask as if ``DASK_CONFIG`` named a file, for a while; but for the interface, which this machine lacks."""
    settings = {".".join(path): value for path, value in keys_of(yaml.safe_load(file.read_text()))}
    assert settings["jobqueue.slurm.interface"] == "ib0"
    return dask.config.set({**settings, "jobqueue.slurm.interface": "lo"})


# -- jobs of Dask -------------------------------------------------------------------------------------------------------

ACC = """\
#SBATCH -J ai4land
#SBATCH -e FOLDER/ai4land-%J.err
#SBATCH -o FOLDER/ai4land-%J.out
#SBATCH -A bsc32
#SBATCH -n 1
#SBATCH --cpus-per-task=20
#SBATCH -t 12:00:00
#SBATCH --qos=acc_bsces
#SBATCH --gres=gpu:1
#SBATCH --comment='FOLDER tls://ADDRESS'
source "${AI4LAND_ENV:?is not set; source mn5/env.sh before the run}"
export DASK_INTERNAL_INHERIT_CONFIG=SETTINGS
PYTHON -m distributed.cli.dask_worker tls://ADDRESS --name dummy-name --nthreads 6 --memory-limit 116.42GiB --nanny \
--death-timeout 300 --local-directory "${TMPDIR:-/tmp}" --lifetime 42780s --lifetime-stagger 300s --interface lo --protocol tls:// \
--tls-ca-file FOLDER/CERTIFICATE --tls-cert FOLDER/CERTIFICATE --tls-key FOLDER/CERTIFICATE
"""
GPP = (
    ACC.replace("=20", "=28")
    .replace("12:00:00", "1-00:00:00")
    .replace("#SBATCH --qos=acc_bsces\n#SBATCH --gres=gpu:1\n", "#SBATCH --qos=gp_bsces\n")
    .replace("116.42GiB", "52.15GiB")
    .replace("42780s", "85980s")
)


@pytest.fixture
def submitted(monkeypatch, tmp_path):
    """What ``cluster: slurm`` would submit; without SLURM: its commands here refuse every job and keep the first."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, does in (("sbatch", f'[ -e {bin_}/seen ] || cp "$2" {bin_}/seen; exit 1'), ("squeue", "exit 0")):
        (bin_ / name).write_text(f"#!/bin/sh\n{does}\n")
        (bin_ / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")

    def script(file: Path) -> str:
        shape = {"threads": 6, "cores": 2, "memory": 1e9, "folder": tmp_path, "settings": SETTINGS, "tell": print}
        with configuration(file), pytest.raises(ConfigError, match="SLURM refuses"), slurm(3, **shape):
            pass
        text = (bin_ / "seen").read_text()
        (bin_ / "seen").unlink()
        return text

    return script


@pytest.mark.parametrize(("name", "expected"), [("acc", ACC), ("gpp", GPP)])
def test_a_job_on_marenostrum5_is_as_written_here(submitted, tmp_path, name, expected):
    text = submitted(MN5 / f"jobqueue-{name}.yaml").replace(str(tmp_path / "slurm"), "FOLDER").replace(sys.executable, "PYTHON")
    for pattern, put in (
        (r"tls://[\d.]+:\d+", "tls://ADDRESS"),
        (r"(?<=INHERIT_CONFIG=)\S+", "SETTINGS"),
        (r"(?<=FOLDER/)\.dask-jobqueue\.worker\.\w+\.\w+", "CERTIFICATE"),
    ):
        text = re.sub(pattern, put, text)
    assert text == "#!/usr/bin/env bash\n\n" + expected


@pytest.mark.parametrize("file", JOBQUEUES, ids=lambda p: p.stem)
def test_dask_knows_every_setting(file):
    known = {}
    for source in (dask_jobqueue, distributed):
        for path in Path(source.__file__).parent.glob("*.yaml"):
            known |= yaml.safe_load(path.read_text()) if "properties" not in path.read_text() else {}
    paths = {path[:n] for path, _ in keys_of(known) for n in range(1, len(path) + 1)}
    ours = [path for path, _ in keys_of(yaml.safe_load(file.read_text()))]
    assert [path for path in ours if path not in paths] == []
    renamed = {"extra", "job-extra", "env-extra", "header-skip", "project"}
    assert not renamed & {path[-1] for path in ours}


def test_settings_beyond_the_job_are_the_same_for_all_jobs():
    first, *others = (yaml.safe_load(file.read_text()) for file in JOBQUEUES)
    assert len(others) == 2 and all(o["distributed"] == first["distributed"] for o in others)
    assert dask.utils.parse_timedelta(first["distributed"]["deploy"]["lost-worker-timeout"]) >= 60


def test_a_job_of_a_whole_node_has_a_worker_for_each_gpu(submitted):
    script = submitted(MN5 / "jobqueue-acc-node.yaml")
    assert "#SBATCH --gres=gpu:4\n" in script and "#SBATCH --cpus-per-task=80\n" in script
    assert " --nthreads 6 --memory-limit 116.42GiB --nworkers 4 --nanny " in script


def test_cores_and_memory_are_a_share_of_the_node():
    for name, gpus, share in (("acc", 1, 4), ("acc-node", 4, 1)):
        job = yaml.safe_load((MN5 / f"jobqueue-{name}.yaml").read_text())["jobqueue"]["slurm"]
        assert f"--gres=gpu:{gpus}" in job["job-extra-directives"]
        assert job["job-cpu"] == 20 * gpus == 80 // share and job["processes"] == gpus
        assert dask.utils.parse_bytes(job["memory"]) * share <= 512e9


# -- scripts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda p: p.name)
def test_bash_can_read_it(file):
    subprocess.run(["bash", "-n", file], check=True)
    if file.name != "env.sh":  # which is sourced into other shells
        assert "\nset -euo pipefail\n" in file.read_text()


@pytest.fixture
def venv(tmp_path):
    """What an installation looks like to env.sh: the Python of these tests, and other commands as a test wants them."""
    (bin_ := tmp_path / "venv" / "bin").mkdir(parents=True)

    def put(name: str, text: str) -> None:
        (bin_ / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin_ / name).chmod(0o755)

    put("python", f'exec {sys.executable} "$@"')
    put.folder = bin_.parent
    return put


def sourced(command: str, venv, **environment: str) -> str:
    """What a command says after env.sh in a strict shell, which is to bear it."""
    dropped = ("DASK_", "SLURM", "AI4LAND", "PYTHON")
    env = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    env |= {"AI4LAND_VENV": str(venv.folder), **environment}
    text = f"set -euo pipefail; source {MN5}/env.sh; {command}"
    return subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True, check=True).stdout


def test_the_environment_points_dask_to_the_jobs(venv):
    ask = (
        "import dask, dask_jobqueue; print(dask.config.get('jobqueue.slurm.job-cpu'), dask.config.get('jobqueue.slurm.shebang'))"
    )
    assert sourced(f'python -c "{ask}"', venv) == "20 #!/usr/bin/env bash\n"
    assert sourced('echo "$DASK_CONFIG"', venv, DASK_CONFIG="mine.yaml") == "mine.yaml\n"


def test_the_environment_of_a_job(venv, tmp_path):
    # The module command of a cluster: it puts another Python in front, and does not succeed.
    module = f"module() {{ echo module $* >>{tmp_path}/said; PATH=/apps/bin:$PATH; false; }}"
    (tmp_path / "rc").write_text(f"{module}\nPATH={venv.folder}/bin:$PATH\n")
    env = {"SLURM_CPUS_PER_TASK": "20", "PYTHONPATH": "/of/a/module", "AI4LAND_MODULES": "a/1 b/2", "BASH_ENV": f"{tmp_path}/rc"}
    command = (
        'echo $SRUN_CPUS_PER_TASK ${PYTHONPATH-none}; echo ${PATH%%:*}; echo "${AI4LAND_IN[*]}"; set -o | grep -c "nounset.*on"'
    )
    assert sourced(command, venv, **env) == f"20 none\n{venv.folder}/bin\n\n1\n"
    assert (tmp_path / "said").read_text() == "module purge\nmodule load a/1 b/2\n"
    command, env = 'echo "${AI4LAND_IN[*]}"', {**env, "AI4LAND_SIF": "/x/ai4land.sif", "TMPDIR": "/scratch/7"}
    assert sourced(command, venv, **env) == "singularity exec --nv --bind /gpfs,/scratch/7 /x/ai4land.sif\n"
    assert (tmp_path / "said").read_text().endswith("module load singularity/4.1.5\n")


def test_the_folder_of_a_run_is_that_of_its_overrides(venv):
    assert sourced("ai4land_folder demo.yaml runs=/scratch/r name=x", venv) == "/scratch/r/x\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["8787", "me@alogin1.bsc.es"], "me@alogin1.bsc.es"),
        (["8787", "me@alogin1.bsc.es", "as03r1b14"], "-J me@alogin1.bsc.es me@as03r1b14"),
    ],
)
def test_tunnel_goes_to_the_loopback_of_the_machine_with_the_dashboard(arguments, line):
    done = subprocess.run(
        [MN5 / "tunnel.sh", *arguments], env={**os.environ, "PRINT": "1"}, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"ssh -N -L 8787:127.0.0.1:8787 -o ExitOnForwardFailure=yes -o ServerAliveInterval=60 {line}\n"
    for wrong in ([], ["dashboard", "me@alogin1.bsc.es"], ["8787", "alogin1.bsc.es"]):
        assert subprocess.run([MN5 / "tunnel.sh", *wrong], capture_output=True, check=False).returncode == 2


# -- installation without internet --------------------------------------------------------------------------------------


def packed(folder: Path, version: str) -> Path:
    """A folder as ``install-offline.sh pack`` leaves it, of a package that is small and needs nothing."""
    name = "ai4land-0.0.1-py3-none-any.whl"
    (folder / "wheels").mkdir(parents=True)
    with zipfile.ZipFile(folder / "wheels" / name, "w") as wheel:
        wheel.writestr("ai4land/__init__.py", "made = 'offline'\n")
        wheel.writestr(
            "ai4land-0.0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: ai4land\nVersion: 0.0.1\nProvides-Extra: hpc\n"
        )
        wheel.writestr(
            "ai4land-0.0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("ai4land-0.0.1.dist-info/RECORD", "")
    shutil.copytree(MN5, folder / "mn5")
    shutil.copy(MN5 / "install-offline.sh", folder)
    (folder / "PACKED").write_text(f"{version} no {name}[hpc]\n")
    sums = subprocess.run("find . -type f | xargs sha256sum", shell=True, cwd=folder, capture_output=True, text=True, check=True)
    (folder / "SHA256SUMS").write_text(sums.stdout)
    return folder


def test_install_needs_no_internet(tmp_path):
    bundle = packed(tmp_path / "bundle", VERSION)
    install = [bundle / "install-offline.sh", "install", tmp_path / "there", "--python", sys.executable]
    blocked = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_NO_INDEX": "0", "PIP_FIND_LINKS": ""}
    done = subprocess.run(install, env={**os.environ, **blocked}, capture_output=True, text=True, check=True, timeout=120)
    assert f"source {tmp_path}/there/mn5/env.sh" in done.stdout
    command = [tmp_path / "there/venv/bin/python", "-c", "import ai4land; print(ai4land.made)"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert made.stdout == "offline\n"


def test_install_refuses_another_python_and_a_damaged_copy(tmp_path):
    bundle = packed(tmp_path / "bundle", "3.7")
    command = [bundle / "install-offline.sh", "install", tmp_path / "there", "--python", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "expected Python 3.7" in done.stderr
    (bundle / "mn5" / "env.sh").write_text("")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "differs from what was packed; copy it again" in done.stderr
    assert not (tmp_path / "there").exists()


def test_pack_says_what_it_takes(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, code, said in (
        (["pack"], 2, "FOLDER"),
        (["pack", tmp_path / "x", "--python"], 2, "FOLDER"),
        (["pack", tmp_path / "x", "--python", "3.11.7"], 1, "expected a version such as 3.11"),
        (["pack", tmp_path / "x", "--glibc", "new"], 1, "expected a version such as 2.34"),
        (["pack", tmp_path / "x", "--python", "3.99"], 1, "python3.99 is not on the path"),
        (["pack", tmp_path / "full", "--python", VERSION], 1, "is not empty"),
        (["install", tmp_path / "x"], 1, "run the copy of this script in the packed folder"),
    ):
        done = subprocess.run([MN5 / "install-offline.sh", *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, said in done.stderr) == (code, True), (arguments, done.stderr)


# -- Kubernetes ---------------------------------------------------------------------------------------------------------


def test_kubernetes_file_connects_its_parts():
    cluster, client, claim, policy = yaml.safe_load_all((DEPLOY / "kubernetes" / "daskcluster.yaml").read_text())
    name, spec = cluster["metadata"]["name"], cluster["spec"]
    pods = [spec["worker"]["spec"], spec["scheduler"]["spec"], client["spec"]["template"]["spec"]]
    assert len({c["image"] for pod in pods for c in pod["containers"]}) == 1
    assert spec["scheduler"]["service"]["selector"]["dask.org/cluster-name"] == name
    ports = {p["name"]: p["containerPort"] for p in spec["scheduler"]["spec"]["containers"][0]["ports"]}
    assert {p["port"]: ports[p["targetPort"]] for p in spec["scheduler"]["service"]["ports"]} == {8786: 8786, 8787: 8787}
    volumes = [v["persistentVolumeClaim"]["claimName"] for pod in pods for v in pod.get("volumes", [])]
    assert volumes == [claim["metadata"]["name"]] * 2
    peers = [p["podSelector"]["matchLabels"] for p in policy["spec"]["ingress"][0]["from"] if "podSelector" in p]
    assert peers == [{"dask.org/cluster-name": name}, client["spec"]["template"]["metadata"]["labels"]]


# -- real SLURM ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _machine(tmp_path_factory):
    yield from start_slurm(tmp_path_factory.mktemp("mn5"), SLURM_LOCAL_CPUS="112", SLURM_LOCAL_GPUS_PER_NODE="4")


@pytest.fixture
def machine(_machine, monkeypatch, venv):
    """A SLURM cluster of two nodes with as many cores and GPUs as those of MareNostrum 5, and jobs that find an environment."""
    for name, value in {**_machine, "AI4LAND_ENV": str(MN5 / "env.sh"), "AI4LAND_VENV": str(venv.folder)}.items():
        monkeypatch.setenv(name, value)
    yield venv
    subprocess.run(["scancel", "--me"], check=True, timeout=60)


@pytest.mark.slurm
@pytest.mark.parametrize("file", BATCH, ids=lambda p: p.name)
def test_slurm_takes_the_batch_file(machine, file):
    def refused(*options: str) -> int:
        command = ["sbatch", "--test-only", *options, file, "x"]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert refused() == 0
    assert refused("--gres=gpu:9") != 0


@pytest.mark.slurm
@pytest.mark.parametrize("name", ["acc", "gpp"])
def test_slurm_takes_the_jobs_of_dask(machine, tmp_path, name):
    shape = {"threads": 1, "cores": 1, "memory": 1e9, "folder": tmp_path, "settings": SETTINGS, "tell": print}
    with configuration(MN5 / f"jobqueue-{name}.yaml"), slurm(1, **shape):
        until(lambda: len(squeue("%i")) == 1)
    assert not squeue("%i", "-t", "RUNNING,PENDING")


def sbatch(*arguments: object, **environment: str) -> str:
    env = {**os.environ, **environment}
    done = subprocess.run(
        ["sbatch", "--parsable", *map(str, arguments)], capture_output=True, text=True, check=True, env=env, timeout=60
    )
    return done.stdout.strip()


def state_of(job: str) -> str:
    return subprocess.run(
        ["squeue", "-h", "-t", "all", "-j", job, "-o", "%T"], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.slurm
def test_a_command_runs_in_the_environment(machine, tmp_path):
    job = sbatch("-o", tmp_path / "log", MN5 / "command.sbatch", "bash", "-c", "echo $HDF5_USE_FILE_LOCKING ${PATH%%:*}")
    until(lambda: state_of(job) in ("COMPLETED", "FAILED"))
    assert (tmp_path / "log").read_text() == f"FALSE {machine.folder}/bin\n"


@pytest.mark.slurm
def test_a_run_has_a_worker_for_each_gpu_beside_scheduler_and_client(machine, tmp_path):
    machine(
        "ai4land",
        f'echo "$SLURMD_NODENAME $SLURM_PROCID of $SLURM_NTASKS: $*" >>{tmp_path}/said; touch {tmp_path}/demo/evaluation.json',
    )
    (tmp_path / "demo").mkdir()
    job = sbatch("--nodes=2", "-o", tmp_path / "log", MN5 / "run.sbatch", "demo.yaml", f"runs={tmp_path}", "train.steps=9")
    until(lambda: state_of(job) in ("COMPLETED", "FAILED"))
    assert state_of(job) == "COMPLETED", (tmp_path / "log").read_text()
    said = sorted((tmp_path / "said").read_text().splitlines(), key=lambda line: int(line.split()[1]))
    head, other = said[0].split()[0], said[-1].split()[0]
    assert [line.split()[0] for line in said] == [head] * 6 + [other] * 4 and head != other
    options = f"train.workers=8 reconstruct.workers=8 reconstruct.threads=20 runs={tmp_path} train.steps=9 cluster=allocation"
    assert all(line.endswith(f" of 10: run demo.yaml {options}") for line in said)


@pytest.mark.slurm
def test_training_has_a_process_for_each_gpu_of_each_node(machine, tmp_path):
    machine("ai4land", f'echo "$RANK of $WORLD_SIZE, $LOCAL_RANK here: $*" >>{tmp_path}/said; touch {tmp_path}/demo/model.json')
    machine("torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')
    (tmp_path / "demo").mkdir()
    options = ("--nodes=2", "--gres=gpu:2", "-o", tmp_path / "log")
    job = sbatch(*options, MN5 / "train.sbatch", "demo.yaml", f"runs={tmp_path}", AI4LAND_HEAD="127.0.0.1")
    until(lambda: state_of(job) in ("COMPLETED", "FAILED"), seconds=120)
    assert state_of(job) == "COMPLETED", (tmp_path / "log").read_text()
    assert sorted((tmp_path / "said").read_text().splitlines()) == [
        f"{rank} of 4, {rank % 2} here: train demo.yaml runs={tmp_path}" for rank in range(4)
    ]


@pytest.mark.slurm
def test_a_job_whose_time_is_over_goes_on_from_the_queue(machine, tmp_path):
    script = tmp_path / "job.sh"
    work = f"echo begun >>{tmp_path}/said; [ -e {tmp_path}/half ] && touch {tmp_path}/done && exit 0; touch {tmp_path}/half; sleep 300"
    machine("work", work)
    script.write_text(
        "#!/bin/bash\n#SBATCH --requeue\n#SBATCH --open-mode=append\nset -euo pipefail\n"
        f'source "$AI4LAND_ENV"\nai4land_until_done {tmp_path}/done work\n'
    )
    job = sbatch("-o", tmp_path / "log", script, AI4LAND_GRACE="1")
    until((tmp_path / "half").exists)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    until(lambda: state_of(job) == "PENDING")
    # SLURM waits two minutes before it starts such a job: its credential of the first time must be forgotten.
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now+4"], check=True)
    until(lambda: state_of(job) in ("COMPLETED", "FAILED"))
    log = (tmp_path / "log").read_text()
    assert state_of(job) == "COMPLETED", log
    assert (tmp_path / "said").read_text() == "begun\nbegun\n" and log.count("returns to the queue to resume") == 1


@pytest.mark.slurm
@pytest.mark.parametrize(("times", "work", "said"), [("20", "exit 3", ""), ("0", "true", "does not exist after 0 returns")])
def test_a_job_that_fails_or_returned_too_often_does_not_go_on(machine, tmp_path, times, work, said):
    machine("work", work)
    (script := tmp_path / "job.sh").write_text(
        f'#!/bin/bash\nset -euo pipefail\nsource "$AI4LAND_ENV"\nai4land_until_done {tmp_path}/done work\n'
    )
    job = sbatch("-o", tmp_path / "log", script, AI4LAND_TIMES=times)
    until(lambda: state_of(job) in ("COMPLETED", "FAILED"))
    assert state_of(job) == "FAILED" and said in (tmp_path / "log").read_text()
