# The two commands of the README: `make search` and `make test`. Both prepare .venv from requirements.lock first,
# and do not install again while the lock file and pyproject.toml stay as they are.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ORDINARY := not gpu and not interpreter

.PHONY: search test check setup lint lock clean

search: setup
	$(BIN)/archspec search specs/searches/quickstart.yaml $(ARGS)

test: lint
	$(BIN)/python -m pytest -m "$(ORDINARY)" -n 2 --dist worksteal

# The minute-long subset for every commit.
check: lint
	$(BIN)/python -m pytest -m "$(ORDINARY) and not slow" -n 2 --dist worksteal -q

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "archspec needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# Rewrites the lock file from the versions that are installed now: names and versions only.
lock:
	$(BIN)/python -m pip freeze --exclude-editable --all --exclude pip | \
		sed -e 's/+[a-z0-9.]*$$//' -e 's/^\(triton==.*\)$$/\1; sys_platform == "linux"/' > requirements.lock

clean:
	rm -rf $(VENV) build dist *.egg-info
