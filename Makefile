# Two commands: `make demo` and `make test`. Each sets up all that it needs on a bare machine with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint install clean

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

# Fast tests first, side by side; then the few heavy ones.
test: install lint
	$(BIN)/pytest -q -n 2 -m 'not slow'
	$(BIN)/pytest -q -n 2 -m slow

clean:
	rm -rf $(VENV) demo build dist *.egg-info
