# Everything happens in .venv, which is made when it is first needed and again when pyproject.toml or constraints.txt change.
# Another Python than `python3`: make PYTHON=python3.12 demo

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.PHONY: help install demo test test-slow test-gpu check format lint types layers build wheel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

install: .venv/core ## .venv with dl7 in it

demo: .venv/core ## train, evaluate and use both models on the built-in data: a few minutes on two cores
	$(BIN)/dl7 train resnet --data builtin:shapes
	$(BIN)/dl7 eval --split test
	$(BIN)/dl7 train seq2seq --data builtin:phrases
	$(BIN)/dl7 eval --split test
	$(BIN)/dl7 translate --beam 5 "She hears that she repairs three cars." \
	  "Two days ago these tall men wanted to draw birds." "We do not lay her hat beside the sofa."
	$(BIN)/dl7 runs list
	@printf '%s\n' '' \
	  'Each run above is a folder with its recipe, scores and checkpoints. What to type next:' \
	  '  $(BIN)/dl7 translate               asks for sentences to translate' \
	  '  $(BIN)/dl7 train resnet            trains on CIFAR-10, downloaded where it is not on disk' \
	  '  $(BIN)/dl7 train seq2seq           trains on Multi30k, English to German' \
	  '  $(BIN)/dl7 recipes show resnet     every key that --set can change' \
	  '  $(BIN)/dl7 --help                  all commands'

# No GPU is taken by itself: what these compare is computed on the processor.
test: .venv/dev ## the tests
	CUDA_VISIBLE_DEVICES= $(BIN)/pytest

test-slow: .venv/dev ## the tests that take minutes
	CUDA_VISIBLE_DEVICES= $(BIN)/pytest -m slow

test-gpu: .venv/dev ## the tests that need a CUDA GPU
	$(BIN)/pytest -m gpu

check: lint types layers wheel ## all but the tests: style, types, layers, and the wheel outside the checkout

format: .venv/dev ## rewrite the code in the style that lint asks for
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lint: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/dev
	$(BIN)/mypy

layers: .venv/dev
	$(BIN)/lint-imports

build: .venv/dev ## source archive, and from it the wheel, in dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation

# The wheel goes alone into a new environment far from the checkout. A .pth file lends it the dependencies of .venv;
# Python does not follow .pth files it meets that way, so the editable dl7 of .venv stays out of sight.
SITE := import sysconfig; print(sysconfig.get_path("purelib"))
FROM_WHEEL := import sys, dl7cli; print(dl7cli.__file__); sys.exit(not dl7cli.__file__.startswith(sys.prefix))
wheel: build ## install the wheel outside the checkout and run it there
	@set -eu; outside=$$(mktemp -d); trap 'rm -rf "$$outside"' EXIT; \
	$(BIN)/python -m venv --without-pip "$$outside"; \
	$(BIN)/python -c '$(SITE)' > "$$("$$outside/bin/python" -c '$(SITE)')/dependencies.pth"; \
	$(BIN)/python -m pip --disable-pip-version-check --python "$$outside" install --quiet --no-deps dist/*.whl; \
	cd "$$outside"; bin/python -c '$(FROM_WHEEL)'; bin/dl7 recipes list

clean: ## remove .venv and all that was built; runs/ stays
	rm -rf .venv dist build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

.venv/core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: dl7 needs Python 3.11 or later, and `$(PYTHON)` is " + sys.version.split()[0] + "\n\nhint: name another, as in `make PYTHON=python3.12 demo`")'
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable .
	@touch $@

.venv/dev: .venv/core
	$(INSTALL) --editable '.[dev]'
	@touch $@
