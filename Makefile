# Each target works as the only command on a fresh machine with Python 3.11 or 3.12.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Extra arguments: make train ARGS="method=ijepa run.dir=runs/ijepa", make test ARGS="-k masks"
ARGS ?=
# Tests side by side: one process a core, at most 8 (each takes up to 2 GB), one thread each.
JOBS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 1); echo $$((n < 8 ? n : 8)))
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile

.PHONY: help setup native train test test-all fuzz soak bench docs lint types clean
help:
	@echo "make setup   create $(VENV) and install njepa with everything it uses"
	@echo "make train   train the tiny recipe on the embedded images (a few minutes on a CPU)"
	@echo "make test    the tests but the slow ones (3 to 8 minutes on 2 cores);  make test-all: all of them"
	@echo "make bench   the benchmarks"
	@echo "make fuzz    changed files for every reader;  make soak: a training under faults (MINUTES=30)"
	@echo "make docs    these documents as a site, in site/"
	@echo "make native  build the C++ ops again (setup does it where there is a compiler)"
	@echo "make lint    ruff;  make types: mypy"

setup: $(STAMP)

$(STAMP): pyproject.toml
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
		{ echo "make: could not create $(VENV); on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet "setuptools>=77" -e ".[train,test,bench,docs]"
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

native: $(STAMP)
	NJEPA_BUILD_NATIVE=1 $(BIN)/python setup.py --quiet build_ext --inplace

train: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --log_level warning njepa/train.py --ds_config ds.json $(ARGS)

test: $(STAMP)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(STAMP)
	$(PYTEST) $(ARGS)

fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),10) $(ARGS)

soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.soak --minutes $(or $(MINUTES),30) $(ARGS)

bench: $(STAMP)
	@mkdir -p .benchmarks
	@# A failed check has no number; the other rows are kept, and the failure stays one.
	$(BIN)/pytest bench --benchmark-only --benchmark-json=.benchmarks/raw.json $(ARGS); rc=$$?; \
		$(BIN)/python -m bench.results .benchmarks/raw.json && \
		$(BIN)/python -m bench.report --png .benchmarks/roofline.png && exit $$rc

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
