# make demo   the main job from nothing: data, three generators, a noised CLIP, 1024 px samples
# make test   the tests;  make check   linter, formatter, types, architecture
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check format install clean

install: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[mpich,demo,test]"
	touch $(INSTALLED)

demo: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
