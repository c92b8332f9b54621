# Two commands on a fresh machine: `make demo` and `make test`. venv and pip only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test gpu lint docs fuzz test-engines test-families test-minimum clean

demo: $(STAMP)
	$(BIN)/layercut demo --out runs/demo

test:
	$(MAKE) -j 2 lint tests

.PHONY: tests
tests: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Where there is an accelerator: the tests that need one, and the benchmark of everything on it, in nine minutes.
gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu -rs tests/models/test_accelerators.py
	$(BIN)/python research/gpu.py

lint: $(STAMP)
	$(BIN)/ruff check src tests research tools examples
	$(BIN)/mypy

# Damaged model folders and GGUF files by the hundred, through the commands' ways in; SEED=… for other damage.
SEED := 0
fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz --cases 200 --seed $(SEED)
docs: $(STAMP)
	$(BIN)/python tools/docs_pages.py
	$(BIN)/python -m zensical build --strict

# What other engines make of the models that layercut writes, each in an environment of its own under build/engines:
# two minutes once they are installed. vLLM (3.4 GB) only where ENGINES names it. Writes the table of docs/engines.md.
ENGINES :=
test-engines: $(STAMP)
	$(BIN)/python -m research.engines $(ENGINES)

test-families: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m families tests

# A smoke part of the suite with the oldest versions that pyproject.toml allows, in an environment of its own.
# $(MINIMUM_PIP) may hold further options of pip, such as the index of torch's CPU builds.
MINIMUM := build/minimum
test-minimum:
	test -x $(MINIMUM)/bin/python || $(PYTHON) -m venv $(MINIMUM)
	$(MINIMUM)/bin/python -m pip install --quiet --constraint constraints/minimum.txt --editable '.[dev]' $(MINIMUM_PIP)
	OMP_WAIT_POLICY=passive $(MINIMUM)/bin/python -m pytest tests/cli tests/pipeline/test_run_folder.py \
		tests/pipeline/test_journey.py tests/surgery/test_cut.py tests/surgery/test_cut_gguf.py tests/data/test_data.py tests/test_lora.py

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build
