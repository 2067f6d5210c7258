# make setup       .venv with pinned dependencies; every other target sees to it by itself
# make quickstart  train a small language model on this machine's Python standard library
# make test        the test suite;  make test-slow  its longer part;  make lint  style, formatting and types
# make bench       the tables of docs/benchmarks.md; wants a machine that does nothing else
#
# PYTHON=python3.12 chooses another Python (3.11 or later). WORKERS=8 runs that many tests at a time.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BENCHMARKS := $(wildcard benchmarks/training_speed.py benchmarks/*/*.py)

.PHONY: setup quickstart test test-slow lint bench clean

setup: $(VENV)/.installed

# The stamps are newer than what they were made from: nothing is installed twice, a changed pin is.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11; choose another one: make setup PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[all]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: setup
	$(BIN)/trainwright train stdlib

# One thread for each worker: two workers with all cores each are slower than one. Files stay in their order, long tests first:
# otherwise the files of few long tests come last, and one worker waits for the other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed-dev
	$(PYTEST)

# pytest's exit code 5 says that no test is marked slow, which is no failure.
test-slow: $(VENV)/.installed-dev
	@$(PYTEST) -m slow; code=$$?; [ $$code -eq 5 ] || exit $$code

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	@set -e; for file in $(BENCHMARKS); do echo "== $$file"; $(BIN)/python $$file; done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
