# make demo   the built-in model: export, verify, draw, measure; leaves demo-output/picture.png and report.html
# make test   lint and the whole default test suite
# make test-web  the web app in Chromium and Firefox, with bundles made for it: needs those two browsers
# make test-arm64  the runtime on ARM64 Linux under emulation: fetches qemu and an ARM64 Python, 110 MB, without root
# make lint   ruff, mypy and tsc alone
# make web    the TypeScript runtime and the web app, in runtime/web/dist: needs Node 20 or later, and npm
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
WEB := runtime/web
WEB_SOURCES := $(wildcard $(WEB)/*.json $(WEB)/*.mjs) $(shell find $(WEB)/src $(WEB)/demo -type f)

.PHONY: demo test test-arm64 test-web lint links web clean

demo: $(STAMP)
	$(BIN)/fewstep demo models/emoji-64 -o $(DEMO)

# one process a core, each of one thread; a file's tests stay together, and so do what they share
test: lint web
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile

test-arm64: $(STAMP)
	$(BIN)/python tests/runtime/arm64.py
	$(BIN)/python -m pytest -q -m arm64

lint: $(STAMP) links $(WEB)/node_modules/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p fewstep
	cd $(WEB) && npm run -s lint

# type checkers follow these; setup.py is the real mapping
links:
	@for layer in $(LAYERS); do ln -sfn ../../$$layer src/fewstep/$$layer; done

# torch first, so that the CPU build named above is what the other packages find
$(STAMP): pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

web: $(WEB)/dist/.built

# no package's own scripts are run
$(WEB)/node_modules/.installed: $(WEB)/package-lock.json
	@command -v npm >/dev/null || { echo "make web needs Node 20 or later and npm: https://nodejs.org" >&2; exit 1; }
	cd $(WEB) && npm ci --ignore-scripts --no-audit --no-fund
	touch $@

$(WEB)/dist/.built: $(WEB)/node_modules/.installed $(WEB_SOURCES)
	cd $(WEB) && npm run -s build
	touch $@

test-web: web $(STAMP)
	node $(WEB)/e2e/run.mjs

clean:
	rm -rf $(VENV) $(DEMO) $(WEB)/node_modules $(WEB)/dist build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	rm -f $(addprefix src/fewstep/,$(LAYERS))
