# `make demo` runs the main job on the bundled defaults, `make test` the tests; both set everything up first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint

demo: .venv/demo
	$(BIN)/theory-check
	mkdir -p out
	$(BIN)/toy-figures --tiny --only priors --out out/toys-tiny
	$(BIN)/sd-edit demo --out out/demo.png

test: .venv/test
	$(BIN)/pytest

# What is exhaustive too, and the fast tests under every Python that is here, with the pins and with the newest.
test-all: .venv/test
	$(BIN)/pytest -m ""
	$(BIN)/python tests/every_python.py

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/demo: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/test: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@
