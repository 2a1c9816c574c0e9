# A fresh machine needs make and Python >= 3.11 with venv; everything else goes into .venv, from a lock.
#   make reproduce [ARGS="--seed 1"]   make test   make lab   make short   make oracles FROM=...   make clean
#   make rehearse     make gpu     make wheels     make docs     make sums     make pictures     make gif
#   make types     make coverage     make audit
PYTHON ?= python3
ifndef LOCK
LOCK := docker/$(if $(shell nvidia-smi -L 2>/dev/null),cuda,cpu).lock
endif
# The whole pipeline at a shortened budget: the same code, too little training to learn anything.
SHORT ?= --rows 200 --max_steps 6 --pretrain.rows 200 --pretrain.max_steps 12 --limit 8 --lengths 32,64
BIN := .venv/bin
# Where torch's CPU build lies: pip's own index has only the build for CUDA on Linux.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: reproduce test types coverage audit oracles sums short rehearse gpu wheels pictures gif docs lab venv clean FORCE

reproduce: venv
	$(BIN)/treediff reproduce $(ARGS)

test: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify --keep-id notebooks/*.ipynb
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# Strict types in masking, data, sampling and scoring: pyproject.toml says how strict.
types: venv
	$(BIN)/mypy

# The share of the package's lines that the tests run, the processes that they start included; less than 90 % fails.
coverage: venv
	rm -f .coverage .coverage.*
	$(BIN)/python -m coverage run -m pytest -n 2 --dist loadfile $(ARGS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --skip-covered --fail-under 90

# Known vulnerabilities of what the lock names, by PyPI's database; a package that it does not know fails, too.
AUDIT := build/audit
audit:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet pip-audit==2.10.1
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r $(LOCK)

# Public files that some tests need, from a folder of yours; without them those tests are skipped, and say so.
oracles:
	@$(PYTHON) tests/take_oracles.py "$(FROM)"

short: venv
	@out=$$(mktemp -d) && echo "output: $$out/runs" && \
	TREEDIFF_RUNS=$$out/runs $(BIN)/treediff reproduce $(SHORT) $(ARGS) && rm -rf "$$out"

# The paper's preset at small width on a CPU, from a stand-in hub: no prompt, no warning, nothing fetched twice.
rehearse: venv
	$(BIN)/python benchmarks/rehearse.py $(ARGS)

# All that waits for a GPU, in pieces of less than ten minutes; goes on where it stopped (docs/training.md). PYTHON is
# the GPU machine's own where .venv cannot be made: make gpu PY=python3
PY ?= $(BIN)/python
gpu:
	$(PY) benchmarks/gpu.py $(ARGS)

# What a GPU machine without a network lacks, as wheels (less than 64 MB together).
wheels: venv
	$(BIN)/python benchmarks/wheels.py $(ARGS)

# The README's picture of the three maskings.
pictures: venv
	$(BIN)/treediff prepare && $(BIN)/python -m treediff.report.pictures docs/maskings.png

# The README's animation, from the tiny preset's own run (which it completes if need be).
gif: venv
	$(BIN)/treediff score --masking ast && $(BIN)/python -m treediff.report.trajectory docs/denoising.gif

# The site, to be opened as files: build/site/index.html. Notebooks that `make reproduce` has not executed are executed, at
# the switches in DOCS: make docs DOCS="--execute rows=200 max_steps=6"
docs: venv
	$(BIN)/python docs/site/build.py $(DOCS)

lab: venv
	$(BIN)/jupyter lab notebooks/ $(ARGS)

venv: .venv/done

# An install that was cut off goes on where it stopped: its key is there, `done` is not. The constraints pin what
# builds the few source packages, too.
.venv/done: .venv/key pyproject.toml
	@case "$(LOCK)" in *cpu.lock) \
	    if $(BIN)/python -c 'import urllib.request as u; u.urlopen("$(CPU_INDEX)/torch/", timeout=5)' 2>/dev/null; \
	    then echo "torch: its CPU build, from $(CPU_INDEX)"; echo "--extra-index-url $(CPU_INDEX)" >.venv/index; \
	    else echo "torch: as pip finds it ($(CPU_INDEX) does not answer); CUDA's libraries may come with it, 3 GB"; \
	    echo >.venv/index; fi;; *) echo >.venv/index;; esac
	PIP_CONSTRAINT=$(LOCK) PIP_BUILD_CONSTRAINT=$(LOCK) \
	    $(BIN)/python -m pip install --use-pep517 -r $(LOCK) $$(cat .venv/index)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --no-index --editable .
	@touch $@

# What .venv was made from and where. Another lock, Python or folder makes it anew; the same leaves the file as it is.
.venv/key: FORCE
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "make: $(PYTHON) is missing or older than 3.11; name a newer one: make PYTHON=python3.12" >&2; exit 2; }
	@key="$$($(PYTHON) -V) $(CURDIR) $$(cksum <$(LOCK))"; \
	if [ "$$key" != "$$(cat $@ 2>/dev/null)" ]; then \
	    echo "making .venv from $(LOCK)"; $(PYTHON) -m venv --clear .venv && echo "$$key" >$@; \
	fi

# The SHA-256 of what `treediff verify files` checks; run it after a golden file or a published result has changed.
sums:
	git ls-files tests/golden tests/sources docs/results/*.json docs/results/*.gz | grep -v claims.json | LC_ALL=C sort | \
	xargs sha256sum >docs/SHA256SUMS

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find treediff tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
