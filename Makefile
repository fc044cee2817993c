# imgsnap: `make demo` shows the main job, `make test` runs everything. Both work alone, as root,
# on a fresh Debian machine; they say what they install.

VENV := .venv
PY := $(VENV)/bin/python
# make demo IMAGE=docker.io/library/nginx:1.27 CMD='nginx -v'
IMAGE ?=
CMD ?=

.PHONY: setup demo test check bench fmt clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml scripts/setup
	scripts/setup $(VENV)
	@touch $@

demo: setup
	$(PY) demo/demo.py $(if $(IMAGE),--image '$(IMAGE)') $(if $(CMD),--command '$(CMD)')

# The fast tier: no root, no network, no daemons; under a minute.
check: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache
	$(PY) -m pytest -q -n 2 tests/unit

test: check
	$(PY) -m pytest -q -n 2 tests/property tests/integration

bench: setup
	$(PY) perf/run.py

fmt: setup
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .hypothesis
