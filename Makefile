# Two commands for a fresh machine: `make quickstart` and `make test`. `make help` lists the rest.
PYTHON ?= python3.11
BIN    := .venv/bin

.PHONY: help setup s3-server chromium quickstart test test-slow lint constraints clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

setup: .venv/.ready ## make .venv with the pinned versions of constraints.txt

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --progress-bar off -c constraints.txt torch
	$(BIN)/pip install --quiet --progress-bar off -c constraints.txt -e '.[dev,deepspeed]'
	@touch $@

s3-server: .venv-s3/.ready ## make .venv-s3 with the S3 server that the tests start

.venv-s3/.ready: tests/s3/constraints.txt
	$(PYTHON) -m venv .venv-s3
	.venv-s3/bin/pip install --quiet --progress-bar off -c tests/s3/constraints.txt swift
	@touch $@

.venv/torch_extensions/.ready: .venv/.ready # DeepSpeed's operator, which it would compile at its first use
	-DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(CURDIR)/.venv/torch_extensions \
		$(BIN)/python -c "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()" >/dev/null
	@touch $@

chromium: ## install Debian's Chromium, which the tests of the page drive, where there is none
	@test -x /usr/bin/chromium || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null

quickstart: setup ## data -> AR-VAE -> latents -> AR-DiT -> videos -> scores -> report.html (about 9 minutes)
	$(BIN)/ardiff quickstart $(ARGS)

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: export OMP_NUM_THREADS = 1
test: lint s3-server chromium .venv/torch_extensions/.ready ## lint, then every test that is not marked slow
	$(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder -m 'not slow' $(ARGS)

test-slow: export OMP_NUM_THREADS = 1
test-slow: setup s3-server chromium .venv/torch_extensions/.ready ## the proofs that take minutes
	$(BIN)/pytest -m slow $(ARGS)

constraints: ## write constraints.txt from what .venv holds
	@{ head -1 constraints.txt; $(BIN)/pip freeze --exclude-editable | grep -v -e '^ardiff' -e '^pip==' -e '^setuptools==' | sed 's/+cpu//'; } > constraints.tmp && mv constraints.tmp constraints.txt

clean: ## remove what the commands made, not .venv
	rm -rf runs build *.egg-info .mypy_cache .ruff_cache
