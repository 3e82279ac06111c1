# make run and make test do their own set-up, in .venv, from requirements.txt.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: run test test-newest test-triton test-flower lint bench bench-memory proof bench-gpu clean

run: $(READY)
	@echo "== fedalt run: the built-in sample, eight clients, about two minutes on two cores"
	$(BIN)/fedalt run

test: lint
	@echo "== the tests, one process a core; about eleven minutes, eight once the kernels are compiled"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -q --durations=5

# The newest Python that there is beside the default one, by name or as a version of pyenv.
NEWEST ?= $(firstword $(foreach v,3.13 3.12,$(shell PYENV_VERSION=$v python$v -c \
  'import sys; print(sys.executable)' 2>/dev/null)))

test-newest:
ifeq ($(NEWEST),)
	@echo "== no newer Python is at hand (3.13, 3.12; or NEWEST=...): tested on the default one alone"
else
	@echo "== $(NEWEST): all compiles without a warning, and the tests that need no PyTorch"
	$(NEWEST) -m venv --clear .venv-newest
	.venv-newest/bin/pip install --quiet --disable-pip-version-check -c requirements.txt \
	  setuptools pytest PyYAML numpy pillow tqdm
	.venv-newest/bin/python -W error -m compileall -q -f fedalt fedalt_kernels bench tests scripts examples
	.venv-newest/bin/python scripts/newest.py
endif

# The older of the two Triton releases that are supported, laid before the pinned one.
OLDER := .venv-triton/3.6.0

test-triton: $(READY) $(OLDER)
	@echo "== Triton 3.6.0: Hopper's kernels compiled without a spill, and launched directly"
	PYTHONPATH=$(OLDER) $(BIN)/python -m bench compile --target sm_90 --dtype bf16 > $(OLDER)/compiled.md
	OMP_NUM_THREADS=1 PYTHONPATH=$(OLDER) $(BIN)/python -m pytest tests/kernels/test_launch.py -q

$(OLDER): Makefile
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ triton==$(notdir $@)
	@touch $@

# Flower's pins fight those of requirements.txt, so it has a lock and an environment of its own.
FLOWER := .venv-flower/bin

test-flower: .venv-flower/ready
	@echo "== sites on Flower, in one process and as processes on loopback; record-level privacy"
	OMP_NUM_THREADS=1 $(FLOWER)/python -m pytest tests/flower tests/training/test_private.py -q --durations=5

lint: $(READY)
	@echo "== ruff and mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	@echo "== the layer and a training step beside their peers; checks first, then times"
	$(BIN)/python -m pytest bench -q -s

bench-memory: $(READY)
	@echo "== a training step's memory and time beside PEFT, within five minutes"
	$(BIN)/python -m bench memory

proof: $(READY)
	@echo "== what can be shown of the kernels without a GPU: compiled, counted, interpreted"
	$(BIN)/python -m bench proof

# With any Python that has torch and triton, so that a GPU machine needs no set-up and no network.
bench-gpu:
	@echo "== the layer, a whole model and its memory on this GPU, within ten minutes; checks first, then times"
	$(PYTHON) -m bench gpu

clean:
	rm -rf .venv .venv-newest .venv-triton .venv-flower build *.egg-info

$(READY): requirements.txt setup.py
	@echo "== set-up: a virtual environment in .venv (once; about two minutes)"
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

.venv-flower/ready: requirements-flower.txt setup.py
	@echo "== set-up: a virtual environment in .venv-flower (once; about two minutes)"
	$(PYTHON) -m venv --clear .venv-flower
	$(FLOWER)/pip install --quiet --disable-pip-version-check -r requirements-flower.txt
	$(FLOWER)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
