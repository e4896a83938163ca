# make .venv   set-up alone: a virtual environment with the locked dependencies and this package (editable)
# make demo    train a Mixture-of-Depths model beside its dense twin, and show both
# make test    the tests
# make lint    ruff, mypy, shellcheck
# make docs    the documentation, into docs/_build/html, without the network
# make lock    renew requirements.lock from pyproject.toml
# make clean   remove environment and caches; runs/ stays
#
# PYTHON=python3.13 make .venv takes another interpreter (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin
SCRIPTS := tpu_setup.sh .ci/run

.PHONY: .venv demo test lint docs lock clean

demo: .venv
	$(BIN)/python -m experiments.demo

test: .venv
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

docs: .venv
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build/html

lint: .venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/shellcheck $(SCRIPTS)

.venv: .venv/.installed

# The version, in __init__.py, is part of what is installed.
.venv/.installed: requirements.lock pyproject.toml mod_star/__init__.py
	@command -v $(PYTHON) >/dev/null || \
	  { echo "make: no '$(PYTHON)' found; Python 3.11 or newer is needed (PYTHON=/path/to/python3 make .venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1), but Python 3.11 or newer is needed" \
	         "(PYTHON=/path/to/python3 make .venv)" >&2; exit 1; }
	@echo "Setting up .venv with $$($(PYTHON) -V): the packages of requirements.lock, a few minutes the first time"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# One file for every Python: markers choose JAX 0.10 on 3.11 and the newest elsewhere. No registry's address is in it.
lock: .venv
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --upgrade \
	  --no-emit-index-url pyproject.toml --extra dev --extra docs -o requirements.lock

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find mod_star experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +
