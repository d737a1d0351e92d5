# Every target does all the set-up it needs, from a fresh clone with nothing but Python and make.
# PYTHON chooses the interpreter of the environment, VENV its place:  make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
# Tests that run at the same time; each takes up to 3 GB of memory.
WORKERS ?= 2

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help venv demo test wheel-test lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.package  ## create .venv with the package (editable)

demo: venv  ## sample labelled grids from the bundled models
	@$(VENV)/bin/aim-jax demo

test: $(VENV)/.tests  ## run the tests; `.venv/bin/pytest -m slow` runs those this leaves out
	@$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -rs

wheel-test: $(VENV)/.tests  ## build the package, and run its programs in a fresh environment
	@$(VENV)/bin/python -m pytest -m wheel tests/test_wheel.py

lint: $(VENV)/.tests  ## check style, formatting, and the types of the public modules
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

format: $(VENV)/.tests  ## mend style and formatting
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

clean:  ## remove what make and the tools wrote, .venv included; runs and pictures stay
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An interpreter named by the user must be the one inside the environment.
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
	@echo "Creating $(VENV) with $$($(PYTHON) -V): 1 to 2 minutes, once (250 MB to download, 1 GB on disk; for the tests 330 MB and 1 GB more)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot create environments. On Debian or Ubuntu: apt install python3-venv" >&2; \
	  exit 1; }
	@touch $@

# pip with the pinned versions. The screen gets the large downloads, and after a failure the end of
# the log.
define install
	@set -o pipefail; $(VENV)/bin/python -m pip install --disable-pip-version-check --progress-bar off \
	  --constraint constraints.txt $(1) 2>&1 | tee $(VENV)/install.log \
	  | awk '/(Downloading|cached) .*[0-9][0-9]\.[0-9] MB\)/ {print} \
	         /^Installing collected/ {print "  Unpacking"} {fflush()}' \
	  || { tail -n 20 $(VENV)/install.log >&2; exit 1; }
	@touch $@
endef

# The package alone, which is all that the demo needs, or with what the tests need.
$(VENV)/.package: WHAT := .
$(VENV)/.tests: WHAT := .[test]
$(VENV)/.tests: $(VENV)/.cuda
$(VENV)/.package $(VENV)/.tests: $(VENV)/.created setup.cfg pyproject.toml constraints.txt
	$(call install,--editable '$(WHAT)')
	@echo "$(VENV) is ready."

# JAX's plugin for NVIDIA GPUs compiles kernels and programs without a GPU. The tests alone put this
# folder on their path: a plugin beside jax is tried whenever a program starts JAX, and where cuDNN
# is missing that prints a traceback.
LINUX := sys_platform == "linux" and platform_machine == "x86_64"
$(VENV)/.cuda: $(VENV)/.created constraints.txt
	@rm -rf $(VENV)/cuda
	$(call install,--no-deps --target $(VENV)/cuda 'jax-cuda13-plugin; $(LINUX)' 'jax-cuda13-pjrt; $(LINUX)')
