# `make` lists the targets. Each one makes what it needs first, and nothing twice.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup dev train test soak bench lint clean

VENV := .venv
PYTHON_IN_VENV := $(VENV)/bin/python
# Options for ./setup.sh, e.g. make train SETUP_FLAGS="--accelerator cpu"
SETUP_FLAGS ?=
# Test processes. Each holds a jax of its own and keeps one to two cores busy.
JOBS ?= 2

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## make .venv, if it is missing or not current
	@./setup.sh --venv $(VENV) $(SETUP_FLAGS)

dev:
	@./setup.sh --dev --venv $(VENV) $(SETUP_FLAGS)

train: setup  ## train configs/quickstart.py (about two minutes on a laptop), then print samples
	$(PYTHON_IN_VENV) train.py --config configs/quickstart.py
	$(PYTHON_IN_VENV) sample.py --ckpt runs/quickstart --prompt "class Reader:" --temperature 0.6 --num_samples 2 --max_new_tokens 120

test: lint  ## lint, types and the tests, without those marked slow
	$(PYTHON_IN_VENV) -m pytest -n $(JOBS) --dist worksteal -m "not slow"

soak: dev  ## the tests marked slow, then 200 kills of a training run at random times
	$(PYTHON_IN_VENV) -m pytest -n $(JOBS) --dist worksteal -m slow
	SHEEPOP_JAX_KILLS=$${SHEEPOP_JAX_KILLS:-200} $(PYTHON_IN_VENV) -m pytest -q tests/faults -k random

# Tiny Shakespeare as one file, for time_to_loss; without it that benchmark is left out.
TEXT ?=
bench: setup  ## time training, decoding, loss and start beside PyTorch (half an hour on two cores)
	$(PYTHON_IN_VENV) -m pip install --quiet -r requirements/bench.txt
	$(PYTHON_IN_VENV) benchmarks/train_step.py --shape small
	$(PYTHON_IN_VENV) benchmarks/train_step.py --shape base --remat full none
	$(PYTHON_IN_VENV) benchmarks/decode.py
	$(PYTHON_IN_VENV) benchmarks/quantize.py
	$(PYTHON_IN_VENV) benchmarks/loss.py
	$(PYTHON_IN_VENV) benchmarks/loop.py
	$(PYTHON_IN_VENV) benchmarks/start.py
	$(PYTHON_IN_VENV) benchmarks/scaling.py
	$(if $(TEXT),$(PYTHON_IN_VENV) benchmarks/time_to_loss.py --text $(TEXT))

lint: dev  ## formatting, linter and types
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m ruff format --check .
	$(PYTHON_IN_VENV) -m mypy

clean:  ## remove environments, build output and tool caches; runs/ stays
	rm -rf $(VENV) .ci/.venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
