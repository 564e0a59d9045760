# make serve   install what serving needs into .venv and serve the default model on 127.0.0.1:30000
# make test    the same and the development tools, then every check and test that needs no GPU
#
# PYTHON=python3.12 picks an interpreter (3.11 or later); ARGS="--port 8000" adds flags to `hornbeam serve`,
# or to pytest. pip takes its settings (index, proxy, cache) from the user's own configuration.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := requirements/constraints.txt
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable

.PHONY: help serve test check lint format docs clean

help:
	@sed -n 's/^# //p' Makefile

serve: $(VENV)/.serve
	$(BIN)/hornbeam serve $(ARGS)

# pytest runs last and alone: what it counts is the last line printed.
test: check
	$(BIN)/python -m pytest -m "not gpu and not multi" $(ARGS)

check: lint
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

lint: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check

format: $(VENV)/.dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: $(VENV)/.serve
	$(BIN)/python -m hornbeam.config.flags_page > docs/flags.md

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# A stamp is newer than what it was installed from; an installation that broke off leaves none.
$(VENV)/.serve: pyproject.toml $(CONSTRAINTS) | $(VENV)/.created
	@echo "installing Hornbeam into $(VENV); the first time takes minutes, mostly for torch"
	$(INSTALL) .
	@touch $@

$(VENV)/.dev: pyproject.toml $(CONSTRAINTS) | $(VENV)/.created
	@echo "installing Hornbeam and its development tools into $(VENV); the first time takes minutes, mostly for torch"
	$(INSTALL) ".[dev]"
	@touch $@ $(VENV)/.serve

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Hornbeam needs Python 3.11 or later; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@touch $@
