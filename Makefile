# test, test-slow, lint, bench (which takes hours, and needs what bash run.sh trains); each sets up .venv first if the active Python lacks requirements-dev.txt.
SHELL := /usr/bin/env bash
python := python=$$(bash setup.sh requirements-dev.txt) && "$$python"

.PHONY: test test-slow lint bench

test:
	$(python) -m pytest

test-slow:
	$(python) -m pytest -m slow

lint:
	$(python) -m ruff check . && "$$python" -m ruff format --check . && "$$python" -m mypy

bench:
	$(python) -c '' && for file in benchmarks/[^_]*.py; do name=$${file##*/}; "$$python" -m "benchmarks.$${name%.py}" || exit; done
