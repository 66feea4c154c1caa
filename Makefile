# `make` lists what there is. Needs Python 3.11 or newer with venv; everything else goes into .venv.

.DEFAULT_GOAL := help
.PHONY: help quickstart quickstart-again fit-demo test test-slow check bench report clean
.DELETE_ON_ERROR:

PY := .venv/bin/python
RUN ?= runs/quickstart
WORKERS ?= 2
# The Python that .venv is made with: `make test PYTHON=python3.13`. Empty: the first of these that will do.
PYTHON ?=
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11 python

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: .venv/installed ## train on the embedded digits, evaluate, write the report (minutes)
	@if [ -f runs/quickstart/checkpoints/last.json ]; then \
		echo "runs/quickstart is there: going on with it if it is unfinished, then evaluating. Anew: make quickstart-again"; \
		$(PY) -m train.classify --config configs/classify/digits.yaml --resume run.dir=runs/quickstart; \
	else \
		rm -rf runs/quickstart; \
		$(PY) -m train.classify --config configs/classify/digits.yaml run.dir=runs/quickstart; \
	fi
	$(PY) -m eval.classify --run runs/quickstart
	$(PY) -m eval.reconstruct --run runs/quickstart
	$(PY) -m eval.report --run runs/quickstart
	@echo
	@echo "Done. In runs/quickstart:"
	@echo "  report.html          open it in a browser: curves, film strips, mistakes, the space of weights"
	@echo "  eval/classify.json   accuracy and PSNR on the test split"
	@echo "  figures/             the pictures by themselves"

quickstart-again: ## the same from the beginning
	rm -rf runs/quickstart
	@$(MAKE) --no-print-directory quickstart

DEMO := runs/fit_demo
TASKS := image audio tomography super_resolution inpainting denoising poisson shape radiance video

fit-demo: .venv/installed-dev ## fit one signal per task, write one page with pictures, players and numbers (minutes)
	rm -rf $(DEMO)
	$(PY) -m data_pipes.prepare synthetic_scene --out $(DEMO)/data/scene
	set -e; for task in $(TASKS); do \
		path=; [ $$task != radiance ] || path=signal.path=$(DEMO)/data/scene; \
		echo; $(PY) -m train.fit --config configs/fit/$$task.yaml run.dir=$(DEMO)/$$task $$path; \
	done
	$(PY) -m eval.gallery --runs $(TASKS:%=$(DEMO)/%) --out $(DEMO)/index.html --title "One signal per task" \
		--floor image.psnr=30 audio.snr=25 "tomography.psnr=filtered back-projection+2" denoising.psnr=noisy+3 \
		shape.iou=0.95 radiance.psnr=25

test: .venv/installed-dev ## the fast tests
	$(PY) -m pytest -n $(WORKERS) --dist worksteal

test-slow: .venv/installed-dev ## the slow tests alone (real trainings)
	$(PY) -m pytest -m slow --timeout 3600

check: .venv/installed-dev ## style, types, import rule, sizes
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	$(PY) -m benchmarks.size_report

bench: .venv/installed ## measure: a step against the paper's formulation, the engines, how cost grows, reading (an hour)
	$(PY) -m benchmarks.step
	$(PY) -m benchmarks.parts
	$(PY) -m benchmarks.engines
	$(PY) -m benchmarks.scaling
	$(PY) -m benchmarks.pipeline

report: .venv/installed ## write the report of RUN=runs/NAME again
	$(PY) -m eval.report --run $(RUN)

clean: ## remove caches and built packages; runs, data and .venv stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

# ---- the environment ---------------------------------------------------------------------------------------------
# Two stamps: running needs no development tools. Both are renewed when pyproject.toml changes.

.venv/installed: pyproject.toml | .venv/made
	$(PY) -m pip install -e .
	@touch $@

.venv/installed-dev: pyproject.toml | .venv/made
	$(PY) -m pip install -e '.[dev]'
	@touch $@ .venv/installed

# A .venv that somebody else made is kept if it will do. A candidate is run, not only found: what is called python3.13
# may be a shim for a version that is not there.
.venv/made:
	@if $(PY) -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		echo "Using the .venv that is here ($$($(PY) --version))"; touch $@; exit 0; \
	fi; \
	for python in $(or $(PYTHON),$(CANDIDATES)); do \
		"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
		if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
			lacking="$$lacking $$python"; continue; \
		fi; \
		echo "Making .venv with $$("$$python" --version) ($$python)"; \
		"$$python" -m venv --clear .venv && touch $@ && exit 0; \
		exit 1; \
	done; \
	if [ -n "$$lacking" ]; then \
		echo "These Pythons lack venv or pip:$$lacking. Install them (Debian and Ubuntu: apt install python3-venv), then make again." >&2; \
	else \
		echo "Python 3.11 or newer is needed and none of $(or $(PYTHON),$(CANDIDATES)) is. Install one, or name it: make $(or $(MAKECMDGOALS),quickstart) PYTHON=/path/to/python3" >&2; \
	fi; \
	exit 1
