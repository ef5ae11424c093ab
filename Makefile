# make run   set up .venv, run the main job, say where the report is
# make test  set up .venv, run all tests
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: run test fast check clean

run: $(READY)
	$(BIN)/fedkd run experiments/conf/main.toml

test: $(READY)
	$(BIN)/python -m pytest

fast: $(READY)
	$(BIN)/python -m pytest -m "not slow and not integration"

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
