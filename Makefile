# The two commands of this project are `make up` and `make test`; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
# The first interpreter that runs and is new enough (a name on PATH may be a shim without one behind it).
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
RUN := $(VENV)/.installed
RUN_DEV := $(VENV)/.installed-dev

# Of pip's output what says how far it is.
SHORT := sed -u -n -E -e 's/^(Installing collected packages|Successfully installed).*/  \1/p; t' \
	-e 's/^(Collecting|Obtaining|Downloading|Building|Successfully|  Downloading)/  &/p'
# Runs beside pip, which is silent for a minute while it unpacks: how long it has been at it, and how much is there.
TICK = begun=$$SECONDS; (while sleep 10 >/dev/null; do \
	echo "  ... $$((SECONDS - begun)) s, $$(du -sm $(VENV) 2>/dev/null | cut -f1) MB in $(VENV)"; done) & \
	tick=$$!; trap 'kill $$tick 2>/dev/null || true' EXIT

# What is not compiled once is compiled by each of the hundred processes that tests start.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help up test test-fast test-clients test-peers lint format docs golden clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 20

up: $(RUN)  ## install what is missing, get the default model, start router + prefill + decode (ARGS="--port 9000 ...")
	@$(BIN)/python -m compileall -q pd_serve
	@exec $(BIN)/pd-serve up $(ARGS)

# Lint runs beside the tests, which wait much. It is heard of only if it fails, after them.
test: $(RUN_DEV)  ## lint, types, generated docs, and all tests, four files at a time (ARGS="-k router ...")
	@tests/packages.sh
	@tests/deploy/helm.sh $(BIN)/python $(BIN)
	@$(BIN)/python -m compileall -q pd_serve
	@$(BIN)/python -m tests.precompile
	@said=$$(mktemp); $(MAKE) --no-print-directory lint >"$$said" 2>&1 & lint=$$!; \
	trap 'kill $$lint 2>/dev/null || true; rm -f "$$said"' EXIT; \
	tests=0; $(BIN)/python -m pytest $(or $(ARGS),-n 4) || tests=$$?; \
	wait $$lint || { cat "$$said"; echo "make test: lint failed, as said above" >&2; exit 1; }; \
	exit $$tests

test-fast: $(RUN_DEV)  ## tests without kills, real models and node processes, four files at a time
	@$(BIN)/python -m pytest -m "not slow" -n 4 $(ARGS)

test-clients: $(RUN)  ## the clients of docs/clients.md against the default model, each in an environment of its own (ARGS="openai npm")
	@tests/clients/run.sh $(BIN)/python .venv-clients $(ARGS)

test-peers: $(RUN_DEV)  ## the router and the connector with real vLLM servers (CPU), in an environment of their own
	@tests/peers/run.sh $(BIN)/python .venv-peers $(ARGS)

lint: $(RUN_DEV)  ## ruff, mypy, hadolint, and whether docs/configuration.md is up to date
	@$(BIN)/python -m compileall -q pd_serve
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/hadolint deploy/docker/Dockerfile
	@$(BIN)/python -m pd_serve.config --check docs/configuration.md

format: $(RUN_DEV)  ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(RUN)  ## write docs/configuration.md anew
	@$(BIN)/python -m pd_serve.config docs/configuration.md

golden: $(RUN_DEV)  ## write tests/wire/golden.txt anew, after a meant change of what processes say to each other
	@$(BIN)/python -m tests.wire.golden

clean:  ## remove the environment and caches
	rm -rf $(VENV) build ./*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "pd-serve needs Python 3.11, 3.12 or 3.13: install one, or name it with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# pip byte-compiles what it installs, whatever PYTHONDONTWRITEBYTECODE says; without it every start would take seconds longer.
# Of what tests need most is never imported: tests/precompile.py compiles what all of them do, the rest is when it is used.
$(RUN): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing pd-serve into $(VENV) (a minute or two the first time) ..."
	@$(TICK); $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[structured]' | $(SHORT)
	@touch $@

$(RUN_DEV): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing pd-serve and its test tools into $(VENV) (a minute or two the first time) ..."
	@$(TICK); $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --no-compile -c constraints.txt -e '.[test,dev]' | $(SHORT)
	@touch $@ $(RUN)
