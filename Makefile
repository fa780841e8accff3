# One line each: what people and CI call. PYTHON picks the interpreter of the virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
GPU_BIN = $(VENV)-gpu/bin
GPU_EXTRAS ?= tensorrt,tensorrt-rtx

LOCK = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header
LOCK_ROLE = $(LOCK) -c requirements/dev.txt

.DEFAULT_GOAL := help
.PHONY: help setup check format test test-long test-gpu faults demo up up-real bench bench-coldstart lock clean

help: ## show these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

setup: $(VENV)/.ready ## make the virtual environment

$(VENV)/.ready: requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

check: setup ## format, lint, types, imports
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports

format: setup ## format and fix what can be fixed
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

test: setup ## every test, faults in their short form
	$(BIN)/python -m pytest

test-long: setup ## every test, faults at full length
	HEADRACE_FAULTS=long $(BIN)/python -m pytest --timeout 1800

test-gpu: $(VENV)-gpu/.ready ## what needs an NVIDIA GPU, on a machine with one (GPU_EXTRAS=cuda: without TensorRT)
	$(GPU_BIN)/python -m pytest tests/gpu --timeout 600 --durations 10 $(ARGS)

# TensorRT's libraries come from pypi.nvidia.com. Of the two onnxruntime packages, which overwrite each
# other's files, the one for GPUs stays.
$(VENV)-gpu/.ready: requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-gpu
	$(GPU_BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	$(GPU_BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(GPU_EXTRAS)]' 'onnxruntime-gpu[cuda,cudnn]' torch
	$(GPU_BIN)/python -m pip uninstall --quiet --yes onnxruntime onnxruntime-gpu
	$(GPU_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps onnxruntime-gpu
	touch $@

faults: setup ## every fault on real servers at full length, for docs/faults.md: two hours
	$(BIN)/python -m tests.faults.real --long --write-docs

demo: setup ## three real models, real inputs, the answers in a table
	$(BIN)/headrace demo

up: setup ## the embedded stack in the foreground
	$(BIN)/headrace up

up-real: setup ## the processes of docker-compose.yml on Kafka, Redis and MinIO, without containers
	$(BIN)/python -m tests.servers.layout $(ARGS)

bench: setup ## figures of docs/performance.md, measured here
	$(BIN)/python -m bench $(ARGS)

bench-coldstart: setup ## cold start by case, model and backend: docs/coldstart.md
	$(BIN)/python -m bench.coldstart $(ARGS)

lock: ## compile requirements/*.txt anew from pyproject.toml
	$(LOCK) --extra dev -o requirements/dev.txt pyproject.toml requirements/build.in
	$(LOCK) -o requirements/main.txt pyproject.toml
	$(LOCK_ROLE) -o requirements/build.txt requirements/build.in
	$(LOCK_ROLE) -o requirements/dispatcher.txt requirements/dispatcher.in
	$(LOCK_ROLE) -o requirements/archiver.txt requirements/archiver.in
	$(LOCK_ROLE) --extra kafka --extra s3 -o requirements/worker.txt pyproject.toml
	$(LOCK_ROLE) --extra kafka --extra s3 --excludes requirements/worker-gpu.excludes -o requirements/worker-gpu.txt pyproject.toml requirements/worker-gpu.in

clean: ## remove the virtual environment and caches of tools
	rm -rf $(VENV) $(VENV)-gpu .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
