# make train   train the tiny GPT with Muon on two ranks, ZeRO-2
# make test    lint, type check and run all tests, in two processes
# make quick   an answer in two minutes: the same without ranks and launches, but for a few tests on two ranks
# make docs    the documentation site, into site/: a dead link fails
# make bench   all benchmarks behind docs/performance.md, into runs/benchmarks (wants a quiet machine, and root)
# make evidence   AdamW, tuned, against what `ds-optforge init` makes of it: the tables of docs/from_adamw.md, in half an hour
# make choosing   every rule at its best rate, on two small models: the tables of docs/choosing.md, in an hour
# make incumbent   what README says of DeepSpeed's built-in Muon, as tests on two ranks
# make bench-gpu   benchmarks/gpu.py on all GPUs of this machine; make test-gpu   the tests that want one
# make soak    ten minutes of kills, stops and changed topologies, against undisturbed runs, then the slow tests: MINUTES=60 SEED=7
# make mutants-ranks   slips that only ranks show, put into a copy of the package: the distributed tests must notice each
# make mutants   small changes of the pure modules, one at a time: which of them no unit test notices
# make test-versions   a selection of tests on the oldest, a middle and the newest DeepSpeed of the range, and a table
# make test-frameworks   the recipes of docs/frameworks/ inside Lightning, Ray Train and others, each in an environment of its own
# make venv    only the set-up that both begin with
# make clean   remove what the targets above made, the results of training aside

PYTHON ?= python3

# On a CPU, DeepSpeed compiles an operator when it first runs. It looks on the path for ninja, which the environment
# has; and with the result kept in the environment, two clones do not rebuild each other's.
IN_VENV := PATH="$(CURDIR)/.venv/bin:$$PATH" TORCH_EXTENSIONS_DIR="$(CURDIR)/.venv/torch_extensions"
IN_TWO := -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: train test quick docs bench evidence choosing incumbent bench-gpu test-gpu soak mutants mutants-ranks test-versions test-frameworks venv clean

train: venv
	$(IN_VENV) OMP_NUM_THREADS=1 deepspeed --num_gpus 2 train.py --ds_config ds_configs/muon_zero2.json

test: venv
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) mypy
	$(IN_VENV) pytest $(IN_TWO)

quick: venv
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) mypy
	$(IN_VENV) pytest -m quick $(IN_TWO)

docs: venv
	$(IN_VENV) NO_MKDOCS_2_WARNING=1 mkdocs build --strict

bench: venv
	$(IN_VENV) OMP_NUM_THREADS=1 python benchmarks/orthogonalization.py
	$(IN_VENV) python benchmarks/scaling.py
	$(IN_VENV) OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/memory.py
	$(IN_VENV) OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/step.py
	$(IN_VENV) OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/modes.py
	$(IN_VENV) OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 benchmarks/modes.py
	$(IN_VENV) OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/rows.py
	$(IN_VENV) python benchmarks/wire.py
	$(IN_VENV) OMP_NUM_THREADS=1 python benchmarks/qk_clip.py

evidence: venv
	$(IN_VENV) OMP_NUM_THREADS=1 python benchmarks/from_adamw.py --parallel 2

choosing: venv
	$(IN_VENV) OMP_NUM_THREADS=1 python benchmarks/choosing.py --parallel 2

incumbent: venv
	$(IN_VENV) OMP_NUM_THREADS=1 pytest benchmarks/incumbent

# With another environment than .venv, whose torch may be for CPUs alone: make bench-gpu GPU_ENV=/path/of/it
GPU_ENV ?= $(CURDIR)/.venv

bench-gpu: $(if $(filter $(CURDIR)/.venv,$(GPU_ENV)),venv)
	PATH="$(GPU_ENV)/bin:$$PATH" PYTHONPATH="$(CURDIR)" torchrun --nproc-per-node auto benchmarks/gpu.py

test-gpu: $(if $(filter $(CURDIR)/.venv,$(GPU_ENV)),venv)
	PATH="$(GPU_ENV)/bin:$$PATH" pytest tests/gpu

MINUTES ?= 10

soak: venv
	$(IN_VENV) OMP_NUM_THREADS=1 PYTHONPATH="$(CURDIR)" python -m tests.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))
	$(IN_VENV) pytest -m slow

mutants-ranks: venv
	$(IN_VENV) OMP_NUM_THREADS=1 python tests/rank_mutants.py

mutants: venv
	$(IN_VENV) OMP_NUM_THREADS=1 PYTHONPATH="$(CURDIR)" python tests/mutation_score.py

test-versions: venv
	$(IN_VENV) python tests/versions.py

test-frameworks: venv
	$(IN_VENV) pytest -m frameworks tests/frameworks

# A build of an operator that was interrupted leaves a lock, for which all later ones would wait.
venv: .venv/installed
	@rm -f .venv/torch_extensions/*/lock

# torch goes first, pinned: left to the range in setup.cfg, pip would take the newest release, and on Linux that may
# bring gigabytes of CUDA libraries.
.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt torch==2.13.0
	.venv/bin/python -m pip install -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv .versions .frameworks build site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
