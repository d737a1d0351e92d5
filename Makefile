# Every target does its own setup, from a fresh clone with only Python and make.
# PYTHON selects the interpreter of the environment and VENV its directory:  make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
# Number of tests that run in parallel: one more than the processors, because some tests wait, but no
# more than memory allows, because each may take 3 GB.
WORKERS ?= $(shell \
  cores=$$(getconf _NPROCESSORS_ONLN 2> /dev/null || echo 1); \
  memory=$$(awk '/^MemAvailable/ {print int($$2 / 3500000)}' /proc/meminfo 2> /dev/null); \
  workers=$$((cores + 1)); limit=$${memory:-2}; \
  echo $$((limit < 1 ? 1 : workers < limit ? workers : limit)))

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help venv demo test slow-test wheel-test docs lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.package  ## create .venv with the package (editable)

demo: venv  ## sample labelled grids from the bundled models
	@$(VENV)/bin/aim-jax demo

test: $(VENV)/.tests  ## run the tests, but not those of the next target
	@$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -rs

slow-test: $(VENV)/.tests  ## run whole trainings, several processes, and long fuzz runs
	@$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -rs -m slow

wheel-test: $(VENV)/.tests  ## build the package and run its programs in a fresh environment
	@$(VENV)/bin/python -m pytest -m wheel tests/test_wheel.py

docs: $(VENV)/.docs  ## build the documentation into site/, and run its snippets and notebooks
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --quiet --strict
	@$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m docs tests/docs tests/notebooks

lint: $(VENV)/.tests  ## check style, formatting and types
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

format: $(VENV)/.tests  ## fix style and formatting
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

clean:  ## remove build and cache files and .venv; keep runs and images
	@rm -rf $(VENV) build dist *.egg-info .cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Recreate the environment if its interpreter is not the one that the user named.
ifneq ($(origin PYTHON),file)
ifneq ($(shell $(PYTHON) -V),$(shell test -x $(VENV)/bin/python && $(VENV)/bin/python -V))
.PHONY: $(VENV)/.created
endif
endif

$(VENV)/.created:
	@command -v $(PYTHON) > /dev/null || { \
	  echo "$(PYTHON): not found. Install Python 3.11, 3.12 or 3.13, or name it: make PYTHON=/path/to/python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) -V 2>&1); aim_jax needs 3.11 to 3.13. Name one: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) -V), once: 1 to 2 minutes, 250 MB of downloads, 1 GB on disk (330 MB and 1 GB more for the tests)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot create environments. On Debian or Ubuntu: apt install python3-venv" >&2; \
	  exit 1; }
	@touch $@

# Install with pinned versions. Prints large downloads only, and the end of the log after a failure.
define install
	@set -o pipefail; $(VENV)/bin/python -m pip install --disable-pip-version-check --progress-bar off \
	  --constraint constraints.txt $(1) 2>&1 | tee $(VENV)/install.log \
	  | awk '/(Downloading|cached) .*[0-9][0-9]\.[0-9] MB\)/ {print} \
	         /^Installing collected/ {print "  Unpacking"} {fflush()}' \
	  || { tail -n 20 $(VENV)/install.log >&2; exit 1; }
	@touch $@
endef

# The package only (enough for the demo), or the package with the test requirements.
$(VENV)/.package: WHAT := .
$(VENV)/.tests: WHAT := .[test]
$(VENV)/.docs: WHAT := .[docs,test]
$(VENV)/.tests: $(VENV)/.cuda
$(VENV)/.package $(VENV)/.tests $(VENV)/.docs: $(VENV)/.created setup.cfg pyproject.toml constraints.txt
	$(call install,--editable '$(WHAT)')
	@echo "$(VENV) is ready."

# JAX's plugin for NVIDIA GPUs compiles kernels and programs without a GPU. Only the tests put this
# folder on their path: JAX tries every plugin installed beside it, and prints a traceback if cuDNN is
# missing.
LINUX := sys_platform == "linux" and platform_machine == "x86_64"
$(VENV)/.cuda: $(VENV)/.created constraints.txt
	@rm -rf $(VENV)/cuda
	$(call install,--no-deps --target $(VENV)/cuda 'jax-cuda13-plugin; $(LINUX)' 'jax-cuda13-pjrt; $(LINUX)')
