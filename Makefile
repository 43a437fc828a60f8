# make demo    train, lower and run a small network on scanned digits, in C too
# make test    lint, types and the whole test suite
# make docs    the documentation as a site, in site/
# make clean   remove the environment and every generated file
#
# These commands create .venv with the pinned set first. PYTHON picks the interpreter, PIP_ARGS adds options for pip.

PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS)
# What the installed package is made of; everything else is used in place.
INPUTS := pyproject.toml constraints.txt setup.py $(wildcard tbn_compiler/backends/cpu/src/*)

.PHONY: demo test docs clean

demo: .venv/.examples
	$(BIN)/tbn-compiler demo

test: .venv/.test
	$(BIN)/python -m pytest -n auto

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.venv/.python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "tbn_compiler needs Python 3.10 or newer")'
	$(PYTHON) -m venv .venv
	touch $@

.venv/.examples: .venv/.python $(INPUTS)
	$(PIP) -c constraints.txt -e ".[examples]"
	touch $@

.venv/.docs: .venv/.python $(INPUTS)
	$(PIP) -c constraints.txt -e ".[docs]"
	touch $@

# vit-pytorch asks for torchvision, which its ViT does not use and which has no build for every torch.
.venv/.test: .venv/.python $(INPUTS)
	$(PIP) -c constraints.txt -e ".[test]"
	$(PIP) -c constraints.txt --no-deps vit-pytorch
	touch $@

clean:
	rm -rf .venv build dist site tbn_compiler/backends/cpu/_tbn_cpu* *.egg-info tbn-demo runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
