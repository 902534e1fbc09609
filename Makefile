# One command from a fresh clone: `make demo` (results table) or `make test`. Each makes .venv when it is missing.

WORKDIR ?= runs/glyphs
VENV := .venv
PARITY := .venv-parity
# The CUDA wheels weigh 3 GiB: only where nvidia-smi finds a GPU.
REQUIREMENTS := $(shell if nvidia-smi -L >/dev/null 2>&1; then echo requirements.txt; else echo requirements-cpu.txt; fi)
SUITABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))

# Sets $$python to the first interpreter that runs (a pyenv shim may not) and is 3.11 or 3.12.
define find_python
python=; for p in $(PYTHON) python3.12 python3.11 python3 python; do \
	if $$p -c '$(SUITABLE)' >/dev/null 2>&1; then python=$$p; break; fi; done
endef
NO_PYTHON = echo "modelstock_jax needs Python 3.11 or 3.12 with venv: install one, or say PYTHON=/path/to/python3.12" >&2; exit 1

# install VENV REQUIREMENT-FILES: by uv where it is at hand, else by the environment's own pip.
define install
if command -v uv >/dev/null 2>&1; then uv pip install --quiet --python $(1)/bin/python $(2); \
else $(1)/bin/python -m pip --version >/dev/null 2>&1 || $(1)/bin/python -m ensurepip; \
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(2); fi
endef

# A step takes and frees a hundred megabytes: in large pages that costs glibc, and so the CPU, less.
demo studies: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo studies test test-fast test-slow test-parity kill-test gpu gpu-wheels verify-clip \
	verify-imagenet lint clean

demo: $(VENV)/.installed-$(REQUIREMENTS)
	$(VENV)/bin/python launch.py --config=configs/glyphs.py --workdir=$(WORKDIR)

# Finished measurements are committed lines: only what is missing is trained.
STUDIES := $(VENV)/bin/python -m studies
RESULTS := --workdir=runs/studies --ledger=docs/results/measured.jsonl --out=docs/results
studies: $(VENV)/.installed-$(REQUIREMENTS)
	$(STUDIES) all $(RESULTS)
	$(STUDIES) fig2 table1 table7 units carried ratio_rules ratio_candidates --anchors=glyph-clip-1 $(RESULTS)
	$(STUDIES) generality --anchors=tower:resnet,tower:convnext,tower:hybrid,tower:vit $(RESULTS)

# A first run compiles for minutes: as JAX's own tests, these do without LLVM's slower passes.
test test-fast: export XLA_FLAGS = --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true
test: lint
	$(VENV)/bin/python -m pytest -q -n 2 --dist worksteal

# Daily use: all but what compiles or trains for more than about a second (tests/conftest.py).
test-fast: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -q -n 2 --dist worksteal -m fast

# Full-size models take gigabytes each: those of the parity tests run one at a time.
test-slow: $(VENV)/.installed-test $(PARITY)/.installed
	$(VENV)/bin/python -m pytest -q -n 2 --dist worksteal -m slow
	$(PARITY)/bin/python -m pytest -q -m "slow and parity" tests/parity

# torch and the libraries in requirements-parity.txt are only references, in a separate environment.
test-parity: $(PARITY)/.installed
	$(PARITY)/bin/python -m pytest -q -m "parity and not slow" tests/parity

# A hundred SIGKILLs over short runs, each of which must end as if it had never been killed.
kill-test: $(VENV)/.installed-test
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m tests.kill.series --kills=100

# All checks and measurements of benchmarks/gpu.py; ARGS=--rehearse runs tiny sizes on the CPU. A
# machine with a GPU may have no network: without .venv its own python3 is used.
GPU_PYTHON = $(or $(PYTHON),$(firstword $(wildcard $(VENV)/bin/python) python3))
gpu:
	$(GPU_PYTHON) benchmarks/gpu.py $(ARGS)

# With a network: what such a machine lacks, as wheels.
gpu-wheels:
	$(GPU_PYTHON) benchmarks/gpu_wheels.py

# With a network: a published CLIP's logits, and those that transformers states (benchmarks/verify_models.py).
verify-clip: $(VENV)/.installed-$(REQUIREMENTS)
	$(VENV)/bin/python benchmarks/verify_models.py $(ARGS)

# With ImageNet and its shifts in DATA: accuracies, and those of the paper and its authors.
verify-imagenet: $(VENV)/.installed-$(REQUIREMENTS)
	$(VENV)/bin/python benchmarks/verify_imagenet.py --data "$(DATA)" $(ARGS)

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check --quiet .
	$(VENV)/bin/pyrefly check --summary=none

clean:
	rm -rf $(VENV) $(PARITY) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(find_python); \
	if command -v uv >/dev/null 2>&1; then uv venv --quiet --python "$${python:-3.12}" $(VENV); \
	elif test -n "$$python"; then "$$python" -m venv $(VENV); \
	else $(NO_PYTHON); fi

# The stamps are dated by the requirement files: nothing is installed twice.
$(VENV)/.installed-$(REQUIREMENTS): $(sort requirements-cpu.txt $(REQUIREMENTS)) | $(VENV)/bin/python
	@echo "Installing $(REQUIREMENTS) into $(VENV) (once) ..."
	@$(call install,$(VENV),-r $(REQUIREMENTS) -e .)
	@touch $@

$(VENV)/.installed-test: requirements-test.txt $(VENV)/.installed-$(REQUIREMENTS)
	@$(call install,$(VENV),-r requirements-test.txt)
	@touch $@

$(PARITY)/.installed: requirements-cpu.txt requirements-test.txt requirements-parity.txt pyproject.toml
	@$(find_python); test -n "$$python" || { $(NO_PYTHON); }; \
	echo "Installing torch, requirements-cpu.txt and requirements-parity.txt into $(PARITY) (once) ..."; \
	test -x $(PARITY)/bin/python || "$$python" -m venv $(PARITY)
	@$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-cpu.txt -r requirements-test.txt -r requirements-parity.txt
	@touch $@
