# Every target makes what it needs by itself, the environment in .venv included.
#   PYTHON=python3.12  makes the environment with another interpreter (3.10 or newer)
#   PIP_ARGS="..."     is handed to pip install (another index, a folder of wheels)
#   JOBS=4              runs the tests in so many processes
#   V=2.9.1            is the torch that test-torch installs, into build/torch-2.9.1-python3
#   ARGS="..."         is handed to pytest, the fuzzer, the matrix, the demo or the benchmark (ARGS="--jobs 2")

PYTHON ?= python3
PIP_ARGS ?=
JOBS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# -qq shows errors only. The bound goes with each install, or torchvision and timm would replace
# the torch build.
TORCH := 'torch>=2.13,<2.14'
# The torch that test-torch tries, and its environment: another for each version and interpreter.
V ?= 2.14.1
# test_cascade_counted.py would take half of the time, on what test_cascade_run.py tries as well.
TORCH_TESTS := tests/backend tests/gpu tests/test_planner.py tests/test_models.py \
	--ignore=tests/backend/test_cascade_counted.py
TORCH_ENV := build/torch-$(V)-$(notdir $(PYTHON))
# torchao 0.18 does not import beside torch 2.9, and with it neither does transformers.
TORCH_QUANT := $(if $(filter 2.9%,$(V)),,quant,)
INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) $(TORCH)

.DEFAULT_GOAL := help
.PHONY: help demo test test-quick test-rest test-all test-torch durations fuzz opinfo matrix paper paper-quick docs lint html-libraries format clean
.DELETE_ON_ERROR:

help: ## show this list
	@echo "torch_getfuse: make TARGET"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@awk '/^#   [A-Z]/ { sub(/^# /, ""); print }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## compile, run and check MobileNetV2, and print the report
	@$(BIN)/python examples/quickstart.py $(ARGS)

test: $(VENV)/.dev ## run the tests, but for those that are slow
	@$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not opinfo" $(ARGS)

test-quick: $(VENV)/.dev ## run the tests under half a second, of all but backend and explain
	@$(BIN)/python -m pytest -n $(JOBS) -m "quick and not opinfo" $(ARGS)

test-rest: $(VENV)/.dev ## run what make test leaves out: whole networks, random programs, torch's samples
	@$(BIN)/python -m pytest -n $(JOBS) -m "(slow or opinfo) and not exhaustive" $(ARGS)

test-all: test test-rest ## run everything that CI runs, and more random cases
	@$(BIN)/python -m pytest -n $(JOBS) -m exhaustive $(ARGS)

test-torch: $(TORCH_ENV)/.made ## try torch V=2.9.1: backend, capture and plans, in an environment of its own
	@$(TORCH_ENV)/bin/python -m pytest -n $(JOBS) -m "not slow and not opinfo" $(ARGS) $(TORCH_TESTS)

durations: $(VENV)/.dev ## run everything, and record how long each test takes
	@$(BIN)/python -m pytest -n $(JOBS) -m "" --store-durations $(ARGS)

fuzz: $(VENV)/.dev ## hold 100,000 random programs against eager (many hours; goes on where it stopped)
	@$(BIN)/python -m tests.fuzz $(ARGS)

opinfo: $(VENV)/.dev ## hold all of torch's samples of its operators against eager
	@GETFUSE_OPINFO=all $(BIN)/python -m pytest tests/test_opinfo.py -m opinfo $(ARGS)

matrix: $(VENV)/.dev ## run every setting of torch.compile on ten networks (many hours; goes on where it stopped)
	@$(BIN)/python benchmarks/matrix.py $(ARGS)

paper: $(VENV)/.dev ## the paper's tables, plots and claims, to docs/paper.md: hours, resumable
	@$(BIN)/python -m benchmarks.paper full $(ARGS)

paper-quick: $(VENV)/.dev ## the same with one seed and few plans, to runs/paper/quick.md
	@$(BIN)/python -m benchmarks.paper quick $(ARGS)

docs: $(VENV)/.dev ## the pages as a site, to build/site/index.html; fails at a link that leads nowhere
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

lint: $(VENV)/.dev ## check style (ruff), format (ruff) and types (mypy)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

html-libraries: ## bundle the HTML report's JavaScript libraries again, through npm
	@cd tools/html-libraries && npm ci --no-audit --no-fund && npm run --silent build

format: $(VENV)/.dev ## sort imports and format the code
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .

clean: ## remove the environment, builds and caches
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment counts only once it is whole: an interrupted install leaves no stamp.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	  "Python 3.10 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=...")'
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(TORCH_ENV)/.made: pyproject.toml
	@echo "making $(TORCH_ENV): PyPI's torch for Linux brings CUDA, 6 GB and 5 to 25 minutes"
	@$(PYTHON) -m venv $(TORCH_ENV)
	@$(TORCH_ENV)/bin/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) \
	  'torch==$(V)' --editable '.[explain,models,$(TORCH_QUANT)search,test]'
	@touch $@

$(VENV)/.demo: $(VENV)/.made pyproject.toml
	@test -e $(VENV)/.dev && test $(VENV)/.dev -nt pyproject.toml || { \
	  echo "installing torch_getfuse and torchvision (some minutes the first time)"; \
	  $(INSTALL) --editable '.[vision]'; }
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml
	@echo "installing torch_getfuse, the model libraries and the tools (some minutes the first time)"
	@$(INSTALL) --editable '.[explain,models,quant,search,plots,clients,docs,test,dev]'
	@touch $@
