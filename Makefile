# One command from a fresh clone: `make demo` (results table) or `make test`. Each makes .venv when it is missing.

WORKDIR ?= runs/glyphs
VENV := .venv
PARITY := .venv-parity
# The extra of pyproject.toml. The CUDA wheels weigh 3 GiB: only where nvidia-smi finds a GPU.
EXTRA := $(shell if nvidia-smi -L >/dev/null 2>&1; then echo cuda12; else echo cpu; fi)
SUITABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))

# Sets $$python to the first interpreter that runs (a pyenv shim may not) and is 3.11 or 3.12.
define find_python
python=; for p in $(PYTHON) python3.12 python3.11 python3 python; do \
	if $$p -c '$(SUITABLE)' >/dev/null 2>&1; then python=$$p; break; fi; done
endef
NO_PYTHON = echo "modelstock_jax needs Python 3.11 or 3.12 with venv: install one, or say PYTHON=/path/to/python3.12" >&2; exit 1

# install EXTRAS into .venv: by uv, which takes a tenth of pip's time, or by pip if that fails.
PIP := $(VENV)/bin/python -m pip
define install
uv=$$(command -v uv || command -v $(VENV)/bin/uv); \
if test -z "$$uv" || ! "$$uv" pip install --quiet --python $(VENV)/bin/python -e '.[$(1)]'; then \
	$(PIP) --version >/dev/null 2>&1 || $(VENV)/bin/python -m ensurepip; \
	$(PIP) install --quiet --disable-pip-version-check -e '.[$(1)]'; fi
endef

# A step takes and frees a hundred megabytes: in large pages that costs glibc, and so the CPU, less.
demo studies: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo studies test test-fast test-slow test-parity kill-test gpu gpu-wheels verify-clip \
	verify-imagenet docs lint clean

demo: $(VENV)/.installed-$(EXTRA)
	$(VENV)/bin/python launch.py --config=configs/glyphs.py --workdir=$(WORKDIR)

# Finished measurements are committed lines: only what is missing is trained.
STUDIES := $(VENV)/bin/python -m studies
RESULTS := --workdir=runs/studies --ledger=docs/results/measured.jsonl --out=docs/results
studies: $(VENV)/.installed-$(EXTRA)
	$(STUDIES) all $(RESULTS)
	$(STUDIES) fig2 table1 table7 units carried ratio_rules ratio_candidates --anchors=glyph-clip-1 $(RESULTS)
	$(STUDIES) generality --anchors=tower:resnet,tower:convnext,tower:hybrid,tower:vit $(RESULTS)

# Most of their time is that of the compiler: tests/compiler_flags.py makes it do less.
test test-fast: export FAST_COMPILATION = 1
test: lint
	$(VENV)/bin/python -m pytest -q -n 2 --dist worksteal

# Daily use: all but what compiles or trains for more than about a second (tests/conftest.py).
test-fast: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -q -n 2 --dist worksteal -m fast

# Full-size models take gigabytes each: those of the parity tests run one at a time.
test-slow: $(VENV)/.installed-test $(PARITY)/.installed
	$(VENV)/bin/python -m pytest -q -n 2 --dist worksteal -m slow
	$(PARITY)/bin/python -m pytest -q -m "slow and parity" tests/parity

# torch and the other packages of the extra parity are only references, in a separate environment.
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
verify-clip: $(VENV)/.installed-$(EXTRA)
	$(VENV)/bin/python benchmarks/verify_models.py $(ARGS)

# With ImageNet and its shifts in DATA: accuracies, and those of the paper and its authors.
verify-imagenet: $(VENV)/.installed-$(EXTRA)
	$(VENV)/bin/python benchmarks/verify_imagenet.py --data "$(DATA)" $(ARGS)

# The documentation site; a warning is an error.
docs: $(VENV)/.installed-docs
	$(VENV)/bin/python -m sphinx -E -W --keep-going -q -b html -c docs . build/site
	@echo "open build/site/index.html"

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
	@# uv does not read pip's configuration: with a mirror in it, pip installs.
	@command -v uv >/dev/null 2>&1 || $(PIP) config list | grep "[.]index-url=" >/dev/null || \
		$(PIP) install --quiet --disable-pip-version-check uv || true

# The stamps are dated by pyproject.toml: nothing is installed twice.
$(VENV)/.installed-$(EXTRA): pyproject.toml | $(VENV)/bin/python
	@echo "Installing modelstock_jax[$(EXTRA)] into $(VENV) (once) ..."
	@$(call install,$(EXTRA))
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed-$(EXTRA)
	@$(call install,test)
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-$(EXTRA)
	@$(call install,docs)
	@touch $@

$(PARITY)/.installed: pyproject.toml
	@$(find_python); test -n "$$python" || { $(NO_PYTHON); }; \
	echo "Installing torch and modelstock_jax[cpu,test,parity] into $(PARITY) (once) ..."; \
	test -x $(PARITY)/bin/python || "$$python" -m venv $(PARITY)
	@$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[cpu,test,parity]'
	@touch $@
