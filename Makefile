# Each target sets up .venv first if the active Python lacks requirements-dev.txt.
#   bench       how fast this machine trains, samples and reads: some minutes each, training_step for each of five networks; sampling needs
#               what bash run.sh trains, memory 13 GB, data 8 GB of disk
#   bench-long  the numbers in docs/lab-notes/sampling.md, docs/reproduction.md and docs/reliability.md: hours
SHELL := /usr/bin/env bash
python := python=$$(bash setup.sh requirements-dev.txt) && "$$python"
quick := precision attention layers training_step step_cost published_step data memory scaling scoring sampling
long := solver_orders optimizers training_precision fd_against_nfe guidance soak

.PHONY: test test-slow lint bench bench-long

test:
	$(python) -m pytest

test-slow:
	$(python) -m pytest -m slow

lint:
	$(python) -m ruff check . && "$$python" -m ruff format --check . && "$$python" -m mypy

bench bench-long:
	$(python) -c '' && for name in $(if $(filter bench,$@),$(quick),$(long)); do "$$python" -m benchmarks.$$name || exit; done
