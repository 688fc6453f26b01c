# Two commands for a fresh machine: `make quickstart` and `make test`. `make help` lists all targets.
PYTHON ?= python3.11
BIN    := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --durations=20
SPREAD := -n 2 --dist loadscope --no-loadscope-reorder -m 'not slow'

.PHONY: help setup s3-server sdk-clients azure-server chromium postgresql redis test-setup quickstart lint types check test \
	test-slow docs licenses constraints clean

help: ## list all targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

setup: .venv/.ready ## create .venv with the versions pinned in constraints.txt

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --progress-bar off -c constraints.txt torch
	$(BIN)/pip install --quiet --progress-bar off -c constraints.txt -e '.[dev]'
	@touch $@

s3-server: .venv-s3/.ready ## create .venv-s3 with the S3 server that the tests start

.venv-s3/.ready: tests/s3/constraints.txt
	$(PYTHON) -m venv .venv-s3
	.venv-s3/bin/pip install --quiet --progress-bar off -c tests/s3/constraints.txt swift
	@touch $@

sdk-clients: .venv-clients/.ready ## create .venv-clients with the clients of other services that the tests run

.venv-clients/.ready: tests/clients/constraints.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install --quiet --progress-bar off -c tests/clients/constraints.txt openai litellm
	@touch $@

azure-server: .azurite/.ready ## create .azurite with the Azure server of a slow test (360 MB from npm), if there is npm

.azurite/.ready:
	@! command -v npm >/dev/null || npm install --prefix .azurite --omit=dev --no-audit --no-fund --loglevel=error azurite@3.37.0
	@mkdir -p .azurite && touch $@

.venv/torch_extensions/.ready: .venv/.ready # the operator that DeepSpeed would compile at its first use
	-DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(CURDIR)/.venv/torch_extensions \
		$(BIN)/python -c "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()" >/dev/null
	@touch $@

chromium: ## install Debian's Chromium for the tests of the web page, unless it is there
	@test -x /usr/bin/chromium || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null

postgresql: ## install Debian's PostgreSQL server for the tests of the endpoint's database, unless it is there
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || { apt-get update -qq && apt-get install -y -qq --no-install-recommends postgresql; } >/dev/null

redis: ## install Debian's Redis server for the slow test of a head that dies, unless it is there
	@test -x /usr/bin/redis-server || { apt-get update -qq && apt-get install -y -qq --no-install-recommends redis-server; } >/dev/null

quickstart: setup ## data -> AR-VAE -> latents -> AR-DiT -> videos -> scores -> report.html
	$(BIN)/ardiff quickstart $(ARGS)

lint: setup ## ruff, and the layers of pyproject.toml (import-linter)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo

types: setup ## mypy
	$(BIN)/mypy

test-setup: setup s3-server sdk-clients chromium postgresql .venv/torch_extensions/.ready

check: lint types s3-server ## lint, types and unit tests: run it before each commit
	$(PYTEST) $(SPREAD) tests/unit $(ARGS)

test: lint types test-setup ## lint, types and all tests that are not slow: what CI runs
	$(PYTEST) $(SPREAD) $(ARGS)

test-slow: test-setup azure-server ## the slow tests: run them before a release
	$(PYTEST) -m slow $(ARGS)

docs: setup ## build the site of docs/ to build/site, and fail on broken links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

licenses: setup ## print the license of every installed package
	@$(BIN)/python .ci/licenses.py

constraints: ## write constraints.txt from the packages in .venv
	@{ head -1 constraints.txt; $(BIN)/pip freeze --exclude-editable | grep -v -e '^ardiff' -e '^pip==' -e '^setuptools==' | sed 's/+cpu//'; } > constraints.tmp && mv constraints.tmp constraints.txt

clean: ## remove results, builds and caches, but not .venv
	rm -rf runs build *.egg-info .mypy_cache .ruff_cache
