# Everything here runs in .venv, made from pyproject.toml and the tested versions in constraints.txt.
# Another interpreter: make PYTHON=python3.12 env

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two workers; tests/conftest.py says which files share one.
PARALLEL := -n 2 --no-loadscope-reorder
# Hundreds of processes that tests start import the same files: these are compiled once.
unexport PYTHONDONTWRITEBYTECODE
STAMP := $(VENV)/.installed

.PHONY: env demo test test-slow lint types format clean

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt tests/wheels.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip download --no-deps --require-hashes -r tests/wheels.txt -d $(VENV)/wheels
	touch $@

demo: $(STAMP)
	$(BIN)/cdp demo

test: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(PARALLEL) $(TEST_FLAGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
