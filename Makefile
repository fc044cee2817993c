# imgsnap: `make demo` shows the main job, `make test` runs everything. Both work alone, as root,
# on a fresh Debian machine; they say what they install.

VENV := .venv
PY := $(VENV)/bin/python
# make demo IMAGE=docker.io/library/nginx:1.27 CMD='nginx -v'
IMAGE ?=
CMD ?=

# How long `make stress` and `make fuzz` go on, each part of them.
SECONDS ?= 60

.PHONY: setup setup-tests demo demo-vm test check stress fuzz bench fmt clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml scripts/setup
	scripts/setup $(VENV)
	@touch $@

# What only the tests run: a browser, containerd.
setup-tests: $(VENV)/.installed-tests

$(VENV)/.installed-tests: pyproject.toml scripts/setup
	scripts/setup $(VENV) tests
	@touch $(VENV)/.installed $@

demo: setup
	$(PY) demo/demo.py $(if $(IMAGE),--image '$(IMAGE)') $(if $(CMD),--command '$(CMD)')

# A microVM that boots from its snapshot; IMAGE and CMD as for demo.
demo-vm: setup
	$(PY) demo/vm.py $(if $(IMAGE),--image '$(IMAGE)') $(if $(CMD),--command '$(CMD)')

# The fast tier: no root, no network, no daemons; under a minute.
check: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache
	$(PY) -m pytest -q -n 2 tests/unit

test: setup-tests check
	$(PY) -m pytest -q -n 2 tests/property tests/fuzz tests/conformance tests/integration

# What takes long: every script in tests/stress, for SECONDS each.
stress: setup-tests
	STRESS_SECONDS=$(SECONDS) $(PY) -m pytest -q --timeout 0 tests/stress

# Every parser that a registry or a user reaches; what breaks one is kept in tests/fuzz/corpus.
fuzz: setup
	$(PY) -m tests.fuzz --seconds $(SECONDS)

bench: setup
	$(PY) perf/run.py

fmt: setup
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .hypothesis
