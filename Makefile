# make quickstart    everything from an empty machine to the comparison of MHA and MLA
# make test          the tests
# make test-fast     those that take seconds
# make test-oldest   the tests with the oldest versions that pyproject.toml allows, in a virtual environment of its own
# make gpu           on a machine with a GPU: all tests and measurements that need one (ARGS=--rehearse: on a CPU)
# make study         does MLA form induction heads? (ARGS='--full=True' for all of it)
# make figures       every picture and every table of results/, from the numbers in assets/
#
# PYTHON=...   the Python (3.11 or later) that .venv and .venv-oldest are made with
# INPUT=...    quickstart: a local copy of tinyshakespeare, or any other text; nothing is downloaded
# ARGS=...     more arguments for the script or the test runner, such as ARGS='--max_iters=200' or ARGS='-k tokens'

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-fast test-oldest gpu study figures lint clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

quickstart: $(VENV)/.installed ## install, prepare the Shakespeare characters, train MHA and MLA, compare (INPUT=FILE, ARGS=...)
	$(BIN)/python data/shakespeare_char/prepare.py $(if $(INPUT),--input="$(INPUT)")
	$(BIN)/python test_shakespeare_quick.py $(ARGS)

# One thread per process: the tests run side by side already, and more threads than cores is far slower than fewer.
# Files are taken in the order of tests/conftest.py: those with slow tests first.
PYTEST := -m pytest -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
test: $(VENV)/.installed-test ## install what the tests need and run them (ARGS=...)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python $(PYTEST) $(ARGS)

test-fast: $(VENV)/.installed-test ## the tests that take seconds, to be run while you work (ARGS=...)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python $(PYTEST) -m "not slow" $(ARGS)

test-oldest: $(OLDEST)/.installed ## install the oldest versions that pyproject.toml allows and run the tests (ARGS=...)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(OLDEST)/bin/python $(PYTEST) $(ARGS)

# with the Python that has PyTorch there already: a CUDA image is often without a network
gpu: ## everything that needs a GPU, in .venv or else with the packages that are there (ARGS=--rehearse: on a CPU)
	$(if $(wildcard $(VENV)/.installed),$(BIN)/python,$(PYTHON)) studies/gpu.py $(ARGS)

study: $(VENV)/.installed ## train small models that form induction heads, measure them, print the tables (ARGS='--full=True')
	$(BIN)/python studies/induction.py $(ARGS)

figures: $(VENV)/.installed ## draw every picture and write every table of results/ again, from the numbers in assets/
	$(BIN)/python assets/draw_diagram.py
	$(BIN)/python studies/pages.py --pictures=assets --tables=results/tables
	$(BIN)/python studies/contest.py --reuse=assets/contest.json --figure=assets/contest.png --table=results/tables/contest.md
	$(BIN)/python studies/staircase.py --reuse=assets/staircase.json --figure=assets/staircase.png --table=results/tables/staircase.md
	$(BIN)/python studies/bits.py --reuse=assets/bits.json --figure=assets/bits.png --table=results/tables/bits.md
	$(BIN)/python studies/bits.py --reuse=assets/bits_smollm2.json --figure=assets/bits_smollm2.png --table=results/tables/bits-smollm2.md
	$(BIN)/python studies/heads.py --reuse=assets/smollm2_heads.json --figure=assets/smollm2_heads.png --table=results/tables/smollm2-heads.md
	$(BIN)/python studies/induction.py --reuse=assets/induction_repeats.json --figure=assets/induction_repeats.png --table=results/tables/induction-repeats.md
	$(BIN)/python studies/induction_text.py --reuse=assets/induction_text.json --figure=assets/induction_text.png --table=results/tables/induction-text.md

lint: $(VENV)/.installed-test ## check style, format and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean: ## remove caches; runs (out*) and data stay
	find . -path './$(VENV)*' -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
	rm -rf .pytest_cache .ruff_cache .mypy_cache

CHECK_PYTHON = $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: this is Python " + \
	sys.version.split()[0] + ", 3.11 or later is needed; try make PYTHON=python3.11 ...")'
# every range of pyproject.toml is NAME>=VERSION
OLDEST_VERSIONS = import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	ranges = project["dependencies"] + project["optional-dependencies"]["test"]; \
	print("\n".join(ranges).replace(">=", "=="))

# The stamps are as old as the last complete install: a second run is instant, a changed pin is installed.
$(VENV)/.installed: requirements.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.txt
	@touch $@

$(VENV)/.installed-test: requirements-test.txt $(VENV)/.installed
	$(BIN)/python -m pip install -r requirements-test.txt
	@touch $@

$(OLDEST)/.installed: pyproject.toml
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -c '$(OLDEST_VERSIONS)' > $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python -m pip install -r $(OLDEST)/requirements.txt
	@touch $@
