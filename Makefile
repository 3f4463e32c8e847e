# Everything from a bare clone: `make demo` runs the main job on a real model, `make test` runs the tests.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow check bench clean

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "bitassay needs Python 3.11 or newer; try: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 3; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.ready  ## quantize, evaluate and verify SmolLM2-135M; prints the table, writes runs/demo/report.html
	$(BIN)/bitassay assay smollm2-135m --recipe w8 --recipe fp8 --recipe w4 --recipe w2 \
	  --windows 6 --window 512 --repeats 1 --new-tokens 16 \
	  --prompts 6 --calibration-prompts 175 --out runs/demo

test: $(VENV)/.dev  ## every behaviour once, also on the real model (fetched once, 98 MB)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --maxprocesses 4 --dist loadfile -m "not gpu and not ray and not slow"

test-slow: $(VENV)/.dev  ## what repeats it: every architecture, kill matrices, repeats on real models, notebooks
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --maxprocesses 4 -m "slow and not gpu and not ray"

check: $(VENV)/.dev  ## linters, types, import rules, docstrings and the API reference made from them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python docs/reference.py --check

# Those that want arguments: files, other tools' programs, whole data sets.
ON_THEIR_OWN := endpoints engine_exp2 engine_traces engines gguf_reading gptq k_types large llamacpp llamacpp_quality \
  llamacpp_types padded quality server_tables servers spot tasks vllm_folders

bench: $(VENV)/.dev  ## side-by-side comparisons (minutes) that run without arguments
	for f in $(filter-out $(ON_THEIR_OWN:%=benchmarks/%.py), $(wildcard benchmarks/*.py)); do $(BIN)/python $$f || exit 1; done

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
