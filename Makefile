# Everything a newcomer needs: `make demo`, `make test`. Each sets up what is missing.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# A process for each core, at most four: each makes the bundles that its tests share.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile
STAMP := $(VENV)/.installed

.PHONY: demo test test-full check format proto clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[export,openvino,tensorrt-rtx,coreml,signing,devices,dev]"
	touch $@

# The main job: both samples built at int8, served, a picture drawn, a question asked about it.
demo: $(STAMP)
	$(BIN)/python -m export.demo

test: $(STAMP)
	$(PYTEST) -m "not full"

test-full: $(STAMP)
	$(PYTEST)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: $(STAMP)
	$(BIN)/python -m serving.generate

clean:
	rm -rf $(VENV) bundles build dist
