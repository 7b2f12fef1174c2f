# Every target creates or refreshes .venv by itself, only when needed. `make help` lists them.
#   ARGS="..." is passed on:  make test ARGS="-k steering",  make demo ARGS="seed=1"
#   PYTHON=python3.12 make setup   chooses the interpreter of .venv (3.10 to 3.13)

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo serve test test-fast test-all test-browser bench audit lint format clean
ARGS ?=

# ninja and the project's own commands are found first; set-up itself must see the machine's PATH.
RUN := PATH="$(CURDIR)/.venv/bin:$$PATH"

# DeepSpeed takes an empty DS_ACCELERATOR for a wrong one, and probes for a device when there is none.
ifeq ($(strip $(DS_ACCELERATOR)),)
  ifeq ($(wildcard /dev/nvidiactl /dev/dxg /dev/kfd),)
    export DS_ACCELERATOR := cpu
  else
    unexport DS_ACCELERATOR
  endif
endif

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | while IFS=$$'\t' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

setup: ## creates or refreshes .venv (all other targets do so by themselves)
	@scripts/setup.sh
	@$(if $(filter setup,$(MAKECMDGOALS)),echo "set-up: .venv is ready; activate it with: source .venv/bin/activate")

demo: setup ## trains on real digits, draws, steers, compares with Best-of-N, writes outputs/demo/report.html
	@$(RUN) python -m jobs.demo $(ARGS)

serve: setup ## serves the demo's model and rewards on 127.0.0.1:8000 until Ctrl-C (trains it first when there is none)
	@$(RUN) python -m scripts.run_server $(ARGS)

test: setup ## the test suite, at most 20 minutes on 2 cores
	@$(RUN) python -m pytest -m "not slow and not browser" $(ARGS)

test-fast: setup ## the tests without a cluster, under 2 minutes
	@$(RUN) python -m pytest -m "not ray and not slow and not browser" $(ARGS)

test-all: setup ## everything, the full matrices and drills, at most 75 minutes
	@$(RUN) python -m pytest -m "not browser" $(ARGS)

test-browser: setup ## the pages in headless Chromium
	@$(RUN) python -m scripts.browser
	@$(RUN) python -m pytest -m browser tests/browser $(ARGS)

bench: setup ## the benchmarks, each a side-by-side ratio, into benchmarks/results/ (but those that judge a given model)
	@set -e; for file in $$(grep -L 'required=True' $$(grep -l '__main__' benchmarks/*.py)); do \
	  module=benchmarks.$$(basename "$$file" .py); echo "bench: $$module"; $(RUN) python -m "$$module" $(ARGS); done

lint: setup ## ruff (format and lint) and the type check
	@$(RUN) ruff format --check .
	@$(RUN) ruff check .
	@$(RUN) mypy

audit: setup ## installed packages against known vulnerabilities (pip-audit; needs pypi.org)
	@$(RUN) python -m scripts.audit

format: setup ## lets ruff put the code into shape
	@$(RUN) ruff format .
	@$(RUN) ruff check --fix .

clean: ## removes .venv and caches; what runs wrote (runs/, outputs/, data/) stays
	@rm -rf .venv .venv.lock .pytest_cache .ruff_cache .mypy_cache build dist *.egg-info
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
