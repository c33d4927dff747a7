# The verbs. Each installs what it needs, and does nothing that is already done.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# cpu or gpu: which ONNX Runtime.
RUNTIME ?= cpu
# Test processes side by side.
TEST_JOBS ?= 2
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
BUILD_PACKAGES := libnghttp2-dev zlib1g-dev pkg-config
TEST_PACKAGES ?=
BENCH_PACKAGES ?= nghttp2-client nghttp2-server libb64-0d
# What pip needs in place to build without a second environment; as in pyproject.toml.
BUILD_REQUIRES := "setuptools>=77" "wheel" "Cython>=3.1,<4" "grpcio-tools>=1.78,<1.79"

# $(call apt,packages): installs the missing ones as root, else says how.
define apt
	missing=""; \
	for package in $(1); do \
	  [ "$$(dpkg-query -W -f='$${db:Status-Status}' $$package 2>/dev/null || true)" = installed ] || missing="$$missing $$package"; \
	done; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "apt-get install$$missing"; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	  else \
	    echo "System packages are missing. Run this once, then make again:" >&2; \
	    echo "    sudo apt-get update && sudo apt-get install -y$$missing" >&2; exit 1; \
	  fi; \
	fi
endef

.PHONY: help build demo test test-slow test-sanitize check format bench clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

build: $(VENV)/.runtime-$(RUNTIME)  ## the environment, the native module, the tidegate command
	@$(BIN)/python setup.py -q build_ext --inplace

demo: build $(VENV)/.extra-demo  ## the story of one model, on real data, in a minute
	@$(BIN)/tidegate demo

test: build $(VENV)/.extra-test $(VENV)/.packages-test  ## all tests that take seconds
	@$(BIN)/python -m pytest -q -m "not slow" -n $(TEST_JOBS) --dist loadfile $(PYTEST_ARGS)

test-slow: build $(VENV)/.extra-test $(VENV)/.packages-test  ## the tests that take minutes
	@$(BIN)/python -m pytest -q -m slow $(PYTEST_ARGS)

test-sanitize: build $(VENV)/.extra-test  ## the native core's own tests under ASan with UBSan, then TSan
	@for sanitizer in address thread; do \
	  echo "== $$sanitizer"; \
	  TIDEGATE_SANITIZE=$$sanitizer $(BIN)/python setup.py -q build_native_tests; \
	  ran=0; \
	  for program in $$(ls build/ext/$$sanitizer/bin/*_test 2>/dev/null); do \
	    echo "-- $$program"; ran=$$((ran + 1)); \
	    ASAN_OPTIONS=detect_leaks=1:detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1 \
	    TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1 $$program; \
	  done; \
	  [ $$ran -gt 0 ] || { echo "there is no ext/test/*_test.cc to run" >&2; exit 1; }; \
	done

check: build $(VENV)/.extra-test $(VENV)/.extra-dev  ## format, lint, types, import arrows
	@status=0; run() { echo "== $$*"; "$$@" || status=1; }; \
	run $(BIN)/ruff check .; \
	run $(BIN)/ruff format --check .; \
	run $(BIN)/mypy; \
	PATH="$(CURDIR)/$(BIN):$$PATH" run $(BIN)/cython-lint ext/bind; \
	run $(BIN)/clang-format --dry-run -Werror $$(find ext -name '*.cc' -o -name '*.h'); \
	run $(BIN)/python -m pytest -q tests/test_architecture.py; \
	exit $$status

format: $(VENV)/.extra-dev  ## rewrites the files as `check` wants them
	@$(BIN)/ruff check --fix-only -q .; $(BIN)/ruff format -q .
	@$(BIN)/clang-format -i $$(find ext -name '*.cc' -o -name '*.h')

bench: build $(VENV)/.extra-test $(VENV)/.packages-bench  ## side by side with peers; ratios into loadtests/results/
	@$(BIN)/python -m loadtests.bench $(BENCH_ARGS)

clean:  ## everything that make made
	rm -rf $(VENV) build dist protos/gen *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f server/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- set-up: one stamp for each thing that is done once ------------------------------------------------------------

$(VENV)/.base:
	@$(call apt,$(BUILD_PACKAGES))
	@[ -n "$(PYTHON)" ] && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name it with make PYTHON=..." >&2; exit 1; }
	@needed=""; version=$$($(PYTHON) -c 'import sys; print("python%d.%d" % sys.version_info[:2])'); \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || needed="$$needed $$version-venv"; \
	$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' || \
	  needed="$$needed $$version-dev"; \
	$(call apt,$$needed)
	@[ -x $(BIN)/python ] || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@touch $@

$(VENV)/.runtime-$(RUNTIME): $(VENV)/.base pyproject.toml
	@echo "installing tidegate[$(RUNTIME)]"
	@$(PIP) $(BUILD_REQUIRES)
	@# The two runtimes install the same files: the other one must go first.
	@[ $(RUNTIME) = cpu ] && other=gpu || other=cpu; \
	if [ -e $(VENV)/.runtime-$$other ]; then \
	  $(BIN)/python -m pip uninstall --yes --quiet onnxruntime onnxruntime-gpu; rm -f $(VENV)/.runtime-$$other; \
	fi
	@# The native module is built by `build`, where its messages are seen.
	@TIDEGATE_NATIVE=0 $(PIP) --no-build-isolation --editable '.[$(RUNTIME)]'
	@touch $@

$(VENV)/.extra-%: $(VENV)/.base pyproject.toml | $(VENV)/.runtime-$(RUNTIME)
	@echo "installing tidegate[$*]"
	@TIDEGATE_NATIVE=0 $(PIP) --no-build-isolation --editable '.[$*]'
	@touch $@

$(VENV)/.packages-test: | $(VENV)/.base
	@$(call apt,$(TEST_PACKAGES))
	@touch $@

$(VENV)/.packages-bench: | $(VENV)/.base
	@$(call apt,$(BENCH_PACKAGES))
	@touch $@
