# `make demo` and `make test` each do all the set-up; a second call is quick.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo lab test bench sync notebooks setup clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

demo: $(READY)  ## search, re-train, compare: ends with the path of an HTML report
	$(BIN)/s3pet demo

lab: $(READY)  ## open JupyterLab on the tutorials
	$(BIN)/s3pet lab nbs/tutorials

test: $(READY)  ## run every notebook, then pytest, two at a time
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev-test --n-workers 2
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(READY)  ## time searches beside trainings; QUICK=1 for ten minutes, OPTIONS="--device cuda"
	$(BIN)/python -m tests.bench $(if $(QUICK),--quick) $(OPTIONS)

notebooks: $(READY)  ## export the library from the notebooks and clean them
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev-export
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev-clean

sync: $(READY)  ## check that notebooks are clean and in sync with the library
	find s3pet_nb -name '*.py' ! -name '__init__.py' -delete
	$(MAKE) --no-print-directory notebooks
	@test -z "$$(git status --porcelain -- nbs s3pet_nb)" || { git status --short -- nbs s3pet_nb; \
		echo "notebooks and library differ: run 'make notebooks' and commit both" >&2; exit 1; }

setup: $(READY)  ## create .venv with the pinned packages

# Not pyproject.toml: nbdev writes it anew at each export, and what is installed is said in settings.ini.
$(READY): settings.ini setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "no python3 found: install Python 3.11 or newer, or give PYTHON=path" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is older than Python 3.11: give another one, as in 'make demo PYTHON=python3.11'" >&2; exit 1; }
	@echo "installing into $(VENV): a few minutes the first time"
	test -x $(BIN)/pip || "$(PYTHON)" -m venv $(VENV) || { "$(PYTHON)" -m venv --clear --without-pip $(VENV) && \
		"$(PYTHON)" -m pip --python $(BIN)/python install --quiet pip; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	@touch $@

clean:  ## remove .venv and caches; reports stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
