# Everything runs in .venv, which the first command makes. Needs Python 3.11 or newer and make.
#
#   make demo         trains a small model on this machine's own Python files, in runs/demo
#   make test         the tests, with a covering subset of each large product of cases; test-all
#                     runs every case, test-fast skips the slow ones
#   make lint         ruff, codespell and pyright
#   make docs         the documentation, as a site in site/
#   make bench        time of the layer, forward and backward
#   make recall       associative recall with and without cached memories, in runs/recall*
#   make hosts        MaxText, Tunix and Flax's examples with our layers in them (Python 3.12)
#   make gpu-check    every GPU kernel: correctness, then times beside XLA, a matmul and attention
#
# Another Python: make demo PYTHON=python3.12. An NVIDIA GPU or a TPU is found by itself; to choose,
# ACCELERATOR=cuda13, cuda12, tpu or cpu.

PYTHON ?= python3
ACCELERATOR ?= auto
WORKDIR ?= runs/demo

VENV := .venv
HOSTS := .venv-hosts
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check --quiet
SPEC := setup.cfg pyproject.toml

# The tests install libtpu, which complains in every program where there is no TPU.
ifneq ($(filter auto cpu,$(ACCELERATOR)$(wildcard /dev/accel0 /dev/vfio/0)$(shell \
    command -v nvidia-smi 2>/dev/null)),)
export JAX_PLATFORMS ?= cpu
endif

.PHONY: demo test test-fast test-all lint docs bench recall hosts gpu-check clean
.DEFAULT_GOAL := test

demo: $(VENV)/.demo
	$(RUN) -m experiments.train --config=configs/demo.py --workdir=$(WORKDIR)

test test-fast test-all: $(VENV)/.test
	$(RUN) -m pytest -n auto --maxprocesses=8 $(CASES)

test: CASES := -m "not exhaustive"
test-fast: CASES := -m "not slow"

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m codespell_lib
	$(RUN) -m pyright --pythonpath $(RUN)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "The documentation: site/index.html"

bench: $(VENV)/.demo
	$(RUN) -m experiments.bench_layer

recall: $(VENV)/.demo
	$(RUN) -m experiments.mqar --config=configs/recall.py --workdir=runs/recall
	$(RUN) -m experiments.mqar --config=configs/recall.py:deep --workdir=runs/recall_deep

hosts: $(HOSTS)/.installed
	$(HOSTS)/bin/python -m experiments.hosts

gpu-check: $(VENV)/.demo
	$(RUN) -m experiments.check_kernels

clean:
	rm -rf $(VENV) $(HOSTS) build dist site *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "memcache_jax needs Python 3.11 or newer, got $$($(PYTHON) --version 2>&1)."; \
	    echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# What the demo needs, with the JAX for this machine's accelerator.
$(VENV)/.demo: $(SPEC) | $(RUN)
	@extra=$(ACCELERATOR); \
	if [ "$$extra" = auto ]; then \
	    driver=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null \
	        | head -n 1 | cut -d . -f 1); \
	    case "$$driver" in \
	        5[3-7][0-9] | 52[5-9]) extra=cuda12 ;; \
	        5[89][0-9] | [6-9][0-9][0-9]) extra=cuda13 ;; \
	        *) extra=cpu; if [ -e /dev/accel0 ] || [ -e /dev/vfio/0 ]; then extra=tpu; fi ;; \
	    esac; \
	fi; \
	if [ "$$extra" = cpu ]; then target=".[train]"; else target=".[train,$$extra]"; fi; \
	echo "Installing $$target into $(VENV): minutes, the first time ..."; \
	$(PIP) -e "$$target"
	@touch $@

$(VENV)/.test $(VENV)/.dev $(VENV)/.docs: $(VENV)/.%: $(SPEC) | $(RUN)
	@echo "Installing .[$*] into $(VENV): minutes, the first time ..."
	@$(PIP) -e '.[$*]'
	@touch $@

# Apart from the rest: the hosts need the newest JAX, and much that nothing else here needs.
$(HOSTS)/.installed: experiments/hosts/requirements.txt $(SPEC)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || { \
	    echo "MaxText needs Python 3.12, got $$($(PYTHON) --version 2>&1)."; \
	    echo "Name another one: make hosts PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(HOSTS)
	@echo "Installing the hosts into $(HOSTS) ..."
	@$(HOSTS)/bin/python -m pip install --disable-pip-version-check --quiet -e . -r $<
	@touch $@
