# Every target sets .venv up by itself; PYTHON=python3.12 picks another interpreter.
.PHONY: setup test test-fast lint format quickstart demo-disaggregated clean

setup:
	@./scripts/setup.sh

# written once; in an environment that forbids it, every process would compile what it imports
unexport PYTHONDONTWRITEBYTECODE

# one thread each: the tests start many processes of their own
test test-fast: export OMP_NUM_THREADS ?= 1

# one more than there are cores, since many tests wait for processes that they started; a file's
# tests stay together, since they share what they have made; tests/conftest.py says which come first
workers = $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
pytest = .venv/bin/python -m pytest -n $(workers) --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations=20

test: setup .venv/.trackers
	$(pytest)

# only the tests, which read back what these wrote, need them
.venv/.trackers: | setup
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt wandb trackio
	@touch $@

test-fast: setup
	$(pytest) -m "not slow"

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

quickstart: setup
	.venv/bin/python examples/quickstart/quickstart.py

# SPECFORGE_SGLANG_PYTHON names the interpreter of an environment that has SGLang
demo-disaggregated: setup
	.venv/bin/python examples/disaggregated/demo.py

clean:
	rm -rf .venv outputs .mypy_cache .ruff_cache .pytest_cache
