# make demo    train, lower and run a small network on scanned digits, in C too
# make test    lint, types and the whole test suite
# make clean   remove the environment and every generated file
#
# Both commands create .venv with the pinned set first. PYTHON picks the interpreter, PIP_ARGS adds options for pip.

PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
INPUTS := pyproject.toml constraints.txt

.PHONY: demo test clean

demo: .venv/.examples
	$(BIN)/tbn-compiler demo

test: .venv/.test
	$(BIN)/python -m pytest

.venv/.python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "tbn_compiler needs Python 3.10 or newer")'
	$(PYTHON) -m venv .venv
	touch $@

# One recipe for both extras: .venv/.examples installs ".[examples]", .venv/.test installs ".[test]".
.venv/.examples .venv/.test: .venv/.%: .venv/.python $(INPUTS)
	$(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c constraints.txt -e ".[$*]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info tbn-demo runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
