# Every target sets itself up: `make demo` and `make test` are all that a fresh clone needs (Python 3.11+ and git).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= gapprobe-demo
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: help demo test lint types layers unit browser bench bench-gpu soak seeds wheel clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

demo: $(VENV)/.demo ## the grounding gap of two trained toy models, as a report (about a minute once installed; OUT=folder)
	$(BIN)/gapprobe demo --out $(OUT)

test: lint types layers unit ## everything that CI runs: lint, types, layers, tests

lint: $(VENV)/.dev ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## pyright, strict on src and kernels
	$(BIN)/pyright --pythonpath $(BIN)/python

layers: $(VENV)/.dev ## import-linter: a floor imports only what lies below
	$(BIN)/lint-imports

unit: $(VENV)/.dev browser ## pytest, on all cores
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadgroup

browser: $(VENV)/.dev ## a Chromium for the tests of the report, if there is none
	$(BIN)/python tests/browser.py --install

bench: $(VENV)/.dev ## store, capture, probes, cosines and lens against their peers, then the demo's steps, as JSON (benchmarks/README.md)
	$(BIN)/python -m benchmarks.store
	$(BIN)/python -m benchmarks.capture
	$(BIN)/python -m benchmarks.probes
	$(BIN)/python -m benchmarks.cosine
	$(BIN)/python -m benchmarks.lens
	$(BIN)/python -m benchmarks.demo

bench-gpu: $(VENV)/.dev ## the Triton kernels against torch.matmul, where there is a GPU
	$(BIN)/python -m benchmarks.gpu

soak: $(VENV)/.dev ## kill and fuzz the store for half an hour (tests/soak/README.md)
	$(PIP) -e '.[soak]'
	$(BIN)/python -m tests.soak.crash
	$(BIN)/python -m tests.soak.fuzz

seeds: $(VENV)/.dev ## train both demo models again, three seeds each (about an hour; examples/digits/README.md)
	$(BIN)/python -m examples.digits.train

wheel: $(VENV)/.dev ## build the wheel into dist/
	$(BIN)/python -m build --wheel

clean: ## remove what these targets made, the environment too
	rm -rf $(VENV) build dist $(OUT) runs .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gapprobe needs Python 3.11 or newer; say which one with PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.demo
