# `make demo` runs the main job on the bundled defaults, `make test` the tests; both set everything up first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint

# Statements and pictures take a core each; what the pictures say waits for the table.
demo: .venv/demo
	@mkdir -p out
	@{ $(BIN)/toy-figures --tiny --only priors --out out/toys-tiny && $(BIN)/sd-edit demo --out out/demo.png; } \
		> out/demo.txt 2>&1 & pictures=$$!; \
	$(BIN)/theory-check; checked=$$?; \
	echo "The toy figure and the drag:"; wait $$pictures; drawn=$$?; cat out/demo.txt; exit $$((checked || drawn))

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

# Modules are compiled to bytecode when they are first loaded, and kept so: most of what is installed never is.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt

.venv/demo: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@

.venv/test: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[test]'
	touch $@
