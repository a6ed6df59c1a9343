# Each target makes the environment that it needs; python3 and make are all that must be there.
PYTHON ?= python3
VENV := .venv
BENCH_VENV := .venv-bench
BIN := $(VENV)/bin
BENCH ?= # names of measurements; all without one
DEMO_OUT ?= demo

.DEFAULT_GOAL := help
.PHONY: help demo test test-chaos lint bench docs clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(VENV)/.base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch, ray and the rest into $(VENV): some minutes, once"
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.base
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

# An environment of its own: mosaicml-streaming holds numpy under 2.2 and filelock under 3.30, which nobody else should have to.
$(BENCH_VENV)/.bench: pyproject.toml
	$(PYTHON) -m venv $(BENCH_VENV)
	@echo "installing torch, the peers and the rest into $(BENCH_VENV): some minutes, once"
	$(BENCH_VENV)/bin/pip install --quiet --editable '.[bench]'
	@touch $@

demo: $(VENV)/.base ## generated images through the whole chain, in under two minutes
	$(BIN)/vqmill demo --out $(DEMO_OUT)

test: $(VENV)/.dev ## all tests; those on real data run where VQMILL_DATA or ../shared/data is
	$(BIN)/pytest

test-chaos: $(VENV)/.dev ## a hundred kills and more, and servers that fail; VQMILL_CHAOS_SEED=N kills in the same order again
	$(BIN)/pytest -m chaos

lint: $(VENV)/.dev ## format, lint, types and one-way imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

bench: $(BENCH_VENV)/.bench ## ratios against peers and physical limits, measured here and now
	$(BENCH_VENV)/bin/python -m benchmarks $(BENCH)

docs: $(VENV)/.base ## writes docs/commands.md from --help
	$(BIN)/python -c 'from pipelines.cli import app; print(app.generate_docs(), end="")' > docs/commands.md

clean: ## removes the environments and the demo's output
	rm -rf $(VENV) $(BENCH_VENV) $(DEMO_OUT)
