# The commands of the README. VENV is where the virtual environment is made; each target installs what it needs.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test parity lint

# Decodes a handful of prompts with a real model (98 MB, fetched once).
demo: $(VENV)/.installed-base
	$(BIN)/python -m experiments.decode --config configs/decode/demo.yaml

# All tests but those against torch.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The same networks in torch and transformers, live.
parity: $(VENV)/.installed-parity
	$(BIN)/python -m pytest -o addopts="--import-mode=importlib -q --strict-markers" tests/parity

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-base: setup.py | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: setup.py | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@

# torch first and alone: on Linux its plain version brings the processor build where the package index offers one.
$(VENV)/.installed-parity: setup.py | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[parity]"
	@touch $@

$(VENV)/.installed-lint: | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet "ruff>=0.9"
	@touch $@
