# `make demo` and `make test` each work as the first and only command: they make the environment they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
# tests that share nothing run on all cores; those that share one cluster, or load a server, run one by one
APART := house unit contract sharded clusters
TOGETHER := ray walk serving
TESTS = $(BIN)/python -m pytest -m "not slow" --durations 25 --durations-min 5
export PYTHON

.PHONY: help install demo test check bench soak clean

help:
	@grep -E '^## ' $(MAKEFILE_LIST) | cut -c4-

## install  make .venv with everything that demo, test and check need
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt tools/venv.sh
	tools/venv.sh $(VENV) dev
	@touch $@

$(VENV)/.bench: $(VENV)/.installed
	tools/venv.sh $(VENV) bench
	@touch $@

# Environments of the peers that cannot live in ours; one that cannot be made is tried again the next time.
$(PEERS)/.installed: constraints.txt tools/peers.sh
	tools/peers.sh $(PEERS)

## demo     the whole path on a synthetic world; ends with a table and demo-out/report.html
demo: install
	$(BIN)/recray demo --out demo-out

## test     every test but the soak
test: install
	OMP_NUM_THREADS=1 $(TESTS) -n auto --dist loadfile $(addprefix tests/,$(APART))
	$(TESTS) $(addprefix tests/,$(TOGETHER))

## check    lint, format, types, and which package may import which
check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

## soak     what is too long for `make test`: the long tests, and the reliability theme in full
soak: install
	$(BIN)/python -m pytest -m slow --timeout 3600 tests
	$(BIN)/python -m benchmarks.reliability --json runs/reliability.json

## bench    every benchmark in its quick form, five minutes each at most
bench: $(VENV)/.bench $(PEERS)/.installed
	@for file in benchmarks/[a-z]*.py; do \
	  name=$$(basename $$file .py); \
	  echo "== $$name" >&2; $(BIN)/python -m benchmarks.$$name --quick || exit 1; \
	done

## clean    remove what was built, not the data
clean:
	rm -rf $(VENV) $(PEERS) build dist demo-out .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
