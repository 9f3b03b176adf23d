# Everything a newcomer needs: `make demo`, `make ui`, `make test`. Each sets up what is missing.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# A process for each core, at most four: each makes the bundles that its tests share. Files begin in their own order.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Files or folders to test, and the extras that they need.
TESTS ?= tests
EXTRAS ?= export,openvino,tensorrt-rtx,coreml,signing,tls,http,ui,plots,constrained,metrics,tracing,top,ray,devices,reference,dev
STAMP := $(VENV)/.installed
# Tests start many programs. Without files of compiled code each compiles our modules again.
unexport PYTHONDONTWRITEBYTECODE
DOCS := $(VENV)/.docs

.PHONY: demo ui test test-full soak check docs format proto clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

# The main job: both samples built at int8, served, a picture drawn, a question asked about it.
demo: $(STAMP)
	$(BIN)/python -m export.demo

# The same samples with the web page, which says where it is.
ui: $(STAMP)
	$(BIN)/python -m export.demo ui

test: $(STAMP)
	$(PYTEST) -m "not full" $(TESTS)

test-full: $(STAMP)
	$(PYTEST) --hypothesis-profile explore $(TESTS)

# 10,000 requests of 64 clients to one server, a third of them stopped at random, in at most 20 minutes.
SOAK ?= 10000
soak: $(STAMP)
	ENGINECAST_SOAK_REQUESTS=$(SOAK) $(BIN)/python -m pytest -q -s -m full tests/serving/test_soak.py

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vulture

# The documentation, in build/site; warnings are errors.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: $(STAMP)
	$(BIN)/python -m serving.generate

clean:
	rm -rf $(VENV) bundles build dist
