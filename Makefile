# `make demo` and `make test` do all set-up in an environment of their own; nothing is needed but Python >= 3.10.
# `make test` runs a covering design of the tests (tests/covering.py): each two values meet in some test. `make test-all` runs
# the whole product (of methods that adapters cannot tell apart, one) and slow tests. `make test-rest` lies between: what
# `make test` leaves out, until each two values have met in each function (families with the same adapter count as one there,
# and methods for decoders that prune in the same place), and one test of each slow function but for the heavy ones.
# `make docs` builds the site of docs/ into site/, in an environment without torch.
# TRANSFORMERS=5.17.0 tests another version, in an environment beside the first; TESTS="tests/test_engine.py ..." a part.
PYTHON ?= python3
TRANSFORMERS ?=
VENV ?= .venv$(if $(TRANSFORMERS),-$(TRANSFORMERS))
PIP = $(VENV)/bin/python -m pip install --quiet -c constraints.txt
VERSION = $(if $(TRANSFORMERS),"transformers==$(TRANSFORMERS)")

.PHONY: demo test test-all test-rest lint format docs clean

demo: $(VENV)/.demo
	$(VENV)/bin/hf-tokenprune demo

test: $(VENV)/.dev $(if $(TRANSFORMERS),,lint)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto $(TESTS)

test-all: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --all $(TESTS)

test-rest: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --rest $(TESTS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

docs: .venv-docs/.docs
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

clean:
	rm -rf .venv .venv-* build *.egg-info demo_output site

$(VENV)/.demo: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[demo]" $(VERSION)
	touch $@

$(VENV)/.dev: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[dev]" $(VERSION)
	touch $@

.venv-docs/.docs: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	.venv-docs/bin/python -m pip install --quiet -c constraints.txt --group docs
	touch $@
