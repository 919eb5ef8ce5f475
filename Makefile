# The two doors: `make demo` and `make test`. Both set up .venv from pinned versions first. `make test-all` runs the
# tests that take minutes each: dying hosts, cut cables, kills, whole comparisons. Three tests run at a time, because
# those that wait for their processes leave a core idle. `make docs` builds the documentation site into site/.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# the versions that fit the Python of .venv, or the one that .venv will have; JAX 0.11 and later need Python 3.12
CONSTRAINTS := $(shell $(firstword $(wildcard $(BIN)/python) $(PYTHON)) -c \
	"import sys; print('constraints.txt' if sys.version_info < (3, 12) else 'constraints-3.13.txt')")

# Python keeps compiled modules even where this is set: the tests start hundreds of processes, and each would compile
# the project's modules anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-all lint format docs clean constraints

demo: .venv/main.stamp
	$(BIN)/python examples/demo.py

test: .venv/dev.stamp
	$(BIN)/python -m pytest -m "not slow" --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-all: .venv/dev.stamp
	$(BIN)/python -m pytest -m slow --numprocesses 3 --dist loadfile --no-loadscope-reorder

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the variable silences the theme's announcement of its successor, which is no warning about the pages
docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean

constraints:
	@echo $(CONSTRAINTS)

clean:
	rm -rf .venv build dist runs site *.egg-info

.venv/main.stamp: pyproject.toml $(CONSTRAINTS)
	@echo "setting up .venv (a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[parity]'
	@touch $@

.venv/dev.stamp: .venv/main.stamp
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[parity,prepare,dev]'
	@touch $@

# reads the code without running it, so PyTorch is not needed
.venv/docs.stamp: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[docs]'
	@touch $@
