# `make` lists the targets. Each target first builds its prerequisites if they are missing or outdated.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup dev train test soak bench lint clean

VENV := .venv
PYTHON_IN_VENV := $(VENV)/bin/python
# Options of ./setup.sh, e.g. make train SETUP_FLAGS="--accelerator cpu"
SETUP_FLAGS ?=
# Number of test processes. Each imports its own JAX and uses one to two cores.
JOBS ?= 2

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## create or update .venv
	@./setup.sh --venv $(VENV) $(SETUP_FLAGS)

dev:
	@./setup.sh --dev --venv $(VENV) $(SETUP_FLAGS)

train: setup  ## train configs/quickstart.py (two minutes on a laptop) and print samples
	$(PYTHON_IN_VENV) train.py --config configs/quickstart.py
	$(PYTHON_IN_VENV) sample.py --ckpt runs/quickstart --prompt "class Reader:" --temperature 0.6 --num_samples 2 --max_new_tokens 120

test: lint  ## lint, type check, and run the tests not marked slow
	$(PYTHON_IN_VENV) -m pytest -n $(JOBS) --dist worksteal -m "not slow"

soak: dev  ## run the tests marked slow, then kill a training run at 200 random times
	$(PYTHON_IN_VENV) -m pytest -n $(JOBS) --dist worksteal -m slow
	SHEEPOP_JAX_KILLS=$${SHEEPOP_JAX_KILLS:-200} $(PYTHON_IN_VENV) -m pytest -q tests/faults -k random

# Tiny Shakespeare as one file, for time_to_loss.py; skipped if unset.
TEXT ?=
bench: setup  ## run the benchmarks against PyTorch (half an hour on two cores)
	$(PYTHON_IN_VENV) -m pip install --quiet -r requirements/bench.txt
	$(PYTHON_IN_VENV) benchmarks/train_step.py --shape small
	$(PYTHON_IN_VENV) benchmarks/train_step.py --shape base --remat full none
	$(PYTHON_IN_VENV) benchmarks/decode.py
	$(PYTHON_IN_VENV) benchmarks/serving.py
	$(PYTHON_IN_VENV) benchmarks/quantize.py
	$(PYTHON_IN_VENV) benchmarks/loss.py
	$(PYTHON_IN_VENV) benchmarks/loop.py
	$(PYTHON_IN_VENV) benchmarks/start.py
	$(PYTHON_IN_VENV) benchmarks/scaling.py
	$(if $(TEXT),$(PYTHON_IN_VENV) benchmarks/time_to_loss.py --text $(TEXT))

lint: dev  ## check formatting, lint and types
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m ruff format --check .
	$(PYTHON_IN_VENV) -m mypy

clean:  ## remove environments, build output and tool caches; keep runs/
	rm -rf $(VENV) .ci/.venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
