# Everything from a bare machine: `make demo` or `make test`. `make` alone explains.

VENV ?= .venv
DEMO_ARGS ?=
PYTEST_ARGS ?=

# Any Python 3 can start the installer, which looks for a supported one; a PYTHON that was given is taken at its word.
STARTER := $(or $(PYTHON),$(shell for p in python3 python3.12 python3.11 python3.10 python3.13; do command -v $$p && break; done))
PY := "$(VENV)/bin/python"

LINT = $(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy
# Two files at once: most tests use one core. The tests of a file share what they trained. The frameworks warn so much
# that failures would drown in it.
TEST = $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --tb=short --disable-warnings $(PYTEST_ARGS)
UNIT = $(TEST) tests/unit
REAL = $(TEST) tests/integration

.PHONY: help install demo test test-unit test-real test-long lint format docs clean

help:
	@echo 'make demo       install if needed, then the whole comparison on real images (DEMO_ARGS="--seeds 3")'
	@echo 'make test       install if needed, then lint, unit tests and real runs'
	@echo 'make install    virtual environment, frameworks, this project; does nothing when up to date'
	@echo 'make test-unit | test-real | lint    one lane of make test (PYTEST_ARGS="-k name")'
	@echo 'make test-long  the real runs that take minutes each: before a release'
	@echo 'make docs       the manual as pages under build/docs'
	@echo 'make format     let ruff format and mend the sources'
	@echo 'make clean      remove caches and build leftovers, keep the virtual environment'
	@echo
	@echo 'VENV=$(VENV) is the virtual environment, PYTHON= the interpreter it is made from (3.10 - 3.12; 3.13 without mmdet, mmseg).'

install:
	@command -v "$(STARTER)" >/dev/null || { \
	  echo "install: found no Python$(if $(PYTHON), at PYTHON=$(PYTHON)); install Python 3.10 to 3.13." >&2; exit 2; }
	@"$(STARTER)" tools/install.py --venv "$(VENV)" $(if $(PYTHON),--exact)

demo: install
	@$(PY) tools/demo.py $(DEMO_ARGS)

# Every lane runs, so that one failure does not hide another.
test: install
	@failed=; \
	{ $(LINT); } || failed="$$failed lint"; \
	$(UNIT) || failed="$$failed test-unit"; \
	$(REAL) || failed="$$failed test-real"; \
	test -z "$$failed" || { echo "make test: failed in$$failed" >&2; exit 1; }

test-unit: install
	@$(UNIT)

test-real: install
	@$(REAL)

# What would not fit into twenty minutes: compiled models, comparisons, recipes at full size, every page of the manual.
test-long: install
	@$(TEST) -m long tests

lint: install
	@$(LINT)

format: install
	@$(PY) -m ruff check --fix . && $(PY) -m ruff format .

# Warnings are errors: a link that leads nowhere, a docstring that cannot be read.
docs: install
	@$(PY) -c 'import mkdocs, mkdocstrings, material, latex2mathml' 2>/dev/null || $(PY) -m pip install -q -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build -q && echo 'docs: build/docs/index.html'

clean:
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	@find kd_plugins tests tools configs -name __pycache__ -type d -prune -exec rm -rf {} +
