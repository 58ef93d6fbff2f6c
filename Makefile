# AI4Land: every target does its own set-up. PYTHON picks the interpreter (3.11-3.13).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-slurm test-faults test-browser slurm-packages chromium lint bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,hpc,publish,s3,serve,icechunk]"
	touch $@

demo: install  ## the whole path on a synthetic planet: a model, a cube, a table, pictures in runs/demo
	$(BIN)/ai4land demo

test: install  ## the fast tests, in two processes; a file's tests stay together, as they share what they make
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slurm and not faults and not browser" -n 2 --dist loadfile --no-loadscope-reorder

test-faults: install  ## minutes of killed processes, full disks and object stores that are away
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults tests

test-browser: install chromium  ## the served page in a real Chromium; installs Debian's package
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests

test-slurm: install slurm-packages  ## real SLURM jobs on a private cluster on this machine; installs Debian's packages
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm tests

slurm-packages:
	which slurmctld slurmd sbatch munged slurmdbd mariadbd >/dev/null || (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge slurmdbd mariadb-server)

chromium:
	which chromium >/dev/null || (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium)

lint: install  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## side-by-side timings into benchmarks/results.json
	$(BIN)/python benchmarks/run.py

clean:  ## everything that can be made again, results in runs/ excepted
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
