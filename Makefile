# make train   set up .venv and teach the bundled tiny model to think       (ARGS="--seed 1" are passed to train.py)
# make test    set up .venv and run the tests                               (make test-all: the slow ones too)
# make compare set up .venv and compare every algorithm of the family       (ARGS="--only ppo grpo"; all: an hour)
# make bench   set up .venv, and .venv-trl, and time a step beside TRL's    (ARGS="--reward task")
# make ui             set up .venv and serve the page over runs/, for a browser        (ARGS="--port 7861")
# make screenshots    the README's pictures of the page, of the newest run; needs chromium
# make test-unsloth   set up .venv-unsloth-cpu and run the calls into Unsloth against its fallback on a CPU
# make gpu-check      what only a machine with an NVIDIA GPU can show, in parts      (PART="sampler grpo0"; none: a list)
#
# PYTHON=python3.12 chooses the interpreter, PIP_ARGS="--extra-index-url ..." is passed to pip. On a machine with an NVIDIA
# card .venv gets Unsloth as well (requirements.txt); REQUIREMENTS=requirements-cpu.txt leaves it out.

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
REQUIREMENTS ?= $(if $(shell command -v nvidia-smi 2>/dev/null),requirements.txt,requirements-cpu.txt)
GYM = reasoning-gym==0.1.25
# The first Unsloth that runs on a CPU asks for a newer certifi than the rest has: without dependencies, all of which are there.
UNSLOTH_ON_CPU = unsloth==2026.10.9 unsloth_zoo==2026.10.9
PY = .venv/bin/python

.PHONY: train ui screenshots test test-all test-unsloth compare bench gpu-check clean

train: .venv/installed
	@$(PY) train.py $(ARGS)

ui: .venv/installed
	@$(PY) ui/app.py $(ARGS)

screenshots: .venv/installed
	@$(PY) tests/ui/test_ui_page.py $(ARGS)

test: .venv/installed
	@$(PY) -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

test-all: .venv/installed
	@$(PY) -m pytest $(ARGS)

compare: .venv/installed
	@$(PY) bench/compare.py $(ARGS)

bench: .venv/installed
	@PIP_ARGS="$(PIP_ARGS)" $(PY) bench/step.py --peer trl $(ARGS)

gpu-check: $(if $(PART)$(ARGS),.venv/installed-unsloth,.venv/installed)
	@$(PY) bench/gpu_check.py $(PART) $(ARGS)

test-unsloth: .venv-unsloth-cpu/installed
	@TEST_UNSLOTH=1 .venv-unsloth-cpu/bin/python -m pytest tests/rl/model/test_unsloth.py $(ARGS)

.venv-unsloth-cpu/installed: requirements-cpu.txt
	@$(PYTHON) -m venv .venv-unsloth-cpu
	@.venv-unsloth-cpu/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r requirements-cpu.txt
	@.venv-unsloth-cpu/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps $(UNSLOTH_ON_CPU)
	@touch $@

.venv/installed: $(REQUIREMENTS) requirements-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Ponder needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	@echo "Setting up .venv from $(REQUIREMENTS): PyTorch, transformers, peft and more, one to two minutes with a fast connection ..."
	@$(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r $(REQUIREMENTS)
	@$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) $(GYM) 2>/dev/null || \
		echo "Without reasoning_gym, since one of its packages needs a C compiler here; everything else works."
	@touch $@

# A .venv made without a card in sight lacks Unsloth.
.venv/installed-unsloth: .venv/installed requirements.txt
	@$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r requirements.txt
	@touch $@

clean:
	rm -rf .venv .venv-* .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
