# Two commands on a fresh machine: `make demo` and `make test`. venv and pip only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint test-families clean

demo: $(STAMP)
	$(BIN)/layercut demo --out runs/demo

test: lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

test-families: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m families tests

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build
