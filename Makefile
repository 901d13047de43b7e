# make train          set up .venv and train the bundled tiny model             (ARGS="--seed 1" is passed to train.py)
# make ui             serve the page for the runs in runs/                      (ARGS="--port 7861")
# make quick          tests of the mathematics, the settings and the graders, in half a minute
# make test           fast tests, a few minutes
# make test-all       all tests, about an hour
# make lint           ruff check and ruff format --check
# make compare        all algorithms, three seeds each, about an hour           (ARGS="--only ppo grpo")
# make bench          a training step compared with TRL                         (ARGS="--reward task")
# make test-gpu       tests that need an NVIDIA GPU, a few minutes
# make test-unsloth   tests of the calls into Unsloth, with its CPU fallback, in .venv-unsloth-cpu
# make screenshots    screenshots of the page for the docs, from the newest run; needs chromium
# make clean          remove environments and caches
#
# PYTHON=python3.12 selects the interpreter, PIP_ARGS="--extra-index-url ..." is passed to pip. On a machine with an NVIDIA
# GPU, .venv includes Unsloth (requirements.txt); REQUIREMENTS=requirements-cpu.txt leaves it out.

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
REQUIREMENTS ?= $(if $(shell command -v nvidia-smi 2>/dev/null),requirements.txt,requirements-cpu.txt)
GYM = reasoning-gym==0.1.25  # not in requirements: a dependency needs a C compiler on some machines
PY = .venv/bin/python
PIP = -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
QUICK = tests/rl/test_algorithms.py tests/rl/test_family.py tests/rl/test_config.py tests/rl/test_terms.py tests/test_docs.py \
	tests/grading/test_answers.py tests/grading/test_rewards.py tests/grading/test_scoring.py tests/test_layers.py

.PHONY: train ui quick test test-all lint compare bench test-gpu test-unsloth screenshots clean

train: .venv/installed
	@$(PY) train.py $(ARGS)

ui: .venv/installed
	@$(PY) ui/app.py $(ARGS)

quick: .venv/installed-dev
	@$(PY) -m pytest -m "not slow" -n 2 --dist loadfile $(QUICK) $(ARGS)

test: .venv/installed-dev
	@$(PY) -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

test-all: .venv/installed-dev
	@$(PY) -m pytest $(ARGS)

test-gpu: .venv/installed-dev
	@$(PY) -m pytest -m gpu -s tests/gpu $(ARGS)

lint: .venv/installed-dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

compare: .venv/installed-dev
	@$(PY) bench/compare.py $(ARGS)

bench: .venv/installed-dev
	@$(PY) bench/vs_peer.py $(ARGS)

screenshots: .venv/installed-dev
	@$(PY) tests/ui/test_ui_page.py $(ARGS)

test-unsloth: .venv-unsloth-cpu/installed
	@TEST_UNSLOTH=1 .venv-unsloth-cpu/bin/python -m pytest tests/rl/model/test_unsloth.py $(ARGS)

.venv/installed: $(REQUIREMENTS) requirements-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Ponder needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	@echo "Setting up .venv from $(REQUIREMENTS): PyTorch, transformers, peft and more, one to two minutes with a fast connection ..."
	@$(PYTHON) -m venv .venv
	@$(PY) $(PIP) -r $(REQUIREMENTS)
	@$(PY) $(PIP) $(GYM) 2>/dev/null || echo "reasoning_gym was not installed: one of its dependencies needs a C compiler. Everything else works."
	@touch $@

# Unsloth installs the version of TRL that it needs.
.venv/installed-dev: .venv/installed requirements-dev.txt
	@$(if $(filter requirements.txt,$(REQUIREMENTS)),grep -v "^trl" requirements-dev.txt,cat requirements-dev.txt) >.venv/dev.txt
	@$(PY) $(PIP) -r .venv/dev.txt
	@touch $@

# Unsloth is installed without its dependencies: some are packages for GPUs, and the others are installed already.
.venv-unsloth-cpu/installed: requirements-cpu.txt requirements-dev.txt requirements.txt
	@$(PYTHON) -m venv .venv-unsloth-cpu
	@.venv-unsloth-cpu/bin/python $(PIP) -r requirements-cpu.txt -r requirements-dev.txt
	@.venv-unsloth-cpu/bin/python $(PIP) --no-deps $$(grep unsloth requirements.txt)
	@touch $@

clean:
	rm -rf .venv .venv-* .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
