# The one way in: every target installs what it needs first, behind stamp files.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

UV_VERSION := 0.13.9
GCS_SERVER_VERSION := v1.52.2
PYTHON := .venv/bin/python
UV := .tools/uv/bin/uv
CONFIG ?= deploy/env/local.toml
ONLY ?=
SEED ?= 0
ROUNDS ?= 50
SCRIPTS := .ci/run $(wildcard deploy/*/*.sh)
# Two processes with a Spark session each, a file of tests at a time: a driver that plans small queries keeps one core.
WORKERS ?= -n 2 --dist loadfile

# Horovod's isolated build reads the toolchain by absolute path, so it cannot stand in pyproject.toml.
export CMAKE_TOOLCHAIN_FILE := $(CURDIR)/deploy/build/toolchain.cmake
# `uv run` and a bare `uv sync` would empty the environment of its optional groups.
export UV_NO_SYNC := 1
export UV_PYTHON_DOWNLOADS := never
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHONPATH :=

.PHONY: help
help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: run
run: install ## the main job on real data, end to end; prints where the report is
	$(PYTHON) -m couponflow.cli run --config $(CONFIG)

.PHONY: demo
demo: install ## the same pipeline on a small synthetic shop (no download)
	$(PYTHON) -m couponflow.cli run --config deploy/env/demo.toml

.PHONY: demo-dataproc
demo-dataproc: install .stamps/gcs ## a day and a ten-day backfill, submitted to local servers in the place of Google's
	$(PYTHON) tests/demo_dataproc.py

.PHONY: test
test: install .stamps/gcs ## all tests that need no GPU and no cloud account
	$(PYTHON) -m pytest $(WORKERS)

.PHONY: test-unit test-spark test-e2e
test-unit: install ## unit tests only: no JVM
	$(PYTHON) -m pytest tests/unit
test-spark: install ## Spark tests only
	$(PYTHON) -m pytest tests/spark
test-e2e: install .stamps/gcs ## end-to-end tests only
	$(PYTHON) -m pytest tests/e2e

.PHONY: test-airflow
test-airflow: install .stamps/airflow ## the DAG of deploy/airflow in an Airflow of its own, against a stand-in of Dataproc
	PATH="$(CURDIR)/.tools/airflow/bin:$(PATH)" .tools/airflow/bin/python -m pytest -c deploy/airflow/pytest.ini \
	  --rootdir . --confcutdir tests/scheduler tests/scheduler

.PHONY: soak
soak: install ## 30 days backfilled in random order, killed twice, against one clean pass (SEED=n for another)
	COUPONFLOW_SOAK_SEED=$(SEED) $(PYTHON) -m pytest -q -s -m nightly tests/e2e/test_backfill.py -k test_soak

.PHONY: soak-faults
soak-faults: install .stamps/gcs ## ROUNDS faults drawn from SEED, each against an undisturbed run; prints what each has lost
	COUPONFLOW_SOAK_SEED=$(SEED) COUPONFLOW_SOAK_ROUNDS=$(ROUNDS) \
	  $(PYTHON) -m pytest -q -s -m nightly tests/e2e/test_soak.py

.PHONY: nightly
nightly: install .stamps/gcs ## hours: each point at which a run can be killed, 200 races on gs://, both soaks (SEED, ROUNDS)
	COUPONFLOW_SOAK_SEED=$(SEED) COUPONFLOW_SOAK_ROUNDS=$(ROUNDS) $(PYTHON) -m pytest -q -s -m nightly $(ONLY)

.PHONY: check
check: install ## ruff, mypy strict, the import rules; linters of workflows, YAML and shell scripts
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy lib jobs bench deploy/build deploy/image
	.venv/bin/yamllint --strict deploy .github .yamllint
	.venv/bin/actionlint
	.venv/bin/zizmor --offline --quiet .github/workflows
	.venv/bin/shellcheck $(SCRIPTS)
	.venv/bin/shfmt -i 2 -d $(SCRIPTS)
	$(PYTHON) -m pytest -q tests/unit/test_import_rules.py tests/unit/test_repository.py

.PHONY: fmt
fmt: install ## rewrite formatting
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

.PHONY: golden
golden: install ## rewrite the expected files in tests/golden; review them as a diff
	COUPONFLOW_GOLDEN=1 $(PYTHON) -m pytest -q tests/unit -k golden

.PHONY: picture
picture: install ## the picture of the README, from the report of make run; fails where that has a fault
	$(PYTHON) tests/page_audit.py var/lake/reports/campaign-18.html .github/report.png

.PHONY: bench
bench: install .stamps/gcs $(if $(ONLY),$(if $(filter peers dien_%,$(ONLY)),bench-peers),bench-peers) ## measure every speed claim (ONLY=file or claim), write bench/results.json
	$(PYTHON) -m bench.run $(ONLY)

.PHONY: quality
quality: install ## verdicts on data nobody tuned on (ONLY=experiment; after make run), write bench/quality.json
	$(PYTHON) -m bench.quality $(ONLY)

.PHONY: bench-peers
bench-peers: .stamps/peers ## the environment in which bench/peers.py runs public packages

.PHONY: wheel
wheel: install ## the package and the jobs as one wheel, in dist/
	$(UV) build --wheel --offline --no-build-isolation --out-dir dist 2>/dev/null || $(UV) build --wheel --out-dir dist

.PHONY: submit-env
submit-env: .stamps/uv ## what submitting needs, without JDK and compiler: .tools/submit/bin/couponflow
	@UV_PROJECT_ENVIRONMENT=.tools/submit $(UV) sync --frozen --no-default-groups --no-install-project --python 3.11
	@printf '#!/bin/sh\nPYTHONPATH="%s" exec "%s" -m couponflow.cli "$$@"\n' \
	  "$(CURDIR)/lib:$(CURDIR)" "$(CURDIR)/.tools/submit/bin/python" > .tools/submit/bin/couponflow
	@chmod +x .tools/submit/bin/couponflow

.PHONY: image-requirements
image-requirements: install ## what the Dataproc images are built from, off uv.lock, in dist/image/
	$(PYTHON) deploy/image/export_requirements.py dist/image

.PHONY: lock
lock: .stamps/uv ## refresh uv.lock
	$(UV) lock

.PHONY: clean
clean: ## remove results and caches; the environment stays
	rm -rf var dist .pytest_cache .ruff_cache .mypy_cache .hypothesis spark-warehouse
	find lib jobs tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: install
install: .stamps/env .stamps/jars ## uv, the locked environment with the Horovod build, jars of Delta and gs://

.stamps/prerequisites: deploy/build/prerequisites.sh
	@bash deploy/build/prerequisites.sh
	@mkdir -p .stamps && touch $@

.stamps/uv: Makefile
	@echo "==> uv $(UV_VERSION)"
	@python3.11 -m venv .tools/uv
	@.tools/uv/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@touch $@

.stamps/env: .stamps/prerequisites .stamps/uv pyproject.toml uv.lock $(wildcard deploy/build/*.cmake)
	@echo "==> environment from uv.lock (the first time: about 2 GB of downloads and a Horovod build of 2 to 8 minutes)"
	@$(UV) sync --offline --frozen --all-groups --python 3.11 2>/dev/null || $(UV) sync --frozen --all-groups --python 3.11
	@touch $@

.stamps/jars: .stamps/env deploy/build/fetch_jars.py
	@echo "==> jars of Delta and of the gs:// connector"
	@$(PYTHON) deploy/build/fetch_jars.py .cache/ivy
	@touch $@

# Their pins contradict one another and ours: each line of the file overrides what the packages ask for.
.stamps/peers: .stamps/uv bench/peers.txt
	@echo "==> environment of the peers (about 1.5 GB beside torch, which comes from the cache of uv)"
	@python3.11 -m venv --without-pip --clear .tools/peers
	@$(UV) pip install --quiet --python .tools/peers/bin/python -r bench/peers.txt --override bench/peers.txt
	@touch $@

.stamps/airflow: .stamps/uv deploy/airflow/requirements.txt
	@echo "==> environment of Airflow (about 1.4 GB)"
	@python3.11 -m venv --without-pip --clear .tools/airflow
	@$(UV) pip install --quiet --python .tools/airflow/bin/python -r deploy/airflow/requirements.txt
	@touch $@

.stamps/gcs:
	@mkdir -p .stamps
	@if command -v go >/dev/null; then \
	  echo "==> local object server for the gs:// tests (built once, about a minute)"; \
	  GOBIN=$(CURDIR)/.tools/bin go install github.com/fsouza/fake-gcs-server@$(GCS_SERVER_VERSION) && touch $@; \
	else echo "==> Go is not installed: the gs:// tests will be skipped (Debian: apt-get install golang)"; fi
