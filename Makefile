# `make demo` or `make test` alone sets up all that it needs: a virtual environment with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
METHOD ?= simclr
DEMO := runs/demo$(if $(filter-out simclr,$(METHOD)),_$(METHOD))
GPU_CHECK ?=  # options of benchmarks/gpu.py
export METHOD DEMO GPU_CHECK  # so that what they hold are words for the shell and no part of its line

.PHONY: setup demo test test-slow test-slurm test-slurm-all bench chaos gpu-check slurm-packages check format clean
.DEFAULT_GOAL := demo

setup: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cuda13,demo,dev]'
	touch $@

demo: setup  ## the main job in minutes: digits -> views -> METHOD + SparseHead -> evaluation -> runs/demo/report.html
	$(BIN)/ssl-pipeline demo --method "$$METHOD" --output "$$DEMO"

# A process a core, each with one thread of torch; a file's tests stay together, and so do their fixtures.
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test: setup  ## the fast tests
	$(PARALLEL) -m "not slow and not slurm and not slurm_all and not gpu"

test-slow: setup  ## the others
	$(PARALLEL) -m slow

test-slurm: setup  ## on a real Slurm cluster that is started on this machine; needs root and `make slurm-packages`
	$(BIN)/python -m pytest -m slurm tests/slurm

test-slurm-all: setup  ## the rest of what can happen to a job there, 25 minutes
	$(BIN)/python -m pytest -m slurm_all tests/slurm

bench: setup  ## every benchmark beside its bound, on the CPU, a quarter of an hour; docs/performance.md
	$(BIN)/python benchmarks/bench.py

chaos: setup  ## kills a pretraining of two ranks 50 times, a quarter of an hour
	$(BIN)/python benchmarks/chaos.py --kills 50 --output benchmarks/results/chaos.md

gpu-check:  ## where there is a GPU, in 9 minutes: tests/gpu and benchmarks/gpu.py, by $(PYTHON) as it is, without .venv
	$(PYTHON) benchmarks/gpu.py $$GPU_CHECK

slurm-packages:  ## what the cluster of the tests needs, on Debian
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	    slurm-wlm munge iproute2 slurmdbd mariadb-server-core mariadb-client-core

check: setup  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info
