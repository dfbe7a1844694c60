# Two commands do everything: `make serve` and `make test`. Both set up what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
# A GPU machine takes PyTorch's default build; elsewhere the CPU build keeps the install small.
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo 1)
EXTRA := $(if $(GPU),[gpu],)
# Tests of one file share servers, so a file stays in one process. One GPU has room for one engine.
WORKERS ?= $(if $(GPU),,-n auto --maxprocesses 4 --dist loadfile)
CONSTRAINTS := $(if $(GPU),,-c constraints-cpu.txt)

.PHONY: serve cluster test lint types format clean

serve: $(VENV)/.serve
	$(BIN)/python -m tca_runtime.launch_server $(ARGS)

# Two servers on the CPU or GPU behind sglang-router on port 30000: `make cluster ARGS="--model X"`.
cluster: $(VENV)/.dev
	$(BIN)/python -m benchmark.cluster --serve $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.serve: $(VENV)/bin/python pyproject.toml constraints-cpu.txt
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e ".$(EXTRA)"
	touch $@

$(VENV)/.dev: $(VENV)/.serve requirements-clients.txt
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e ".$(if $(GPU),[gpu$(comma)dev],[dev])"
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-clients.txt
	touch $@

comma := ,

clean:
	rm -rf $(VENV) build *.egg-info
