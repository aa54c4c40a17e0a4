# demo  train an LSTM on sequential digits; pictures in demo/
# quick the tests that most changes need
# test  the whole test suite (GPU tests skip where there is no GPU)
# guards the tests of compiled and emulated kernels, which `test` skips while what they depend on is as it was
# lint  ruff and clang-format, in check mode; `make format` applies them
# docs  the reference and the guides as HTML in docs/build/html; a warning is an error
# bench the benchmarks, JSON in bench/results/
# gpu   build, test and bench with the Python that is already there: no venv, no downloads; STAGES= takes some of it
# wheels the sdist and the wheels of a release, in dist/
# clean remove the results of the others

PYTHON ?= python3
VENV   ?= .venv
# The PyTorch that pip installs, e.g. make test TORCH=torch==2.13.0
TORCH  ?= torch
# and the NumPy: the interpreters of Triton 3.5 and 3.6 need 'numpy<2.4'
NUMPY  ?= numpy
# Test processes side by side. One thread each: more threads are slower on small tensors.
JOBS   ?= 2
# Passed on to pytest, e.g. make test PYTEST_ARGS="-k lengths -x"
PYTEST_ARGS ?=
# For `make gpu`: the folder of its logs and JSON, its stages, and the seconds after which a stage is interrupted
OUT    ?= bench/results
STAGES ?= build kernels tune latency bench features rivals sanitize test
LIMIT  ?= 560
CORES  ?= $(shell nproc)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := test
.PHONY: base packages library demo quick test guards lint format docs bench gpu wheels clean \
    gpu-build gpu-kernels gpu-tune gpu-latency gpu-bench gpu-features gpu-rivals gpu-sanitize gpu-test

VENV_BIN := $(abspath $(VENV))/bin
# Bytecode is kept even where the caller's environment says not to: the tests start many processes.
RUN      := PYTHONDONTWRITEBYTECODE= PATH="$(VENV_BIN):$$PATH" $(VENV_BIN)/python
# A package's bytecode is made where a module is imported: most of a package never is.
PIP      := $(RUN) -m pip install --quiet --no-compile
SOURCES  := $(sort $(shell find csrc -path csrc/torch -prune -o -type f -print 2>/dev/null))
CXX_SOURCES := $(filter %.h %.hpp %.cpp %.cc %.cu %.cuh,$(SOURCES)) $(wildcard bench/*.cu tests/emulator/*)

# One stamp per value of TORCH, so that asking for another PyTorch installs it.
ASKED    := $(shell cksum <<<'$(TORCH) $(NUMPY)' | cut -d' ' -f1)
BASE     := $(VENV)/.base
LINTERS  := $(VENV)/.linters
RELEASE  := $(VENV)/.release
PACKAGES := $(VENV)/.packages-$(ASKED)
SPHINX   := $(VENV)/.sphinx-$(ASKED)
LIBRARY  := $(VENV)/.library
READY    := $(VENV)/.ready-$(ASKED)

$(BASE):
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1' 'setuptools>=77' wheel ninja
	touch $@

$(LINTERS): $(BASE) pyproject.toml
	$(PIP) --group dev
	touch $@

$(RELEASE): $(BASE) pyproject.toml
	$(RUN) -m pip install --quiet --group release
	touch $@

# What fastrnn needs, and fastrnn without its libraries.
$(PACKAGES): $(BASE) pyproject.toml
	rm -f $(VENV)/.packages-* $(VENV)/.ready-*
	FASTRNN_BUILD_CPU=0 FASTRNN_BUILD_CUDA=0 $(PIP) --no-build-isolation '$(TORCH)' '$(NUMPY)' -e '.[test]'
	touch $@

# The C++ library in fastrnn/, which needs no torch: .ci/run compiles it while pip installs.
$(LIBRARY): $(BASE) setup.py $(SOURCES)
	FASTRNN_BUILD_CUDA=0 $(RUN) setup.py --quiet build_ext --inplace
	touch $@

# The install keeps that library, and adds that of CUDA where it can be built.
$(READY): $(PACKAGES) $(LIBRARY)
	rm -f $(VENV)/.ready-*
	$(RUN) -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

# The steps of .ci/run: what downloads, and what compiles.
base: $(BASE)
packages: $(PACKAGES) $(SPHINX)
library: $(LIBRARY)

demo: $(READY)
	$(RUN) -m fastrnn train --out demo

# pytest-benchmark is switched off: it warns under xdist, and nothing in tests/ is timed.
test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests -n $(JOBS) --dist worksteal -p no:benchmark $(PYTEST_ARGS)

# Without the tests that are marked slow.
quick: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests -m 'not slow' -n $(JOBS) --dist worksteal -p no:benchmark $(PYTEST_ARGS)

# The tests of compiled and emulated kernels, which `test` skips while their sources and tools are those that passed.
guards: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests --guards -n $(JOBS) --dist loadfile -p no:benchmark $(PYTEST_ARGS)

lint: $(LINTERS)
	$(VENV_BIN)/ruff check .
	$(VENV_BIN)/ruff format --check .
	$(if $(CXX_SOURCES),$(VENV_BIN)/clang-format --dry-run --Werror $(CXX_SOURCES))

format: $(LINTERS)
	$(VENV_BIN)/ruff check --fix .
	$(VENV_BIN)/ruff format .
	$(if $(CXX_SOURCES),$(VENV_BIN)/clang-format -i $(CXX_SOURCES))

$(SPHINX): $(PACKAGES)
	$(PIP) --group docs
	touch $@

docs: $(READY) $(SPHINX)
	$(RUN) -m sphinx -q -W --keep-going -b html docs docs/build/html

bench: $(READY)
	mkdir -p bench/results
	$(RUN) -m pytest bench --records=bench/results/bench-cpu.json $(PYTEST_ARGS)

# Every stage runs, even after one that failed; the exit codes come last. Test processes share the GPU, since they mostly
# compile. A test that failed there runs once more alone: kernels wait for each other for a bounded time, and might not
# get the GPU within it. A benchmark never shares the GPU.
gpu: export FASTRNN_TEST_DEVICE := cuda
gpu: export PYTHONUNBUFFERED := 1
gpu: export PATH := $(PATH):/usr/local/cuda/bin
gpu:
	@mkdir -p '$(OUT)'; unset TRITON_INTERPRET; failed=0; summary=; \
	for stage in $(STAGES); do \
	    echo "== $$stage"; code=0; begin=$$SECONDS; \
	    timeout -s INT -k 15 $(LIMIT) $(MAKE) --no-print-directory "gpu-$$stage" 2>&1 | tee "$(OUT)/$$stage.log" \
	        || code=$$?; \
	    summary+="$$stage: exit code $$code, $$((SECONDS - begin)) s"$$'\n'; [ $$code = 0 ] || failed=1; \
	done; \
	printf '== summary\n%s' "$$summary"; exit $$failed

GPU_TESTS = OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests -v -p no:benchmark --durations=20 --tb=short \
    --max-worker-restart=100 $(PYTEST_ARGS)
GPU_BENCH = $(PYTHON) -m pytest --records='$(OUT)/$(1).json' $(PYTEST_ARGS)
WARM      = timeout -k 5 120 $(PYTHON) -m bench.warm
# A small case of each kind of kernel, for compute-sanitizer.
SANITIZED := gpu_equals_the_reference and lstm and bfloat16 and forward and 40 \
    or grouped_equals_stepwise and lstm and bfloat16 and all

gpu-build:
	$(PYTHON) -m pip install --no-index --no-build-isolation --no-deps -e .
# The kernels themselves, natively: they must be right before any figure counts.
gpu-kernels:
	$(GPU_TESTS) -m gpu -n $(CORES) --dist worksteal || { echo '== once more, alone, what failed side by side'; \
	    $(GPU_TESTS) -m gpu -n 1 --lf --lfnf=none; }
# Which kernels are right and faster than torch.nn here; the record says why not of the others.
gpu-tune:
	$(PYTHON) -m fastrnn tune --device cuda --minutes 6 --dtype bfloat16 --dtype float32 --out '$(OUT)/tune-gpu.json'
	$(PYTHON) -m fastrnn info
gpu-latency:
	$(PYTHON) -m bench.latency '$(OUT)'
gpu-bench:
	-$(WARM) throughput
	$(call GPU_BENCH,bench-gpu) bench/bench_scan.py
gpu-features:
	-$(WARM) features
	$(call GPU_BENCH,features-gpu) bench/bench_features.py
gpu-rivals:
	-$(WARM) rivals
	$(call GPU_BENCH,rivals-gpu) bench/bench_rivals.py
gpu-sanitize:
	failed=0; for tool in memcheck racecheck; do \
	    compute-sanitizer --tool $$tool --error-exitcode 9 $(PYTHON) -m pytest -p no:benchmark -k '$(SANITIZED)' \
	        tests/test_csrc_persistent_gpu.py tests/test_kernels.py || failed=$$?; \
	done; exit $$failed
# The tests that need no GPU.
gpu-test:
	$(GPU_TESTS) -m 'not gpu' -n $(CORES) --dist worksteal

wheels: $(RELEASE)
	PATH="$(VENV_BIN):$$PATH" .ci/wheels.sh

clean:
	rm -rf $(VENV) build dist demo docs/build *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f bench/results/*.log fastrnn/*.so
	find bench csrc experiments fastrnn kernels tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
