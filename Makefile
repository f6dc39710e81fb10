# Each target first creates .venv if the active Python lacks the packages in requirements-dev.txt.
#   bench       speed of training, sampling and data loading on this machine. Each benchmark takes a few minutes;
#               training_step takes a few minutes for each of five networks. sampling needs the model that
#               `bash run.sh` trains, memory needs 13 GB, and data needs 8 GB of disk.
#   bench-gpu   the same on a GPU: training, sampling, encoding and scoring. The goal is ten minutes.
#   test-gpu    tests on a GPU. The goal is ten minutes. LFM_GPU_TEST_DEVICE=cpu checks the tests themselves.
#   test-demo   the demo page in Chromium. Needs the packages and the browser that docs/demo.md names.
#   docs        the documentation site, in site/. Open site/index.html; no server is needed.
#   bench-long  the measurements in docs/lab-notes/sampling.md, docs/reproduction.md and docs/reliability.md. Takes hours.
SHELL := /usr/bin/env bash
python := python=$$(bash setup.sh requirements-dev.txt) && "$$python"
quick := precision attention layers exact_velocity training_step step_cost published_step published_networks data memory scaling scoring busy_machine sampling
long := autoencoder_speed solver_orders optimizers recipe recipe_cost few_steps few_step_cost training_precision fd_against_nfe guidance soak
gpu := gpu

.PHONY: test test-slow test-gpu test-demo lint docs bench bench-gpu bench-long

test:
	$(python) -m pytest

test-slow:
	$(python) -m pytest -m slow

test-gpu:
	$(python) -m pytest -m gpu tests/gpu

test-demo:
	$(python) -m pytest -m browser tests/demo_page

lint:
	$(python) -m ruff check . && "$$python" -m ruff format --check . && "$$python" -m mypy

docs:
	$(python) && NO_MKDOCS_2_WARNING=1 "$$python" -m mkdocs build --strict

bench-gpu:
	$(python) -m benchmarks.$(gpu)

bench bench-long:
	$(python) -c '' && for name in $(if $(filter bench,$@),$(quick),$(long)); do "$$python" -m benchmarks.$$name || exit; done
