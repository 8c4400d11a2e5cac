# Every target makes the environment it needs in .venv and uses it; nothing has to be activated.
#
#   PYTHON       the interpreter .venv is made with
#   TORCH_INDEX  an index that offers torch for the CPU, e.g. https://download.pytorch.org/whl/cpu;
#                empty: the index pip is set up with (on PyPI that is the large CUDA build)
PYTHON ?= python3
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := compile,cpu,tensorrt-rtx,dev
# Releases of ONNX Runtime that tests run graphs on beside the installed one: the least and the newest.
ONNXRUNTIMES := 1.23 1.32
OTHERS := $(ONNXRUNTIMES:%=build/onnxruntime-%/.installed)
# torch's own thread pool and pytest's workers would otherwise compete for the same cores. A file stays with one
# worker, so that what its fixtures build is built once.
WORKERS ?= 2
# make fuzz: how long, and in how many processes.
MINUTES ?= 10
FUZZ_WORKERS ?= 1
# make mutants: in how many processes.
JOBS ?= 1
# make test-lowest, test-newest: interpreters, and the tests that a pair of ranges' ends has to pass, within minutes.
PYTHON_lowest ?= 3.10
PYTHON_newest ?= $(PYTHON)
RESOLUTION_lowest := lowest-direct
RESOLUTION_newest := highest
RANGE_MINUTES ?= 20
RANGE_EXTRAS := compile cpu video sound sweep
RANGE_TOOLS := pytest|pytest-xdist|hypothesis
SAMPLE := $(addprefix tests/unit/test_,trace.py compile.py matrix_layouts.py runtime_processors.py tested_versions.py) \
	$(addprefix tests/null/test_,session.py images.py patches.py audio.py text.py prompts.py sampling.py manifest.py \
	video.py sound_files.py cli.py)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not device"

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-omni test test-lowest test-newest test-matrix fuzz mutants lint bench parity clean

help:  ## list the targets
	@awk -F ':.*## *' '/^[a-z-]+:.*##/ {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with everything the other targets need

$(STAMP): pyproject.toml constraints.txt
	@echo "making $(VENV); the first time takes a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

build/onnxruntime-%/.installed: | $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) 'onnxruntime==$*.*'
	@touch $@

demo: $(STAMP)  ## compile the demo model, ask it the sample questions, draw what was pruned
	$(BIN)/python -m secateur.tools.demo

demo-omni: $(STAMP)  ## the same with video and sound: SEATS on the omni demo model, accuracy on held-out clips
	$(BIN)/python -m secateur.tools.demo.omni

test: $(STAMP) $(OTHERS)  ## run every test that needs no GPU
	$(PYTEST) -n $(WORKERS) --dist loadgroup --no-loadscope-reorder tests

test-lowest: .venv-lowest/.installed  ## run a sample of the tests with the lowest version of everything
	$(call run_sample,.venv-lowest)

test-newest: .venv-newest/.installed  ## the same with the newest version of everything
	$(call run_sample,.venv-newest)

# A deprecation that one of these versions announces of another is not ours to mend.
run_sample = OMP_NUM_THREADS=1 PYTHONPATH=src timeout $(RANGE_MINUTES)m $(1)/bin/python -m pytest -m "not device" \
	-W default::DeprecationWarning -n $(WORKERS) --dist loadgroup --no-loadscope-reorder -p no:cacheprovider $(SAMPLE)

.venv-lowest/.installed .venv-newest/.installed: .venv-%/.installed: pyproject.toml $(STAMP)
	@echo "making .venv-$*: on an index with torch for CUDA these are gigabytes"
	@mkdir -p build
	$(BIN)/uv venv --quiet --clear --python $(PYTHON_$*) .venv-$*
	grep -oE '"($(RANGE_TOOLS))>=[^"]*"' pyproject.toml | tr -d '"' > build/range-tools.txt
	$(BIN)/uv pip compile --quiet --resolution $(RESOLUTION_$*) --python .venv-$*/bin/python \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX) --index-strategy unsafe-best-match) \
		$(addprefix --extra ,$(RANGE_EXTRAS)) -o build/constraints-$*.txt pyproject.toml build/range-tools.txt
	$(BIN)/uv pip install --quiet --python .venv-$*/bin/python \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX) --index-strategy unsafe-best-match) -r build/constraints-$*.txt
	@touch $@

test-matrix: $(STAMP)  ## compile every row for every layout: equal to its oracle, engines build; writes docs/
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.matrix --jobs $(WORKERS)

fuzz: $(STAMP)  ## property tests on new examples, for MINUTES (10); what fails becomes a case of make test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --minutes $(MINUTES) --workers $(FUZZ_WORKERS)

mutants: $(STAMP)  ## put the sampled small faults into the code, one at a time: the nearest tests fail; writes docs/
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants --jobs $(JOBS)

lint: $(STAMP)  ## ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)  ## measure accuracy against keep ratio for every recipe; writes docs/
	$(BIN)/python -m secateur.tools.bench

parity: $(STAMP)  ## compare every recipe with its eager oracle on all held-out questions; writes docs/
	$(BIN)/python -m secateur.tools.parity

clean:  ## remove what the other targets made
	rm -rf $(VENV) .venv-lowest .venv-newest build dist out src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
