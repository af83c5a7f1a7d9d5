# expunge: `make demo` shows it, `make test` checks it. Both install first; a second run is quick.
#
#   make install                      .venv with everything (Python >= 3.11 is all that is needed)
#   make install TORCH_ARGS="..."     the same, with other pip arguments for torch alone, for example
#                                     the index of the CPU build that PyTorch's install page names
#   make demo | test | lint | claims | benchmarks | docs

PYTHON ?= python3
TORCH_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist worksteal
OUT ?= out/demo

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.expunge-installed

.PHONY: install demo test lint format claims benchmarks docs clean

install: $(STAMP)

# The stamp is written last, so an interrupted install starts again where pip left off.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "expunge needs Python >= 3.11; name one with: make install PYTHON=python3.12" >&2; exit 1; }
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV) || { \
	  echo "python3 -m venv failed; some systems ship it apart (Debian: python3-venv)" >&2; exit 1; }
	$(PY) -m pip install -c constraints.txt $(TORCH_ARGS) torch
	$(PY) -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

demo: install
	$(PY) -m expunge demo --out $(OUT)

# One thread in each of two test processes is faster than two threads in one: the models are small.
test: export OMP_NUM_THREADS = 1
test: install
	$(PY) -m pytest $(PYTEST_ARGS)

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: install
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Hours, not minutes: runs every card's small experiment and records it under results/.
claims: install
	$(PY) -m pytest tests/claims -m claims --timeout 0

# Ratios, each measured in one run; minutes per file.
benchmarks: install
	@set -e; for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(PY) $$file; done

# What is derived: status.json, the status table of the README, the tables of docs/.
docs: install
	$(PY) -m expunge.run.status

clean:
	rm -rf out build dist .mypy_cache .pytest_cache .ruff_cache
