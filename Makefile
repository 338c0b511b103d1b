# The two main targets are `make demo` and `make test`. Both set up the environment first.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
TORCH ?= -r requirements/torch.txt
TORCH_INDEX_URL ?=
PIP_OPTIONS ?=
RECIS_CUDA ?= auto
CXX ?= g++
DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?= --quick
TFRA_PYTHON ?= python3.11
WORKERS ?= logical
SOAK ?= 25
export RECIS_CUDA CXX

PY := $(VENV)/bin/python
PYTEST = $(PY) -m pytest --numprocesses=$(WORKERS) --maxprocesses=4 --dist=loadfile
PIP_INSTALL = $(PY) -m pip --disable-pip-version-check install $(PIP_OPTIONS)
# Reduce pip's output to one line per package; errors and warnings go to stderr.
PIP_SHORT = sed -un -e 's/ (from .*//' -e 's/^ *\(Downloading\|Using cached\|Processing\) \(.*\/\)\?/  /p' \
  -e 's/^Installing collected packages.*/  installing all packages/p'
STAMPS := $(VENV)/stamps
DEPENDENCIES := $(STAMPS)/dependencies
EDITABLE := $(STAMPS)/editable
NATIVE := build/native.stamp
NATIVE_SOURCES := setup.py $(shell find csrc -type f 2>/dev/null)
# TFRA has wheels only for Python 3.11 and older; without such a Python the benchmarks report it as absent.
PEERS := build/peers/fbgemm/ready build/peers/fbgemm/torchrec build/peers/interop/ready build/peers/keras_rs/ready $(if $(shell $(TFRA_PYTHON) -V 2>/dev/null),build/peers/tfra/ready)
CXX_FILES = $(shell find csrc benchmarks -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

.PHONY: help demo test test-quick emulated soak mutants faults agreement rehearsal lint format docs cuda-build aarch64 sanitize \
  bench bench-peers wheel clean setup FORCE

help:  ## List the targets and settings
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20
	@printf '%s\n' '' 'Settings, as in `make test PYTHON=python3.12`, with defaults in parentheses:' \
	  '  PYTHON           Python of the environment, 3.11 to 3.14 (python3)' \
	  '  VENV             folder of the environment (.venv)' \
	  '  TORCH            requirement for torch, e.g. torch==2.11.0 (-r requirements/torch.txt)' \
	  '  TORCH_INDEX_URL  package index for torch; https://download.pytorch.org/whl/cpu has small builds' \
	  '                   without CUDA, which the default build on Linux includes' \
	  '  PIP_OPTIONS      further options of every `pip install`, e.g. --no-index --find-links=wheels' \
	  '  RECIS_CUDA       build the CUDA library: 0, 1 or auto, if torch is a CUDA build (auto)' \
	  '  TFRA_PYTHON      Python for TFRA, one of the peers of bench-peers, 3.11 or older (python3.11)' \
	  '  CXX, NVCC        compilers (g++, nvcc)' \
	  '  WORKERS          processes that run tests; 0 runs them in the foreground, for a debugger (one a core, up to 4)' \
	  '  SOAK             schedules and operations of `make soak`, a factor (25)' \
	  '  DEMO_ARGS, PYTEST_ARGS, BENCH_ARGS (--quick)   arguments of the programs'

demo: setup  ## Train a model with a torch and a JAX tower on a generated click log
	$(PY) examples/demo.py $(DEMO_ARGS)

# Each process takes whole files. Threads that wait for work sleep: spinning, they take the cores from other tests.
test test-quick: export OMP_WAIT_POLICY := passive
# By default JAX reserves three quarters of a GPU's memory, which these processes share.
test test-quick: export XLA_PYTHON_CLIENT_PREALLOCATE := false
test: setup emulated  ## Run the tests: 15 to 25 minutes on two cores
	@$(if $(PYTEST_ARGS),,echo 'all tests: 15 to 25 minutes on two cores; `make test-quick` runs a sample of them')
	$(PYTEST) $(PYTEST_ARGS)

test-quick: setup emulated  ## Run a sample of the tests, in at most a fifth of the time
	$(PYTEST) --quick $(PYTEST_ARGS)

faults: setup  ## Kill saves, loads and ranks, fill disks, damage checkpoints, 20 times each; count the recoveries
	$(PY) -m tests.saver.faults
	$(PY) -m tests.embedding.faults

agreement: setup  ## Train on 2 and 4 ranks in every mode, and print how well they agree with one process
	$(PY) -m tests.embedding.agreement

rehearsal: setup  ## Disconnect one of two hosts during training, in network namespaces; needs root and iproute2
	$(PY) scripts/two_hosts.py --ranks 2

emulated: $(DEPENDENCIES)  ## Build the emulated device, on which tests run the kernels of CUDA without a GPU
	@$(PY) setup.py --quiet build_emulated

soak: setup emulated  ## Run SOAK times as many schedules of the emulated device, and SOAK * 4,000 operations on tables
	SOAK=$(SOAK) $(PY) -m pytest --hypothesis-profile=default tests/embedding/test_table_properties.py \
	  tests/optim/test_exact_properties.py \
	  $(shell find tests -name test_thread_schedules.py) $(PYTEST_ARGS)

mutants: setup  ## Check that the tests on the emulated device catch faults of the CUDA kernels
	$(PY) scripts/mutants.py

lint: $(DEPENDENCIES)  ## Check format, lint rules and types; change nothing
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

docs: setup $(STAMPS)/docs  ## Build the documentation into build/docs; warnings are errors
	$(PY) -m sphinx -W --keep-going -q -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

format: $(DEPENDENCIES)  ## Format Python, C++ and CUDA
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

cuda-build: $(DEPENDENCIES)  ## Compile and link the CUDA library, if nvcc is found
	@if nvcc=$$(scripts/find_nvcc.sh); then \
	  echo "with $$nvcc:"; RECIS_CUDA=1 NVCC="$$nvcc" $(PY) setup.py --quiet build_ext --inplace; \
	  ls -l recis_hybrid/lib/librecis_cuda.so; \
	else \
	  echo "skipped the CUDA library: nvcc is neither in NVCC nor on PATH nor in /usr/local/cuda/bin"; \
	fi

aarch64:  ## Run the native tests for aarch64 in an emulator, and compile the operators for it
	scripts/aarch64.sh

sanitize:  ## Run the native tests under the thread, address and undefined-behavior sanitizers
	scripts/sanitize.sh

bench: setup  ## Run the benchmarks (BENCH_ARGS= for all cases)
	@for program in $$(grep -l '__main__' benchmarks/*.py); do \
	  echo "$$program $(BENCH_ARGS)"; PYTHONPATH=. $(PY) "$$program" $(BENCH_ARGS); done

bench-peers: setup $(PEERS)  ## Install the peers in separate environments, then run the benchmarks
	@$(MAKE) --no-print-directory bench

# FBGEMM uses our torch and numpy through a .pth file.
build/peers/fbgemm/ready: requirements/peers-fbgemm.txt | $(DEPENDENCIES)
	$(PY) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install $(PIP_OPTIONS) --quiet --no-deps -r $<
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ours.pth"
	@touch $@

build/peers/fbgemm/torchrec: requirements/peers-torchrec.txt build/peers/fbgemm/ready
	$(@D)/bin/python -m pip --disable-pip-version-check install $(PIP_OPTIONS) --quiet --no-deps -r $<
	@touch $@

build/peers/tfra/ready: requirements/peers-tfra.txt
	$(TFRA_PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install $(PIP_OPTIONS) --quiet --no-deps -r $<
	@touch $@

# keras-rs uses our jax and numpy through a .pth file.
build/peers/keras_rs/ready: requirements/peers-keras-rs.txt | $(DEPENDENCIES)
	$(PY) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install $(PIP_OPTIONS) --quiet --no-deps -r $<
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ours.pth"
	@touch $@

# A folder, not an environment: it runs in our interpreter, with our torch and jax.
build/peers/interop/ready: requirements/peers-interop.txt | $(DEPENDENCIES)
	$(PIP_INSTALL) --quiet --no-deps --upgrade --target $(@D)/site -r $<
	@touch $@

# torch's libraries come with torch. auditwheel refuses a library that needs a newer system than the tag says.
wheel: setup  ## Build an sdist, and a wheel from it for Linux with glibc 2.28 or newer, into dist/
	$(PY) -m build --no-isolation --outdir build/dist
	mkdir -p dist && mv build/dist/*.tar.gz dist/
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m auditwheel repair --plat manylinux_2_28_$$(uname -m) --only-plat \
	  --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/dist/*.whl
	rm -r build/dist

clean:  ## Remove build outputs and caches, but not the environment
	rm -rf build dist *.egg-info recis_hybrid/lib/*.so recis_hybrid/lib/*.dylib .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

setup: $(EDITABLE) $(NATIVE)

# torch is installed first and alone, because it may come from a separate index.
$(DEPENDENCIES): requirements/torch.txt requirements/dev.txt requirements/constraints.txt $(STAMPS)/torch-setting
	@command -v $(PYTHON) >/dev/null || { echo "recis_hybrid: $(PYTHON) was not found; install Python 3.11 to 3.14" \
	  "or name one, e.g. make demo PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) scripts/setup_env.py host
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo '[1/4] installing torch into $(VENV): 190 MB for the CPU, 530 MB with CUDA; half a minute plus the download'
	$(PIP_INSTALL) --no-deps $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) $(TORCH)
	@echo '[2/4] installing 167 more pinned packages: 570 MB, plus 2.5 GB with CUDA; one minute plus the downloads'
	@$(PIP_INSTALL) $(TORCH) -r requirements/dev.txt -c requirements/constraints.txt | $(PIP_SHORT)
	@$(PY) scripts/setup_env.py torch
	@touch $@

$(STAMPS)/docs: requirements/docs.txt requirements/constraints.txt $(DEPENDENCIES)
	$(PIP_INSTALL) --quiet -r $< -c requirements/constraints.txt
	@touch $@

# The editable install would also build the library, but wrap compiler errors in pip's trace, so build it first.
$(NATIVE): $(NATIVE_SOURCES) $(STAMPS)/cuda-setting | $(DEPENDENCIES)
	@echo '[3/4] building the native library; up to 2 minutes on two cores, more with CUDA'
	$(PY) setup.py --quiet build_ext --inplace
	@mkdir -p $(@D) && touch $@

$(EDITABLE): pyproject.toml setup.py $(DEPENDENCIES) | $(NATIVE)
	@echo '[4/4] installing recis_hybrid itself, in editable mode; a few seconds'
	$(PIP_INSTALL) --quiet --no-build-isolation --no-deps -e .
	@touch $@

# Changing a setting rebuilds what depends on it.
$(STAMPS)/torch-setting: SETTING = $(TORCH)
$(STAMPS)/cuda-setting: SETTING = $(RECIS_CUDA)
$(STAMPS)/torch-setting $(STAMPS)/cuda-setting: FORCE
	@mkdir -p $(@D)
	@cmp -s $@ <(echo '$(SETTING)') || echo '$(SETTING)' > $@
