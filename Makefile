# make demo    eight adapters, two emulated engines, clients that know names only
# make test    format, lint, types, import contract, tests, by two processes a core (WORKERS=n)
# make check   what was edited, in half a minute: lint, types and the nearest tests; SINCE=main for a branch
# make test-slow  the tests that it leaves out: more worlds, whole pools of processes, large bodies; 12 minutes
# make bench-tests  the tests of make test, and what each file costs in CPU seconds; TESTS=tests/unit CHOSEN='-m slow'
# make e2e-triton  the tests that need a real Triton server, which .venv-triton holds; no GPU
# make triton  that server with the emulated engine as its model, on the usual ports; GRPC_PORT=18001 HTTP_PORT=… METRICS_PORT=…
# make bench-triton  what the sidecar does and costs in front of it
# make e2e-vllm  the tests that need a real vLLM, 0.33 over what .venv-vllm holds; no GPU; about 15 minutes
# make e2e-sglang  the tests that need a real SGLang, 0.5.23 over what .venv-vllm holds; no GPU; about 3 minutes
# make e2e-envoy  the tests that need a real Envoy, which .venv-envoy holds; 2 minutes
# make bench-envoy  what the lane costs in which Envoy carries the bytes, beside the one in path and Envoy alone
# make e2e-tools  load tools and client libraries that users bring, unmodified, before emulated engines; 6 minutes and 4.5 GB
# make e2e-tools-short  the OpenAI SDK and schemathesis alone
# make e2e-kubernetes  the tests that know a cluster, before a real API server that .venv-kubernetes holds; 3 minutes
# make e2e-attack  attacks that take whole processes: bursts, resets, half messages, requests of death; 1 minute
# make e2e-replicas  three replicas restarted under load, and Redis away; about 3 minutes
# make vllm    a toy vLLM on its usual port, until Ctrl-C; HTTP_PORT=18000
# make sglang  a toy SGLang likewise
# make e2e-release  a release is built, bundled, and installed without a network; 3 minutes
# make ci      what each change must pass: lint, tests, and the core of every lane; at most 25 minutes on an idle machine
# make nightly all lanes whole, soak, chaos, fuzz and fault worlds; about 90 minutes
# make weekly  tests with the newest versions of all dependencies, with other Pythons, and before vLLM 0.32 and the newest
# make release VERSION=… IMAGES=…  the artefacts of what is checked out, in dist/VERSION; docs/releasing.md
# make bundle  the same, and all that a site without internet needs; EXTRAS="s3 hf"
# make helm-test  the chart by Helm 3 and 4, validators and linters, which .venv-helm holds, and promtool; 5 minutes
# make bench   the figures of docs/figures.md, side by side in one run
# make bench-scheduling  what order, placement and admission gain over bare engines, in virtual time; about 20 minutes
# make goldens the golden adapters made anew with the real PEFT library, in an environment of its own, and compared
# make sim-faults  1,000 simulated worlds in which things go wrong; SEED=n runs one alone, FLAVOUR=trtllm_pytorch all on such engines
# make chaos   replicas, Redis and engines as processes that are killed, stopped and cut off under load; ONLY=name for one,
#              LANE=envoy for clients that ask an Envoy in front of the replicas
# make soak    3 replicas and 4 engines that everything happens to at once, 10 minutes; MINUTES=60 for an hour
# make record  a trtllm-serve of yours and the emulated one are asked the same, and what differs is printed; URL=… ADAPTER=…
# make fuzz    100,000 damaged adapters, and 10,000 for each engine that ends by them
# make fuzz-wire  a million odd messages to every front, against what the engine was asked; MESSAGES=n, SEED=n
# make docs    the site of docs/ in build/docs; fails on a dead link, an unknown command or option, a page that is out of date
# make docs-commands  every command block of README and docs, run in order; 5 minutes
# make pictures  the pictures of README and docs, drawn anew
# make .venv-docs  just the environment that builds the site
# make .venv-triton  just the environment with the real Triton server, with Python 3.11 or 3.12
# make .venv-vllm  just the environment with the real vLLM; 2.5 GB
# make .venv-envoy  just the environment with the real Envoy; 80 MB
# make .venv-helm  just the environment with Helm, kubectl and what checks their output
# make .venv-kubernetes  just the API server and its etcd, built from Debian's packages; 4 to 15 minutes, once
# make .venv-tools/NAME  just one environment of tools: short, apps, load, guidellm, inference-perf
# make .venv   just the environment; the command line is then .venv/bin/sidecar

PYTHON ?= python3
# Tests wait more than they compute: two or three processes a core, on small machines.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 4); echo $$((n < 4 ? 3 * n : n < 8 ? 2 * n : n)))
# Tests start some hundred interpreters, and each of them would compile the product anew.
PYTEST = PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest
SPREAD := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
MINUTES ?= 10
# The ports of make triton; make vllm takes the second.
GRPC_PORT ?= 8001
HTTP_PORT ?= 8000
METRICS_PORT ?= 8002
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
INSTALLED := .venv/installed
DEVELOPING := .venv/developing
RELEASING := .venv/releasing
TOOLS := short apps load guidellm inference-perf
LANES := helm-test e2e-replicas e2e-envoy e2e-triton e2e-vllm e2e-sglang

COMPILE := pip compile pyproject.toml --universal --generate-hashes --python-version 3.11 --no-header --no-annotate --quiet $(UPGRADE)

.PHONY: record docs docs-commands pictures .venv-docs ci nightly lanes weekly release bundle e2e-release demo test test-slow check bench-tests e2e-triton triton .venv-triton e2e-vllm e2e-sglang vllm sglang .venv-vllm e2e-tools e2e-tools-short e2e-replicas e2e-envoy bench-envoy .venv-envoy e2e-attack helm-test .venv-helm e2e-kubernetes .venv-kubernetes lint lint-quickly bench bench-triton bench-scheduling goldens fuzz fuzz-wire sim-faults chaos chaos-envoy soak proto lock clean .venv

.venv: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv .venv || { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	$(PIP) --require-hashes -r requirements.lock
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(DEVELOPING): requirements-dev.lock $(INSTALLED)
	$(PIP) --require-hashes -r requirements-dev.lock
	@touch $@

$(RELEASING): requirements-release.lock $(DEVELOPING)
	$(PIP) --require-hashes -r requirements-release.lock
	@touch $@

demo: $(INSTALLED)
	$(BIN)/sidecar demo

lint: lint-quickly
	$(BIN)/mypy

lint-quickly: $(DEVELOPING)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

# Types are checked beside the tests, and told after them: without its cache mypy takes half a minute.
test: lint-quickly
	@told=$$(mktemp); trap 'rm -f "$$told"' EXIT; $(BIN)/mypy >"$$told" 2>&1 & types=$$!; \
	$(PYTEST) -m "not slow" $(SPREAD); tests=$$?; \
	wait $$types; types=$$?; echo $(BIN)/mypy; cat "$$told"; exit $$((tests ? tests : types))

test-slow: $(DEVELOPING)
	$(PYTEST) -m slow $(SPREAD)

check: $(DEVELOPING)
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m tools.check $(if $(SINCE),--since $(SINCE))

bench-tests: $(DEVELOPING)
	$(PYTEST) -p tools.test_times $(SPREAD) $(or $(CHOSEN),-m "not slow") $(TESTS)

e2e-triton: $(DEVELOPING) .venv-triton $(if $(ENVOY_VENV),,.venv-envoy)
	$(BIN)/pytest tests/e2e/triton $(CHOSEN)

triton: $(DEVELOPING) .venv-triton
	$(BIN)/python -m tests.e2e.triton --grpc-port $(GRPC_PORT) --http-port $(HTTP_PORT) --metrics-port $(METRICS_PORT)

bench-triton: $(DEVELOPING) .venv-triton
	$(BIN)/python -m tests.bench.triton

.venv-triton: .venv-triton/installed

.venv-triton/installed: tests/e2e/triton/requirements.txt
	@for python in $(PYTHON) python3.11 python3.12; do \
	  $$python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && break; \
	done && $$python -m venv --clear .venv-triton || \
	  { echo "Triton's Python backend needs Python 3.11 or 3.12, and here is neither: name one with make PYTHON=…"; exit 1; }
	@echo "installing Triton into .venv-triton, once: 350 MB"
	.venv-triton/bin/python -m pip install --disable-pip-version-check --no-deps -r $<
	@touch $@

e2e-envoy: $(DEVELOPING) $(if $(ENVOY_VENV),,.venv-envoy)
	$(BIN)/pytest tests/e2e/envoy -n 3 --dist loadfile $(CHOSEN)

bench-envoy: $(DEVELOPING) $(if $(ENVOY_VENV),,.venv-envoy)
	$(BIN)/python -m tests.bench.envoy

.venv-envoy: .venv-envoy/installed

.venv-envoy/installed: tests/e2e/envoy/requirements.txt
	$(PYTHON) -m venv --clear .venv-envoy
	.venv-envoy/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

e2e-vllm: $(DEVELOPING) $(if $(VLLM_VENV),,.venv-vllm) $(if $(ENVOY_VENV),,.venv-envoy)
	$(BIN)/python -m tests.e2e.vllm.newer
	$(BIN)/pytest -rs tests/e2e/vllm $(CHOSEN)

e2e-sglang: $(DEVELOPING) $(if $(VLLM_VENV),,.venv-vllm)
	$(BIN)/python -m tests.e2e.sglang.install
	$(BIN)/pytest -rs tests/e2e/sglang $(CHOSEN)

sglang: $(DEVELOPING) $(if $(VLLM_VENV),,.venv-vllm)
	$(BIN)/python -m tests.e2e.sglang.install
	$(BIN)/python -m tests.e2e.sglang --http-port $(if $(filter-out 8000,$(HTTP_PORT)),$(HTTP_PORT),30000)

vllm: $(DEVELOPING) $(if $(VLLM_VENV),,.venv-vllm)
	$(BIN)/python -m tests.e2e.vllm.newer
	$(BIN)/python -m tests.e2e.vllm --http-port $(HTTP_PORT)

.venv-vllm: .venv-vllm/installed

.venv-vllm/installed: tests/e2e/vllm/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
	  { echo "vLLM's environment is pinned for Python 3.11 and 3.12; name one with make PYTHON=python3.11 …"; exit 1; }
	$(PYTHON) -m venv --clear .venv-vllm
	@echo "installing vLLM into .venv-vllm, once: 2.5 GB"
	tests/e2e/vllm/install.sh .venv-vllm

e2e-tools: $(DEVELOPING) $(TOOLS:%=.venv-tools/%/installed)
	$(BIN)/pytest -rs tests/e2e/tools $(CHOSEN)

e2e-tools-short: $(DEVELOPING) .venv-tools/short/installed
	$(BIN)/pytest -rs tests/e2e/tools/test_openai_sdk.py tests/e2e/tools/test_schemathesis.py

$(TOOLS:%=.venv-tools/%): .venv-tools/%: .venv-tools/%/installed

.venv-tools/%/installed: tests/e2e/tools/requirements/%.txt tests/e2e/tools/install.sh
	tests/e2e/tools/install.sh .venv-tools/$* $(PYTHON) python3.11 python3.12 python3.13 python3.14

helm-test: $(DEVELOPING) .venv-helm
	$(BIN)/pytest -rs tests/e2e/helm $(CHOSEN)

.venv-helm: .venv-helm/installed

.venv-helm/installed: tests/e2e/helm/requirements.txt tests/e2e/helm/install.py
	@for python in $(PYTHON) python3.11; do \
	  $$python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && break; \
	done && $$python -m venv --clear .venv-helm || \
	  { echo "the chart's tools are pinned for Python 3.11, and it is not here: name it with make PYTHON=…"; exit 1; }
	.venv-helm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	.venv-helm/bin/python tests/e2e/helm/install.py
	@touch $@

e2e-kubernetes: $(DEVELOPING) $(if $(HELM_VENV),,.venv-helm) $(if $(KUBERNETES_VENV),,.venv-kubernetes)
	CI=1 $(BIN)/python -m tests.e2e.kubernetes $(CHOSEN)

.venv-kubernetes: .venv-kubernetes/installed

.venv-kubernetes/installed: tests/e2e/kubernetes/install.sh tests/e2e/kubernetes/go-1.19.patch
	tests/e2e/kubernetes/install.sh .venv-kubernetes

bench: $(DEVELOPING)
	$(BIN)/python -m tests.bench

bench-scheduling: $(DEVELOPING)
	$(BIN)/python -m tests.bench.scheduling

goldens:
	PYTHON=$(PYTHON) tests/golden/peft/remake.sh

record: $(INSTALLED)
	$(BIN)/python -m tools.record $(URL) $(if $(ADAPTER),--adapter $(ADAPTER)) $(if $(MODEL_CONFIG),--model-config $(MODEL_CONFIG)) $(RECORD)

fuzz: $(DEVELOPING)
	$(BIN)/python -m tests.fuzz
	$(BIN)/python -m tests.fuzz.trtllm
	$(BIN)/python -m tests.fuzz.sglang

fuzz-wire: $(DEVELOPING)
	$(BIN)/python -m tests.fuzz.wire $(if $(MESSAGES),--messages $(MESSAGES)) $(if $(SEED),--seed $(SEED))

sim-faults: $(DEVELOPING)
	$(BIN)/python -m tests.worlds $(if $(SEED),--seed $(SEED)) $(if $(FLAVOUR),--flavour $(FLAVOUR))

e2e-attack: $(DEVELOPING)
	$(PYTEST) tests/e2e/attack $(SPREAD)

e2e-replicas: $(DEVELOPING)
	$(PYTEST) tests/e2e/replicas $(CHOSEN)

e2e-release: $(RELEASING) $(if $(HELM_VENV),,.venv-helm)
	$(BIN)/pytest tests/e2e/release

# CI says that what a lane needs must be there: its tests fail without it, instead of being skipped.
ci:
	$(MAKE) test test-slow docs e2e-attack
	CI=1 $(MAKE) $(LANES) e2e-tools-short CHOSEN='-m "not nightly"'

nightly:
	$(MAKE) --keep-going goldens test test-slow docs docs-commands e2e-attack sim-faults chaos chaos-envoy soak fuzz fuzz-wire lanes

lanes:
	CI=1 $(MAKE) --keep-going $(LANES) e2e-release

weekly: $(DEVELOPING)
	$(BIN)/python -m tools.weekly

release: $(RELEASING) $(if $(HELM_VENV),,.venv-helm)
	$(BIN)/python -m tools.release $(addprefix --version ,$(VERSION)) $(addprefix --image ,$(IMAGES))

bundle: $(RELEASING) $(if $(HELM_VENV),,.venv-helm)
	$(BIN)/python -m tools.release --bundle $(addprefix --version ,$(VERSION)) $(addprefix --image ,$(IMAGES)) \
	  $(addprefix --extra ,$(EXTRAS))

chaos: $(DEVELOPING) $(if $(filter envoy,$(LANE)),$(if $(ENVOY_VENV),,.venv-envoy))
	$(BIN)/python -m tests.chaos $(if $(LANE),--lane $(LANE)) $(if $(ONLY),--only $(ONLY))

chaos-envoy:
	$(MAKE) chaos LANE=envoy

soak: $(DEVELOPING)
	$(BIN)/python -m tests.soak --minutes $(MINUTES) --seed $(or $(SEED),0)

proto: $(DEVELOPING)
	proto/generate.sh

docs: $(DEVELOPING) .venv-docs
	$(BIN)/python -m tools.docs check
	.venv-docs/bin/sphinx-build --fail-on-warning --keep-going --nitpicky --quiet --jobs auto docs build/docs

docs-commands: $(DEVELOPING) .venv-envoy
	$(BIN)/python -m tools.docs run $(PAGES)

pictures: $(DEVELOPING)
	$(BIN)/python -m tools.docs pictures

.venv-docs: .venv-docs/installed

.venv-docs/installed: requirements-docs.lock
	$(PYTHON) -m venv --clear .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@

lock:
	$(PIP) uv
	$(BIN)/uv $(COMPILE) --extra build --output-file requirements.lock
	$(BIN)/uv $(COMPILE) --extra build --extra dev --extra lab --extra cedar --extra tokenizer --extra otel --constraint requirements.lock --output-file requirements-dev.lock
	$(BIN)/uv $(COMPILE) --extra build --extra s3 --extra gs --extra az --extra hf --extra cedar --extra tokenizer --extra otel --constraint requirements.lock \
	  --output-file deploy/requirements-origins.lock
	$(BIN)/uv $(COMPILE) --extra build --extra release --constraint requirements-dev.lock \
	  --output-file requirements-release.lock
	$(BIN)/uv $(subst pyproject.toml,--group docs,$(COMPILE)) --output-file requirements-docs.lock

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache
