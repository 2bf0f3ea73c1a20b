# Everything a developer, CI and a first-time user run. `make help` lists it.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat requirements/dev.txt pyproject.toml 2>/dev/null | sha256sum | cut -c1-16)
PYTEST := $(BIN)/python -m pytest
WORKERS ?= 2
SIZE ?= 200
SECONDS ?= 3600

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 14

.PHONY: setup
setup: $(STAMP) ## make .venv with all that running and testing need

$(STAMP): requirements/dev.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --require-hashes --requirement requirements/dev.txt
	$(BIN)/python -m pip install -qq --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/.installed-* && touch $@

.PHONY: demo
demo: setup ## start the service, checkpoint real data, lose the disk, restore, verify
	$(BIN)/bop-checkpoint demo

.PHONY: run
run: setup ## serve on 127.0.0.1:8600 with ./data
	BOP_LOG_FORMAT=console $(BIN)/bop-checkpoint serve

.PHONY: format
format: setup ## format the code
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

.PHONY: lint
lint: setup ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: check
check: lint ## lint, and the unit tests
	$(PYTEST) tests/unit -n $(WORKERS) -q

.PHONY: tools
tools: setup ## what has no place among the pins: promtool, strace, checkov
	@ops/tools.sh

.PHONY: test
test: lint tools ## all of it: lint, unit, integration and fault tests, with coverage; planted mutants
	rm -f .coverage .coverage.*
	$(PYTEST) tests/unit tests/integration tests/ops -n $(WORKERS) --dist loadgroup -q --cov=app --cov-branch --cov-report=term:skip-covered --cov-fail-under=90
	$(PYTEST) tests/fault tests/simulation tests/fuzz tests/mutants -n $(WORKERS) --dist loadgroup -q

.PHONY: fault
fault: setup ## kills, power cuts, disk and network faults, simulation, hostile bytes
	$(PYTEST) tests/fault tests/simulation tests/fuzz -n $(WORKERS) --dist loadgroup -q

.PHONY: mutants
mutants: setup ## take one protection out after another, and see the test aimed at it fail
	$(BIN)/python -m tests.mutants

.PHONY: soak
soak: setup ## everything at once for SECONDS, and whether anything grows
	$(BIN)/python -m benchmarks.load soak --seconds $(SECONDS)

.PHONY: torture
torture: setup ## SIZE random kills, and 25 times as many simulated seeds
	BOP_TORTURE_SIZE=$(SIZE) $(PYTEST) tests/fault/test_torture.py tests/simulation -m long -s -v

.PHONY: mutation
mutation: setup ## change the policies in every small way: which changes does no unit test notice?
	rm -rf mutants
	nice $(BIN)/mutmut run --max-children $(WORKERS)
	$(BIN)/python -m tests.mutation.table

.PHONY: dashboards
dashboards: setup ## make the Grafana dashboards, and the chart's copies of them and of the alerts
	$(BIN)/python -m ops.grafana.generate

.PHONY: bench
bench: setup ## ratios against raw ceilings measured in the same run
	$(BIN)/python -m benchmarks

.PHONY: load
load: setup ## load scenarios at a small size; python -m benchmarks.load --help for more
	$(BIN)/python -m benchmarks.load

.PHONY: pins
pins: setup ## compile requirements/*.txt anew: versions and hashes, no addresses
	$(BIN)/uv pip compile --quiet --generate-hashes --no-emit-index-url --no-annotate --no-header --no-strip-extras --python-version 3.11 requirements/run.in -o requirements/run.txt
	$(BIN)/uv pip compile --quiet --generate-hashes --no-emit-index-url --no-annotate --no-header --no-strip-extras --python-version 3.11 --constraint requirements/run.txt requirements/dev.in -o requirements/dev.txt

.PHONY: clean
clean: ## remove what the targets made, the virtual environment included
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.*
