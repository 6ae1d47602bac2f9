# `make demo`, `make check` and `make test`: each sets up all that it needs on a bare machine with Python 3.11 or newer.
# `make paper` tries the paper's claims, in minutes; BUDGET=cpu and BUDGET=gpu take longer (docs/paper.md).
PYTHON ?= python3
VENV ?= .venv
BUDGET ?= smoke
BIN := $(VENV)/bin

# Bytecode is kept whatever the caller's shell says: each process would compile all tests and sources again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo check test docs paper lint install clean

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "normrewrite needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,rtx]'
	@touch $@

install: $(VENV)/installed

demo: install
	@sh examples/demo.sh $(BIN)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Under a minute: style, types, and quick tests of every room.
check: lint
	$(BIN)/pytest -q @tests/smoke.txt

# Files side by side, those with slow tests first.
test: lint
	$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# The pages, to be opened as site/index.html; served (python -m http.server -d site) they can be searched, too.
# A warning is an error; the variable keeps the theme from advertising.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

paper: install
	$(BIN)/python -m benchmarks.norm_matters --budget $(BUDGET)

clean:
	rm -rf $(VENV) demo site build dist *.egg-info
