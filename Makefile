# make train   train the tiny GPT with Muon on two ranks, ZeRO-2
# make test    lint, type check and run all tests
# make venv    only the set-up that both begin with
# make clean   remove what the targets above made, the results of training aside

PYTHON ?= python3
VENV := $(CURDIR)/.venv
INSTALLED := $(VENV)/.installed

# The virtual environment comes first on the path because DeepSpeed compiles an operator when it first runs on a CPU
# and looks for ninja there; the result is kept beside it, so that clones do not rebuild each other's.
export PATH := $(VENV)/bin:$(PATH)
export TORCH_EXTENSIONS_DIR := $(VENV)/torch_extensions

.PHONY: train test venv clean

train: venv
	OMP_NUM_THREADS=1 deepspeed --num_gpus 2 train.py --ds_config ds_configs/muon_zero2.json

test: venv
	ruff check .
	ruff format --check .
	mypy
	pytest

venv: $(INSTALLED)

# torch goes first, pinned to the release: left to the range in setup.cfg, pip takes the newest, which may bring
# gigabytes of CUDA libraries where this one does not.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt torch==2.13.0
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
