# The two doors: `make demo` and `make test`. Both set up .venv from pinned versions first. `make test-all` runs the
# tests that take minutes each: dying hosts, cut cables, kills, whole comparisons.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test test-all lint format clean

demo: .venv/main.stamp
	$(BIN)/python examples/demo.py

test: .venv/dev.stamp
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-all: .venv/dev.stamp
	$(BIN)/python -m pytest -m slow --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build runs *.egg-info

.venv/main.stamp: pyproject.toml constraints.txt
	@echo "setting up .venv (a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[parity]'
	@touch $@

.venv/dev.stamp: .venv/main.stamp
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[parity,prepare,dev]'
	@touch $@
