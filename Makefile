# The verbs of the project. `make demo` and `make test` install what they need into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-all check lint format types docs bench clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("lm needs Python 3.10 or newer") if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup            ## train the default recipe on real text and generate from it
	test -e checkpoints/stdlib/best || $(BIN)/lm train stdlib
	$(BIN)/lm generate "    def close(self):" -m stdlib --max-tokens 100 --temperature 0.5 --seed 1 </dev/null

test: setup            ## the default suite, a few minutes on two cores
	$(BIN)/python -m pytest -q --durations=10 -m "not slow"

test-all: setup        ## everything, the slow proofs too
	$(BIN)/python -m pytest -q --durations=10

check: lint types docs-check test

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup
	$(BIN)/pyright

docs: setup            ## regenerate docs/cli.md from --help
	$(BIN)/python -m tests.write_docs

docs-check: setup
	$(BIN)/python -m pytest -q tests/test_docs.py

bench: setup           ## every figure of the performance table, or ROWS="train-13m nanogpt"; ROWS=--list
	$(BIN)/python -m tests.bench $(ROWS)

clean:
	rm -rf .venv .pytest_cache .ruff_cache *.egg-info
