# Fleet Commander. Every target makes the virtual environment that it needs first (see tools/environment.py).
#
#   make up ARGS="--port 9000"      arguments go to the command
#   make test TESTS=tests/bridge    a part of the tests;  PYTEST_ARGS="-k sunset -x" for more
#   make check PY=/path/to/python   with an environment that is already there

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory

# The first Python that is new enough; tools/environment.py says what to do where there is none.
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "$$name"; exit; fi; done; echo python3)

# Where PY is given, its environment is used as it is.
ifeq ($(origin PY),undefined)
RUNTIME := venv
DEV := venv-dev
PY := .venv/bin/python
endif
BIN := $(dir $(PY))

ARGS ?=
TESTS ?= tests
PYTEST_ARGS ?=
# On two cores: more than half of what tests do is waiting for the processes that they start.
WORKERS ?= 3
# Files for check-types; all of [tool.mypy] files where empty.
TYPES ?=

# The tree that is checked, wherever the environment's own copy of the project lies.
check%: export PYTHONPATH := $(CURDIR):$(CURDIR)/clients/python

# A fleet has many processes, and tests start hundreds: each of them would compile the project again.
unexport PYTHONDONTWRITEBYTECODE

CHECKS := check-lint check-format check-types check-imports check-drift check-proto check-breaking

.PHONY: help up test check $(CHECKS) bench chaos soak generate baseline lock format venv venv-dev
.DEFAULT_GOAL := help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

up: $(RUNTIME) ## Start Fleet Commander here: server, agent, store, all in the foreground
	@exec $(BIN)fleet up $(ARGS)

test: $(DEV) ## Run every test
	@$(PY) -m pytest $(TESTS) -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 15 $(PYTEST_ARGS)

check: $(DEV) ## Lint, format, types, imports between rooms, generated code, protos
	@$(MAKE) --keep-going PY=$(PY) $(CHECKS)

check-lint: $(DEV)
	@$(PY) -m ruff check .

check-format: $(DEV)
	@$(PY) -m ruff format --check .

check-types: $(DEV)
	@$(PY) -m mypy $(TYPES)

check-imports: $(DEV)
	@$(BIN)lint-imports

check-drift: $(DEV)
	@$(PY) proto/generate.py --check

check-proto: $(DEV)
	@image=$$(mktemp -d) && trap 'rm -r "$$image"' EXIT && \
	$(PY) proto/generate.py --image "$$image/image.binpb" && $(BIN)buf lint "$$image/image.binpb"

check-breaking: $(DEV)
	@image=$$(mktemp -d) && trap 'rm -r "$$image"' EXIT && \
	$(PY) proto/generate.py --image "$$image/image.binpb" && \
	$(BIN)buf breaking "$$image/image.binpb" --against proto/baseline.binpb

bench: $(DEV) ## Run the benchmarks (ARGS=codec: one of bench/)
	@$(PY) -m bench $(ARGS)

chaos: $(DEV) ## Kill, cut and stop parts of a fleet in 20 trials, mutants and 50 power cuts (ARGS="--seeds 3": see --help)
	@$(PY) -m tests.chaos $(ARGS)
	@FLEET_POWER_CUTS=50 $(PY) -m pytest tests/chaos/test_power.py -q

soak: $(DEV) ## The long forms of tests that `make test` runs short: state machine, webhooks, codec, outputs without S3, lost ComfyUI nodes, commands
	@FLEET_STATE_STEPS=100000 FLEET_WEBHOOK_COUNT=20000 FLEET_CODEC_MESSAGES=50000 FLEET_SOAK_GENERATIONS=500 \
	FLEET_COMFY_LEASE=full FLEET_NODE_LOSS=full FLEET_COMMANDS=10000 FLEET_DEPLOYS=50 \
	$(PY) -m pytest tests/store/test_machine.py tests/webhooks/test_many.py tests/protojson/test_differential.py \
	tests/outputs/test_soak.py tests/nodes/test_node_loss.py tests/comfy/test_fleet.py \
	tests/commands/test_never_twice.py tests/containers/test_deploy_once.py \
	-n $(WORKERS) --timeout 0 --durations 15 $(PYTEST_ARGS)

generate: $(DEV) ## Make the Python stubs from the protos again
	@$(PY) proto/generate.py

baseline: $(DEV) ## Let the baseline of buf breaking grow to today's protos; refused where they break it
	@$(MAKE) PY=$(PY) check-breaking
	@$(PY) proto/generate.py --image proto/baseline.binpb

lock: $(DEV) ## Resolve the dependencies again (UPGRADE=1: to their newest versions)
	@$(PY) tools/lock.py $(if $(UPGRADE),--upgrade)

format: $(DEV) ## Format the code, and mend what ruff can
	@$(PY) -m ruff check --fix-only --quiet . && $(PY) -m ruff format .

venv:
	@$(PYTHON) tools/environment.py runtime

venv-dev:
	@$(PYTHON) tools/environment.py dev
