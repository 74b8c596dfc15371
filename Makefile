PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SOAK_RUNS ?= 1000

.DEFAULT_GOAL := help
.PHONY: help install up demo down test coverage test-faults test-compose test-next-airflow images lint lock audit bench bench-accuracy

help: ## Show these targets
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.project-installed ## Make .venv and install everything into it; again only when the lock has changed

up: $(VENV)/.demo-installed ## Start the local stack: SeaweedFS, MLflow, Airflow
	$(BIN)/mlpipe up

demo: up ## Start the stack, train three models on real digits, compare them
	$(BIN)/mlpipe run --recipe quick

down: ## Stop the local stack; its data stays
	$(BIN)/mlpipe down

test: lint ## Run the linter, the type checker and the tests, some of them on the real stack
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not integration and not faults and not compose"
	$(BIN)/python -m pytest -n 2 --dist loadfile -m integration

test-faults: install ## Kill components and tasks during DAG runs; rewrite docs/reliability.md
	MLPIPE_RELIABILITY_TABLE=docs/reliability.md $(BIN)/python -m pytest -m faults tests/faults

test-compose: install ## Build the images, start docker-compose.yml, run the demo on it and take it down; needs Docker
	$(BIN)/python -m pytest -m compose -o log_cli=true -o log_cli_level=INFO tests/compose

test-next-airflow: install ## Run the executor's tests on Airflow's newest release, betas included
	$(BIN)/python -m pip install --quiet --pre --upgrade --no-deps --target .next-airflow \
		apache-airflow-core apache-airflow-task-sdk
	NEXT_AIRFLOW=$(CURDIR)/.next-airflow $(BIN)/python -m pytest tests/unit/plugins/test_gpu_executor.py

.env: ## Write the settings of docker-compose.yml with generated secrets, once
	$(PYTHON) docker/generate_env.py $@

images: .env ## Build the images of docker-compose.yml, marked with the commit that they are made of; needs Docker
	chmod -R a+rX docker/postgres  # which PostgreSQL's own user reads
	compose='docker compose'; $$compose version >/dev/null 2>&1 || compose=docker-compose; \
		GIT_SHA=$$(git describe --always --abbrev=40 --dirty --exclude='*') $$compose build

coverage: install ## Print what of mlpipe the unit tests reach
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not integration and not faults and not compose" \
		--cov=mlpipe --cov-report=term:skip-covered

lint: install ## Run the linter, the type checker and the contracts on imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

lock: ## Regenerate requirements.lock from pyproject.toml; keep pinned versions where possible
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes \
		--no-header --quiet -o requirements.lock

audit: install ## Write the bill of materials sbom.cdx.json; ask PyPI for known vulnerabilities of what the lock names
	$(BIN)/uv tool run --from cyclonedx-bom==7.5.0 cyclonedx-py requirements requirements.lock --output-file sbom.cdx.json
	$(BIN)/uv tool run pip-audit==2.10.1 --strict --disable-pip --require-hashes --requirement requirements.lock

bench: install ## Measure speed into benchmarks/RESULTS.md, hours: make bench DATA=cifar10-images.zip
	@test -f "$(DATA)" || { echo 'name the images: make bench DATA=cifar10-images.zip' >&2; exit 1; }
	echo '# Measurements of speed' > benchmarks/RESULTS.md.partial
	set -e; for each in 'training.py "$(DATA)"' convolutions.py 'time_to_accuracy.py "$(DATA)"' 'logistic.py "$(DATA)"' \
		'preprocess.py "$(DATA)"' 'zip_reader.py "$(DATA)"' 'predict.py "$(DATA)"' larger_than_memory.py \
		'frontier.py "$(DATA)"' 'first_minute.py $(BEFORE) HEAD --warm' dag.py 'soak.py --runs $(SOAK_RUNS)'; do \
		eval "$(BIN)/python benchmarks/$$each" > benchmarks/section.partial; \
		{ echo; sed 's/^#/##/' benchmarks/section.partial; } >> benchmarks/RESULTS.md.partial; \
	done
	rm benchmarks/section.partial
	mv benchmarks/RESULTS.md.partial benchmarks/RESULTS.md

bench-accuracy: install ## Print tables like those of benchmarks/ACCURACY.md, hours: strong with three seeds and without each part
	@test -f "$(DATA)" || { echo 'name the images: make bench-accuracy DATA=cifar10-png.zip' >&2; exit 1; }
	$(BIN)/python benchmarks/accuracy.py "$(DATA)" --ablation-epochs 3
	$(BIN)/python benchmarks/accuracy.py "$(DATA)" --model resnet18 --seeds 0 --ablation-seeds 1 --ablation-epochs 2

$(VENV)/.demo-installed: requirements.lock pyproject.toml scripts/install.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
		echo 'Python 3.11 was not found as "$(PYTHON)"; install it, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python scripts/install.py $(VENV) training airflow local-stack
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-compile --editable .
	@touch $@

$(VENV)/.project-installed: $(VENV)/.demo-installed
	$(BIN)/python scripts/install.py $(VENV) all
	@touch $@
