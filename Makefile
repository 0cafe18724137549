# Every target makes .venv ready first; after that the set-up costs nothing until the dependencies change.
#   PYTHON=/path/to/python3.12   another Python, for a new .venv
#   TORCH_INDEX=<address>        where to take torch from (pytorch.org/get-started names the address of the CPU build)

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
export TORCH_INDEX

.DEFAULT_GOAL := help
.PHONY: demo test slow check bench protos clean help

help: ## This list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile

demo: $(VENV)/.ready-demo ## Serve a real model and show how floors and deadlines change what is run
	@$(BIN)/mosel demo
	@command -v mosel >/dev/null || echo "next: source $(BIN)/activate (puts mosel on the path), then mosel up"

test: $(VENV)/.ready-dev ## Every test but the slow ones and those that need a GPU
	@$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile --no-loadscope-reorder

slow: $(VENV)/.ready-dev ## The slow tests; on a machine that does nothing else
	@$(BIN)/python -m pytest -m "slow and not gpu"

check: $(VENV)/.ready-dev ## Format, lint, types, imports, generated code
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@for model in models/*/model.toml; do name=$$(basename $$(dirname $$model)); \
		(cd models && ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p $$name) || exit 1; done
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python scripts/generate_protos.py --check

bench: $(VENV)/.ready-dev ## The network called directly against the services, side by side
	@$(BIN)/python -m bench.overhead

protos: $(VENV)/.ready-dev ## Generate what comes from protos/
	@$(BIN)/python scripts/generate_protos.py

clean: ## Remove the environment and every cache
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist

$(VENV)/.ready-%: pyproject.toml constraints.txt scripts/setup_environment.py
	@if [ -z "$(PYTHON)" ]; then \
		echo "error: no Python 3.11 or newer found; install one, or: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@$(PYTHON) scripts/setup_environment.py $*
