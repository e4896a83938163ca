# Tasks of this repository; `make help` lists them. PYTHON=python3.13 make setup takes another interpreter (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin
SCRIPTS := tpu_setup.sh .ci/run
# As many workers as cores, at most four; make test WORKERS=3 takes three.
WORKERS ?= auto
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: help setup .venv demo check test nightly tpu .tpu lint types format docs lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv ## a virtual environment, .venv, with the locked packages and this one (editable)

demo: .venv ## train a Mixture-of-Depths model beside its dense twin, and show both
	$(BIN)/python -m experiments.demo

check: lint types ## what is quick: lint, and the tests that are not marked slow (under 3 minutes on 2 cores)
	$(PYTEST) -m "not slow and not nightly"

test: .venv ## the tests, but those that only repeat at length what others show
	$(PYTEST) -m "not nightly"

nightly: .venv ## the tests that make test leaves out
	$(PYTEST) -m nightly

tpu: .tpu ## compile programs for a TPU that is not there, and look at them (the compiler goes into .tpu, 700 MB)
	JAX_PLATFORMS=cpu PYTHONPATH=.tpu $(BIN)/python -m pytest -q -n 0 tests/experiments/test_tpu.py \
	  tests/planning/test_cycles.py tests/planning/test_plan.py::test_a_step_is_compiled_for_a_slice

lint: .venv ## ruff, the format, shellcheck, and which package may import which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/shellcheck $(SCRIPTS)
	$(BIN)/lint-imports --no-logo

types: .venv ## mypy
	$(BIN)/mypy

format: .venv ## format the code, and sort imports
	$(BIN)/ruff check --quiet --select I --fix
	$(BIN)/ruff format

docs: .venv ## the documentation, into docs/_build/html, without the network
	$(BIN)/sphinx-build -nW --keep-going -q docs docs/_build/html

.venv: .venv/.installed

# uv takes seconds where pip takes half a minute; pip takes over where uv finds no packages (it doesn't read pip.conf).
# Nothing is resolved: the lock is complete. The version, in __init__.py, is part of what is installed.
.venv/.installed: requirements.lock pyproject.toml mod_star/__init__.py
	@command -v $(PYTHON) >/dev/null || \
	  { echo "make: no '$(PYTHON)' found; Python 3.11 or newer is needed (PYTHON=/path/to/python3 make setup)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1), but Python 3.11 or newer is needed" \
	         "(PYTHON=/path/to/python3 make setup)" >&2; exit 1; }
	@echo "Setting up .venv with $$($(PYTHON) -V): the packages of requirements.lock, a few minutes the first time"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -c requirements.lock uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -r requirements.lock -e . || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -r requirements.lock -e .
	@touch $@

.tpu: .tpu/.installed

# In a directory of its own: where libtpu is installed, JAX looks for TPUs. The version is the one that JAX asks for.
.tpu/.installed: .venv/.installed
	@wanted=$$($(BIN)/python -c 'import importlib.metadata as m; \
	  print(next(r.split(";")[0].strip() for r in m.requires("jax") if r.startswith("libtpu")))') && \
	  rm -rf .tpu && $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target .tpu "$$wanted"
	@touch $@

lock: .venv ## renew requirements.lock from pyproject.toml
# One file for every Python: markers choose JAX 0.10 on 3.11 and the newest elsewhere. No registry's address is in it.
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --upgrade \
	  --no-emit-index-url pyproject.toml --extra dev --extra docs -o requirements.lock

clean: ## remove environment and caches; runs/ stays
	rm -rf .venv .tpu .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build dist *.egg-info
	find mod_star experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +
