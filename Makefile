# Everything a person or CI runs here. Each target installs what it needs from the lock files into .venv first;
# nothing has to be activated. `make help` lists the targets and the settings.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

BIN := .venv/bin
ENGINE := artifacts/engines/demo
RTX_ENGINE := artifacts/engines/demo-tensorrt_rtx
DRAFTER := artifacts/engines/demo-drafter
CHECKPOINT := build/checkpoints/demo
TORCH := $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
UV := uv==0.13.9
PIP_AUDIT := pip-audit==2.10.1

# Hashes for every package, no dependency resolution, no unlocked build tools.
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation
LOCK := artifacts/lock/bin/uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes \
	--no-emit-package torch --custom-compile-command "make lock" --quiet $(LOCK_ARGS)
TWO_COLUMNS := while IFS='|' read -r name text; do printf '  %-14s %s\n' "$$name" "$$text"; done

.PHONY: help setup demo serve openai engines test system-test check stress bench accept gpu-check lock audit clean

help: ## List the targets and settings
	@echo "Targets:"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | $(TWO_COLUMNS)
	@echo "Settings, as in make NAME=VALUE ...:"
	@sed -n 's/^#: \([A-Z_]*\) \(.*\)/\1|\2/p' Makefile | $(TWO_COLUMNS)

#: PYTHON Python to make .venv with (default: the first usable of python3.11, python3.12, python3)
#: TORCH_INDEX package index for torch, e.g. https://download.pytorch.org/whl/cpu (default: pip's own)
#: SERVE_ARGS more arguments for `dgemma-server run`
#: OPENAI_ARGS more arguments for `nim-serve`
#: PYTEST_ARGS more arguments for pytest
#: BENCH_ARGS more arguments for the benchmark
#: STRESS_ARGS more arguments for the stress run, e.g. "--seconds 30"
#: ACCEPT_ARGS more arguments for the acceptance table
#: GPU_CHECK_ARGS more arguments for the GPU check, e.g. --quick
#: LOCK_ARGS more arguments for `make lock`, e.g. --upgrade

setup: .venv/.demo-installed ## Install what serving needs into .venv (the other targets do it themselves)

demo: .venv/.demo-installed $(ENGINE)/config.json $(DRAFTER)/config.json ## Start a Triton server, send it prompts, show and check the answers, stop it
	@$(BIN)/python -m dgemma_build.demo.show --engine $(ENGINE) --draft-model $(DRAFTER)

serve: .venv/.demo-installed $(ENGINE)/config.json $(DRAFTER)/config.json ## Keep the demo server in the foreground
	@exec $(BIN)/dgemma-server run --engine $(ENGINE) --draft-model $(DRAFTER) $(SERVE_ARGS)

openai: .venv/.demo-installed $(ENGINE)/config.json $(DRAFTER)/config.json ## Keep the demo server and its HTTP front end in the foreground
	@NIM_MODEL_PATH=$(ENGINE) NIM_DRAFT_MODEL_PATH=$(DRAFTER) exec $(BIN)/nim-serve --host 127.0.0.1 $(OPENAI_ARGS)

engines: $(ENGINE)/config.json $(DRAFTER)/config.json $(RTX_ENGINE)/config.json ## Build every engine that needs no GPU to build
	@echo "Up to date: $(^D)"

test: .venv/.test-installed $(ENGINE)/config.json ## Run every test but those of the next line
	@$(BIN)/python -m pytest tests -m "not debian" $(PYTEST_ARGS)

system-test: .venv/.test-installed $(ENGINE)/config.json ## Run the tests that need root and packages of Debian: a browser, an image
	@build/tooling/debian-packages chromium fonts-dejavu-core buildah debootstrap
	@$(BIN)/python -m pytest tests -m debian $(PYTEST_ARGS)

check: .venv/.test-installed ## Lint, formatting, types and import rules
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports --cache-dir artifacts/cache/import-linter

stress: .venv/.test-installed $(ENGINE)/config.json ## Send a server many requests of every kind and check that nothing is lost
	@$(BIN)/python -m dgemma_build.stress $(STRESS_ARGS)

bench: .venv/.test-installed $(ENGINE)/config.json ## Beside transformers, over many requests, over context, with drafts: tables, plots, JSON lines
	@$(BIN)/python -m dgemma_build.bench $(BENCH_ARGS)
	@$(BIN)/python -m dgemma_build.bench.concurrency $(BENCH_ARGS)
	@$(BIN)/python -m dgemma_build.bench.context $(BENCH_ARGS)
	@$(BIN)/python -m dgemma_build.bench.drafts $(BENCH_ARGS)

accept: .venv/.test-installed $(ENGINE)/config.json ## Measure every row of the acceptance table beside its bar
	@$(BIN)/python -m dgemma_build.accept $(ACCEPT_ARGS)

# By an interpreter that has torch's CUDA build and triton, and needs nothing else: no .venv is made.
gpu-check: ## Check the kernels on this machine's GPU with PYTHON (which needs torch and triton): numbers, speed, whole steps
	@PYTHONPATH=build:python_backend $(or $(PYTHON),python3) -m dgemma_build.gpu_check $(GPU_CHECK_ARGS)

lock: artifacts/lock/bin/uv ## Resolve pyproject.toml again into test.lock and, as subsets of it, the other locks
	@$(LOCK) --extra test --output-file test.lock
	@$(LOCK) --extra demo --constraints test.lock --output-file demo.lock
	@$(LOCK) --extra image --constraints test.lock --output-file serve.lock
	@$(LOCK) --extra gateway --constraints test.lock --output-file gateway.lock
	@for name in clients hermes; do artifacts/lock/bin/uv pip compile build/tooling/$$name.in --universal \
		--python-version 3.11 --generate-hashes --no-emit-package torch --custom-compile-command "make lock" --quiet \
		--output-file build/tooling/$$name.lock $(LOCK_ARGS); done
	@echo "Wrote test.lock, demo.lock, serve.lock, gateway.lock, and build/tooling's"

audit: artifacts/audit/bin/pip-audit ## Look up known vulnerabilities of everything locked (needs pypi.org)
	@for lock in gateway serve demo test; do echo "$$lock.lock"; \
	artifacts/audit/bin/pip-audit --strict --disable-pip --progress-spinner off -r $$lock.lock || exit 1; done

clean: ## Remove .venv and everything generated
	@rm -rf .venv artifacts dist

# ---------------------------------------------------------------- environment

.venv/.created:
	@python=$$(build/tooling/find-python $(PYTHON)) && echo "Making .venv with $$python" && "$$python" -m venv .venv
	@touch $@

.venv/.demo-installed: demo.lock pyproject.toml | .venv/.created
	@echo "Installing what serving needs (demo.lock)"
	@$(INSTALL) --require-hashes --requirement demo.lock
	@$(INSTALL) --editable .
	@touch $@

.venv/.test-installed: test.lock .venv/.demo-installed
	@echo "Installing what tests need (test.lock and $(TORCH))"
	@$(INSTALL) --require-hashes --requirement test.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@touch $@

artifacts/lock/bin/uv:
	@"$$(build/tooling/find-python $(PYTHON))" -m venv artifacts/lock
	@artifacts/lock/bin/python -m pip install -qq --disable-pip-version-check $(UV)

artifacts/audit/bin/pip-audit:
	@"$$(build/tooling/find-python $(PYTHON))" -m venv artifacts/audit
	@artifacts/audit/bin/python -m pip install -qq --disable-pip-version-check $(PIP_AUDIT)

# ---------------------------------------------------------------- engine

ENGINE_SOURCES := $(wildcard $(CHECKPOINT)/* build/dgemma_build/*.py) python_backend/dgemma_runtime/contract.py demo.lock
$(ENGINE)/config.json: $(ENGINE_SOURCES) | .venv/.demo-installed
	@echo "Building $(@D)"
	@$(BIN)/dgemma-build engine --checkpoint $(CHECKPOINT) --backend onnxruntime --precision fp32 --output $(@D)
	@touch $@

DRAFTER_SOURCES := $(wildcard $(CHECKPOINT)-drafter/* build/dgemma_build/drafter/*.py)
$(DRAFTER)/config.json: $(DRAFTER_SOURCES) $(ENGINE_SOURCES) | .venv/.demo-installed
	@echo "Building $(@D)"
	@$(BIN)/dgemma-build engine --drafter $(CHECKPOINT)-drafter --checkpoint $(CHECKPOINT) --output $(@D)
	@touch $@

$(RTX_ENGINE)/config.json: $(ENGINE_SOURCES) test.lock | .venv/.test-installed
	@echo "Building $(@D)"
	@$(BIN)/dgemma-build engine --checkpoint $(CHECKPOINT) --backend tensorrt_rtx --precision bf16 --output $(@D)
	@touch $@
