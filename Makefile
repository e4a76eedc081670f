# make demo   the built-in model: export, verify, draw, measure; leaves demo-output/picture.png and report.html
# make test   lint and the whole default test suite
# make lint   ruff and mypy alone
# make clean  remove what these made; the virtual environment too
#
# The first run creates .venv and installs into it; no sudo. Where a plain `pip install torch` would fetch
# CUDA's gigabytes, ask for the CPU build:
#     make test TORCH='torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu'

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LAYERS := $(shell sed -n 's/^layers = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
DEMO ?= demo-output

.PHONY: demo test lint links clean

demo: $(STAMP)
	$(BIN)/fewstep demo models/emoji-64 -o $(DEMO)

test: lint
	$(BIN)/python -m pytest -q

lint: $(STAMP) links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p fewstep

# type checkers follow these; setup.py is the real mapping
links:
	@for layer in $(LAYERS); do ln -sfn ../../$$layer src/fewstep/$$layer; done

# torch first, so that the CPU build named above is what the other packages find
$(STAMP): pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	rm -f $(addprefix src/fewstep/,$(LAYERS))
