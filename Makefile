# make demo | test | test-fast | check | test-gpu | docs | bench | bench-trl | bench-gpu | performance | scaling | clean
#
# PYTHON=python3.12   another interpreter, with an environment of its own (.venv-3.12)
# TORCH=torch==2.13.0 the torch to install first; PIP_FIND_LINKS and PIP_EXTRA_INDEX_URL say where pip may find a CPU build
# WORKERS=2           processes of the test suite
# BENCH_CSV=FILE      where make bench appends steps (runs/benchmarks.csv); _balance.csv and the like of that name take the others

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

VERSION_SCRIPT := import sys; print("%d.%d" % sys.version_info[:2])
CANDIDATES := python3.11 python3.12 python3
FIRST_PYTHON := $(shell for p in $(CANDIDATES); do if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done)
GIVEN_PYTHON := $(PYTHON)
PYTHON ?= $(or $(FIRST_PYTHON),python3.11)
WORKERS ?= 2
BENCH_CSV ?= runs/benchmarks.csv

# pyenv's launchers answer only to the versions it was told of; where that is the obstacle, ask it for the one that is wanted.
PY_VERSION := $(shell $(PYTHON) -c '$(VERSION_SCRIPT)' 2>/dev/null)
ifeq ($(PY_VERSION),)
PYENV_FOUND := $(shell pyenv versions --bare 2>/dev/null | grep -E "^$(subst .,\.,$(patsubst python%,%,$(notdir $(PYTHON))))\." | tail -n 1)
ifneq ($(PYENV_FOUND),)
override PYTHON := $(shell pyenv prefix $(PYENV_FOUND))/bin/python
PY_VERSION := $(shell $(PYTHON) -c '$(VERSION_SCRIPT)' 2>/dev/null)
endif
endif

# An interpreter that was asked for gets an environment of its own, unless it is 3.11, the usual one.
VENV := $(if $(GIVEN_PYTHON),$(if $(filter 3.11,$(PY_VERSION)),.venv,.venv-$(PY_VERSION)),.venv)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# On Python 3.11 the pair the suite is developed with (pip adds megatron-core 0.16.1, the last for 3.11); later, the newest of both.
TORCH ?= $(if $(filter 3.11,$(PY_VERSION)),torch==2.13.0,torch)
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

.PHONY: help venv demo test test-fast test-gpu check docs bench bench-trl bench-gpu performance scaling clean

help:
	@sed -n '1,6s/^# \{0,1\}//p' Makefile

venv: $(STAMP)

$(STAMP): setup.py pyproject.toml
	@if [ -z "$(PY_VERSION)" ]; then echo "make: '$(PYTHON)' does not run; set PYTHON to a Python 3.11 or later" >&2; exit 1; fi
	@if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then echo "make: '$(PYTHON)' is Python $(PY_VERSION); set PYTHON to a Python 3.11 or later" >&2; exit 1; fi
	@echo "Installing into $(VENV) (Python $(PY_VERSION), $(TORCH)); the first time this takes some minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade 'pip>=24' 'setuptools>=77' wheel
	@# First and alone, so that nothing else's wish for torch brings another build.
	@$(PIP) install '$(TORCH)'
	@$(PIP) install --no-build-isolation --editable '.[dev]'
	@$(BIN)/python -c 'from importlib.metadata import version as v; print(*(p + " " + v(p) for p in ("torch", "megatron-core", "transformers")))'
	@touch $(STAMP)

demo: $(STAMP)
	@PATH="$(abspath $(BIN)):$$PATH" bash examples/run_rmipo_llama3_8b.sh

test: $(STAMP)
	$(PYTEST)

test-fast: $(STAMP)
	$(PYTEST) -m "not slow and not dist"

test-gpu: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m gpu

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/shellcheck --external-sources .ci/run $$(git ls-files 'examples/*.sh' 'examples/*.sbatch' 'containers/*.sh' 'tools/*.sh' 'benchmarks/*.sh')

# The site, in site/; a warning is an error, and nothing is fetched.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(STAMP)
	@mkdir -p "$(dir $(BENCH_CSV))"
	$(BIN)/python -m benchmarks.bench_balance --csv "$(basename $(BENCH_CSV))_balance.csv"
	$(BIN)/python -m benchmarks.bench_pipeline --csv "$(basename $(BENCH_CSV))_pipeline.csv"
	$(BIN)/python -m benchmarks.bench_logprobs --csv "$(basename $(BENCH_CSV))_logprobs.csv"
	$(BIN)/python -m benchmarks.bench_flops --csv "$(basename $(BENCH_CSV))_flops.csv"
	$(BIN)/python -m benchmarks.bench_alone --csv "$(basename $(BENCH_CSV))_alone.csv"
	$(BIN)/python -m benchmarks.bench_data --csv "$(basename $(BENCH_CSV))_data.csv"
	$(BIN)/python -m benchmarks.bench_convert --csv "$(basename $(BENCH_CSV))_convert.csv"
	$(BIN)/python -m benchmarks.bench_order --csv "$(basename $(BENCH_CSV))_order.csv"
	$(BIN)/python -m benchmarks.bench_scale --csv "$(basename $(BENCH_CSV))_scale.csv"
	$(BIN)/python -m benchmarks.bench_context --csv "$(basename $(BENCH_CSV))_context.csv"
	$(BIN)/python -m benchmarks.bench_checkpoint --csv "$(basename $(BENCH_CSV))_checkpoint.csv"
	$(BIN)/python -m benchmarks.bench_start --csv "$(basename $(BENCH_CSV))_start.csv"
	$(BIN)/python -m benchmarks.bench_memory --csv "$(basename $(BENCH_CSV))_memory.csv"
	$(BIN)/python -m benchmarks.bench_lora --csv "$(basename $(BENCH_CSV))_lora.csv"
	$(BIN)/python -m benchmarks.bench_step --lengths ultrafeedback --csv "$(BENCH_CSV)"
	$(BIN)/python -m benchmarks.bench_step --lengths hh --csv "$(BENCH_CSV)"

# TRL has no RMiPO: SimPO on both sides. The extra bench goes into the same environment.
bench-trl: $(STAMP)
	@mkdir -p "$(dir $(BENCH_CSV))"
	@$(PIP) install --no-build-isolation --editable '.[bench]'
	$(BIN)/python -m benchmarks.bench_step --lengths ultrafeedback --objective simpo --trl --csv "$(BENCH_CSV)"
	$(BIN)/python -m benchmarks.bench_step --lengths hh --objective simpo --trl --csv "$(BENCH_CSV)"
	$(BIN)/python -m benchmarks.bench_lora --trl --csv "$(basename $(BENCH_CSV))_lora.csv"
	$(BIN)/python -m benchmarks.bench_lora --trl --bf16 --csv "$(basename $(BENCH_CSV))_lora.csv"

bench-gpu: $(STAMP)
	@mkdir -p "$(dir $(BENCH_CSV))"
	$(BIN)/python -m benchmarks.bench_gpu --lengths ultrafeedback --csv "$(basename $(BENCH_CSV))_gpu.csv"
	$(BIN)/python -m benchmarks.bench_gpu --lengths hh --csv "$(basename $(BENCH_CSV))_gpu.csv"

performance: $(STAMP)
	$(BIN)/python -m benchmarks.performance_page

# Some minutes: every layout of four models on one to 64 nodes.
scaling: $(STAMP)
	$(BIN)/python -m benchmarks.scaling_page

# Not work/ and runs/: what somebody trained is theirs to remove.
clean:
	rm -rf .venv .venv-* build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . \( -path ./work -o -path ./runs \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
