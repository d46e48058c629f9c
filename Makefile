# make demo: train and use a translator.   make test: the tests.   Both install what they need into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
TOOLS_VENV := .venv-tools
TOOLS := trl lm-eval peft ctranslate2 datasets fastapi uvicorn openai
BENCHMARKS := attention loss train_step generate families
DEMO_STAMP := $(VENV)/.demo-installed
DEV_STAMP := $(VENV)/.dev-installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-newest test-oldest test-tools quick lint complexity types format bench constraints clean

help:
	@echo "make demo [ARGS=...]  train a small translator and use it      make test      the tests"
	@echo "make quick            one test of each kind, under a minute     make lint      ruff, radon and mypy"
	@echo "make test-all         the slow ones too"
	@echo "make test-newest      on the newest torch and transformers     make test-oldest  on the oldest that are supported"
	@echo "make test-tools       TRL, PEFT, lm-eval and others, in .venv-tools"
	@echo "make bench            time kernels, steps, generation          make clean     remove what can be rebuilt"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(DEMO_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing urform and its dependencies into $(VENV); this takes a minute or two the first time."
	$(PIP_INSTALL) -e '.[demo]'
	@touch $@

$(DEV_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing urform and its tools for development into $(VENV); this takes some minutes the first time."
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(DEMO_STAMP)

demo: $(DEMO_STAMP)
	$(BIN)/urform demo $(ARGS)
	@echo "(The command urform is in $(BIN). To have it at hand: source $(BIN)/activate)"

# One thread for each of $(JOBS) processes: more threads than cores slow the small models of the tests down.
test: $(DEV_STAMP)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -n $(JOBS) --dist loadscope $(ARGS)

# The inner loop: the most telling tests of every folder of tests/, by name.
quick: $(DEV_STAMP)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -n $(JOBS) --dist loadscope @tests/quick.txt $(ARGS)

test-all: $(DEV_STAMP)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -n $(JOBS) --dist loadscope -m "" $(ARGS)

# Each has a virtual environment of its own and takes what the index has today, without constraints.txt. The oldest are
# the lower bounds in pyproject.toml. The newest may lie beyond the tested range; urform then warns.
OLDEST := $(shell sed -nE 's/^    "(torch|transformers)>=([0-9.]+)",$$/\1==\2.*/p' pyproject.toml)
PIP_NEWEST := .venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade
PIP_OLDEST := .venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check

test-newest:
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	$(PIP_NEWEST) --upgrade-strategy eager -e '.[dev]' torch transformers
	PYTHONWARNINGS='ignore:urform is tested with' OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
		.venv-newest/bin/python -m pytest -q -n $(JOBS) --dist loadscope $(ARGS)

# Triton 3.6's interpreter calls int() on arrays of one element, which numpy 2.4 refuses.
test-oldest:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	$(PIP_OLDEST) -e '.[dev]' $(patsubst %,'%',$(OLDEST)) 'numpy<2.4'
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
		.venv-oldest/bin/python -m pytest -q -n $(JOBS) --dist loadscope $(ARGS)

# The newest tools that go with the tested torch and transformers, apart from .venv, which stays small.
$(TOOLS_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TOOLS_VENV)
	grep -E '^(torch|transformers)==' constraints.txt > $(TOOLS_VENV)/constraints.txt
	$(TOOLS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c $(TOOLS_VENV)/constraints.txt \
		-e '.[dev]' $(TOOLS)
	@touch $@

test-tools: $(TOOLS_VENV)/.installed
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(TOOLS_VENV)/bin/python -m pytest -q -rs $(ARGS) tests/tools

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory complexity types

complexity: $(DEV_STAMP)
	$(BIN)/python tests/support/complexity.py

types: $(DEV_STAMP)
	@mkdir -p build/types && ln -sfn ../.. build/types/urform
	$(BIN)/mypy

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV_STAMP)
	@for script in $(BENCHMARKS); do $(BIN)/python benchmarks/$$script.py $(ARGS) || exit 1; done

# Local version suffixes (+cpu) are dropped: they name a build, not a release.
constraints: $(DEV_STAMP)
	@$(BIN)/python -m pip freeze --exclude-editable | sed -E 's/\+[A-Za-z0-9.]+$$//' | grep -v '^urform' > constraints.new
	@echo "constraints.new written; compare it with constraints.txt (which keeps markers for Python 3.10)"

clean:
	rm -rf $(VENV) $(TOOLS_VENV) .venv-newest .venv-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis constraints.new
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
