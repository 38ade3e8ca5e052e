# Two commands do everything on a fresh machine that has Python 3.10 or newer: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
# The version whose processor build pip takes; a bare `torch` is a CUDA build of several GB. Empty: whatever is newest.
TORCH ?= torch==2.13.0
# test processes at a time
WORKERS ?= 2
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

DEMO = demo
DEMO_SAMPLES ?= 16
DEMO_LENGTH ?= 1024

.PHONY: demo test lint types docs floor peers big clean

# what the kernels are compiled from: installing compiles them
NATIVE = hatch_build.py $(wildcard src/prunekit/runtime/native/*) src/prunekit/runtime/build.py

$(STAMP): pyproject.toml $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/prunekit prune smollm2-135m --method wanda --sparsity 0.5 \
	    --samples $(DEMO_SAMPLES) --length $(DEMO_LENGTH) --out $(DEMO) --overwrite
	$(BIN)/prunekit eval smollm2-135m --length $(DEMO_LENGTH) --samples 16
	$(BIN)/prunekit eval $(DEMO) --length $(DEMO_LENGTH) --samples 16
	$(BIN)/prunekit inspect $(DEMO)

# files side by side, a thread each: two processes that want every processor are many times slower than one
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# the documentation's site; open site/index.html
docs: $(STAMP)
	$(BIN)/mkdocs build --strict

floor: $(STAMP)
	$(BIN)/python benchmarks/floor.py --keep benchmarks/results/floor.json

# makes an environment of 1.5 GB for llm-compressor once
peers: $(STAMP)
	$(BIN)/python benchmarks/peers.py --torch '$(TORCH)' --keep benchmarks/results/peers.json

# 27 GB of disk, and about an hour on two cores
big: $(STAMP)
	$(BIN)/python benchmarks/big.py --shapes 1b,7b --curves \
	    --keep benchmarks/results/big.json --figure benchmarks/results/big.svg

clean:
	rm -rf $(VENV) $(DEMO) site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
