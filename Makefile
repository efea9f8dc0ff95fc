.PHONY: demo test test-all lint bench docs
PYTHON ?= python3
BIN = .venv/bin

demo: .venv/installed
	$(BIN)/python train.py sweeps=demo
	$(BIN)/python -m sweeps.report demo

test: .venv/installed
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: .venv/installed
	$(BIN)/python -m pytest -n 2

bench: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m kd.bench

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy
	$(BIN)/python -m tests.words

docs: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
