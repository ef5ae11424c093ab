# make run   set up .venv, run the main job, say where the report is
# make test  set up .venv, run all tests
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: run test fast check clean

run: $(READY)
	$(BIN)/fedkd run experiments/conf/main.toml

# Tests that start processes of their own, and wait for them, get the machine to themselves.
test: fast
	$(BIN)/python -m pytest -m "slow or integration"

fast: $(READY)
	$(BIN)/python -m pytest -m "not slow and not integration" -n logical --maxprocesses 4 --dist loadfile

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[data,dev]'
	touch $(READY)

clean:
	rm -rf .venv build ./*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
