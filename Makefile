# Everything a newcomer needs: make demo, make test, make check. Each makes .venv first if need be.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread a process: workers and tests are processes already.
export OMP_NUM_THREADS := 1
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

.PHONY: help demo test check bench mutants format clean
help:
	@echo "make demo   four simulated hospitals train one classifier; report in runs/demo"
	@echo "make test   every test"
	@echo "make check  lint, types, architecture"
	@echo "make bench  what a private step costs, into docs/performance.md (minutes; idle machine)"
	@echo "make mutants what tests of the code that guards privacy notice (up to an hour; docs/mutants.md)"
	@echo "make format write the house style"

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

demo: $(VENV)/.installed
	rm -rf runs/demo
	$(BIN)/fedward-sim run --task nodule-classification --sites 4 --rounds 20 --epsilon 8 --seed 7 \
		--baselines --out runs/demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: $(VENV)/.installed
	mkdir -p runs
	$(BIN)/fedward-sim bench --json runs/bench.json --into docs/performance.md

mutants: $(VENV)/.installed
	$(BIN)/mutmut run --max-children 1 client.guard.x_release__mutmut_1  # makes all mutants and tries this one
	$(BIN)/python tests/mutants.py

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs mutants .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
