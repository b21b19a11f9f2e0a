# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= runs/demo
BENCHMARKS := sinusoid fertility multilevel radon challenging_sinusoid deep_kernel_sines sine_or_line neural_processes memorization speed_meta_step speed_svi distributed import_time pacoh calibration active ood sbc scaling env_throughput bandits tabular_mdps beam_steering navigation grid pearl_speed sparse_point_robot rl_beliefs
# pip's own notices would drown what the person wants to see
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

.PHONY: venv demo test test-slow bench lint docs clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || (echo "creating $(VENV) (about two minutes, 1.7 GB, once)"; $(PYTHON) -m venv $(VENV))
	@$(PIP) install "pip>=25.1"
	@echo "installing bayesmeta and its tools from pyproject.toml"
	@$(PIP) install -c constraints.txt -e . --group dev
	@touch $@

demo: venv
	@$(BIN)/bayesmeta demo --out $(OUT) --overwrite

test: venv
	@$(BIN)/python -m pytest -n 2

test-slow: venv
	@$(BIN)/python -m pytest -m slow

bench: venv
	@status=0; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name $(ARGS) --json runs/bench/$$name.json || status=1; done; exit $$status

lint: venv
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

docs: venv
	@$(PIP) install -c constraints.txt -e ".[docs]"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict && echo "docs: site/index.html"

clean:
	rm -rf $(VENV) runs site dist build
