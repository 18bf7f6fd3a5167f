# The two commands: `make quickstart` (install, then distil on a laptop in minutes) and `make test` (install, then all tests).
PYTHON ?= python3
BIN := .venv/bin
# What CI ran. `make LOCK= test` tries the newest versions that requirements.txt admits.
LOCK ?= --constraint requirements.lock
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
QUICKSTART := configs/quickstart.py

# glibc gives freed memory back to the system, and every step faults it in again; in arenas of other threads whatever is set for the first
# one. Kept, in huge pages and in one arena, a step on a CPU is faster. Read when a process starts; `make bench` sets it for its own
# processes (opd_jax/bench/processes.py). What is set already stays.
ifeq ($(firstword $(shell getconf GNU_LIBC_VERSION 2>/dev/null)),glibc)
quickstart study: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
quickstart study: export MALLOC_MMAP_MAX_ ?= 0
quickstart study: export MALLOC_TRIM_THRESHOLD_ ?= 17179869184
quickstart study: export MALLOC_TOP_PAD_ ?= 268435456
quickstart study: export MALLOC_ARENA_MAX ?= 1
endif

.PHONY: bench quickstart study test test-fast setup lint lock clean
.DEFAULT_GOAL := quickstart

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/created requirements.txt $(wildcard requirements.lock)
	$(PIP) --requirement requirements.txt $(LOCK)
	@touch $@

.venv/tests-installed: .venv/installed pyproject.toml
	$(PIP) --editable '.[test]' $(LOCK)
	@touch $@

setup: .venv/tests-installed

# One task, four runs: a teacher and a student are made on first use; then on-policy distillation, SeqKD and SFT start from the same student.
quickstart: .venv/installed
	$(BIN)/python experiments/train.py --config=$(QUICKSTART) --workdir=runs/quickstart
	$(BIN)/python experiments/train.py --config=$(QUICKSTART):seqkd --workdir=runs/quickstart_seqkd
	$(BIN)/python experiments/train.py --config=$(QUICKSTART):sft --workdir=runs/quickstart_sft
	$(BIN)/python experiments/report.py --workdir=runs/quickstart,runs/quickstart_seqkd,runs/quickstart_sft --out=runs/quickstart/report.html

# Figures and tables of the README's section on estimators. ARGS=--quick: in minutes; ARGS=--teacher=DIR: with a language model.
study: .venv/installed
	$(BIN)/python experiments/claims.py
	$(BIN)/python experiments/study.py $(ARGS)

# Each phase of a step beside the machine's limits, and beside other systems. ARGS=--quick: in under 2 minutes; ARGS=--curves: more.
bench: .venv/tests-installed
	$(BIN)/python experiments/bench.py $(ARGS)

lint: .venv/tests-installed
	$(BIN)/ruff check .

test: lint
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

test-fast: .venv/tests-installed
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile -m "not slow"

# Writes the lock file from a fresh environment of the newest versions that requirements.txt admits.
lock:
	rm -rf .venv && $(MAKE) LOCK= setup
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache *.egg-info
