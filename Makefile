# make demo and make test work in either order on a fresh machine with Python 3.11+, make and git.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test lint test-slow bench clean

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml infra/bootstrap.py
	@$(PYTHON) infra/bootstrap.py
	@touch $(STAMP)

demo: setup
	@$(BIN)/ganymede run demo

lint: setup
	@$(BIN)/ruff format --check -q . && $(BIN)/ruff check -q .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

test: lint
	@$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: setup
	@$(BIN)/python -m pytest -m "slow and not gpu" --timeout 1800

bench: setup
	@$(BIN)/python -m benchmarks

clean:
	rm -rf .venv .ganymede
