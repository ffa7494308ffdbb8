# `make demo` and `make test` are all that a fresh machine needs; they build .venv on first use.

PYTHON ?= python3
# How many tests run at a time; a file's tests stay together.
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all lint format bench bench-gpu clean

demo: $(STAMP)
	$(BIN)/portkit demo

test: $(STAMP)
	$(BIN)/pytest -n $(JOBS) --dist loadfile -m "not slow and not gpu"

test-all: $(STAMP)
	$(BIN)/pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/pytest --benchmark-only -m "" parity_tests/benchmarks

# With PYTHON's own torch, which knows the GPU; portkit installed there, or a wheel on PYTHONPATH.
bench-gpu:
	$(PYTHON) tools/bench_gpu.py bench-gpu

clean:
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache

# The entry points that name the families are written at installation: pyproject.toml is watched.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
