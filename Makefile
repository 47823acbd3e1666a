# Copyright The csi-disktemplate Authors.
# SPDX-License-Identifier: Apache-2.0

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

GO := $(shell command -v go || echo /usr/local/go/bin/go)
STAMP := $(shell hack/stamp.sh)

# The tests run `go`, and they run mkfs, which an ordinary user's PATH does not reach.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin:$(patsubst %/,%,$(dir $(GO)))
# STAMP above has the version. Go's own stamp fails where the checkout belongs to
# another user, as under sudo.
export GOFLAGS := $(filter-out -buildvcs%,$(shell $(GO) env GOFLAGS 2>/dev/null)) -buildvcs=false

TESTFLAGS := -timeout 30m
# -p 2: system tests share the machine's loop devices, and each VM takes a core.
SYSTEMFLAGS := -tags system -p 2 -count 1 $(TESTFLAGS)

# AS_ROOT runs a command as root, through sudo if need be. sudo resets the environment,
# so Go's variables are passed along. The module cache is among them, so that nothing is
# downloaded twice.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo -H)
AS_ROOT = $(SUDO) env "PATH=$$PATH" $(foreach v,GOFLAGS GOMODCACHE GOPROXY GOSUMDB GOTOOLCHAIN,"$(v)=$$($(GO) env $(v))")

# The race detector needs a C compiler and its headers.
RACE = $(shell echo '\#include <stdlib.h>' | $$($(GO) env CC) -E - >/dev/null 2>&1 && echo -race)

# How long each target is fuzzed, in the form of go test -fuzztime.
FUZZTIME := 10s

TOOL := $(GO) tool -modfile=hack/tools/go.mod
DEMO_DIR := /var/cache/csi-disktemplate-demo
DEMO_FLAGS :=
# bin/bench --help lists them.
BENCH_FLAGS :=

section = @printf '\n=== %s\n' "$(1)"

##@ Try it

.PHONY: demo
demo: need-go ## Install what is missing, and show the plugin at work on a pool of its own
	@$(SUDO) hack/setup.sh --demo
	@$(MAKE) --no-print-directory build
	@$(GO) build -o bin/demo ./hack/demo
	@# Files that root built under sudo go back to the user who called sudo.
	@[ -z "$${SUDO_UID:-}" ] || chown -R --no-dereference "$$SUDO_UID:$$SUDO_GID" bin
	@$(SUDO) bin/demo --plugin bin/csi-disktemplate --pool $(DEMO_DIR) $(DEMO_FLAGS)

.PHONY: demo-clean
demo-clean: ## Remove the demo's pool
	@! mountpoint -q $(DEMO_DIR)/mnt || $(SUDO) umount $(DEMO_DIR)/mnt
	$(SUDO) rm -rf --one-file-system $(DEMO_DIR)

##@ Build

.PHONY: build
build: need-go ## Build bin/csi-disktemplate, and kubectl's name for it
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags "-s -w $(STAMP)" -o bin/csi-disktemplate ./cmd/csi-disktemplate
	@ln -sf csi-disktemplate bin/kubectl-disktemplate

.PHONY: image
image: build ## Make the container image bin/image.tar, without a registry
	deploy/image/build.sh bin/image.tar
	@echo "bin/image.tar: $$(($$(stat -c %s bin/image.tar) >> 20)) MiB, $$(($$(gzip -c bin/image.tar | wc -c) >> 20)) MiB compressed"

.PHONY: chart
chart: need-go ## Write the Helm chart's templates from the kustomize manifests
	$(GO) -C hack/chart run .

.PHONY: setup
setup: ## Install everything but Go that building, running and testing need (Debian, Ubuntu)
	$(SUDO) hack/setup.sh

.PHONY: clean
clean: ## Remove the built files
	rm -rf bin

##@ Check

.PHONY: test
test: setup lint ## Run lint, unit tests, fuzz tests and system tests; asks for root
	$(call section,Unit tests)
	$(GO) test -race $(TESTFLAGS) ./...
	$(call section,The Helm chart beside kustomize)
	@$(MAKE) --no-print-directory test-chart
	$(call section,Fuzz tests)
	@$(MAKE) --no-print-directory fuzz FUZZTIME=2s
	$(call section,System tests: pools$(comma) mounts and VMs$(comma) as root)
	@mkdir -p bin/test
	@seed=$${SEED:-$$(date +%s%N)}; echo "SEED=$$seed go test -race $(SYSTEMFLAGS) ./..."; \
		$(AS_ROOT) SEED=$$seed $(GO) test -race $(SYSTEMFLAGS) ./...
	$(call section,All tests passed)

.PHONY: test-unit
test-unit: need-go ## Run the tests that need only Go: no root, no packages
	$(GO) test $(RACE) $(TESTFLAGS) ./...

.PHONY: test-chart
test-chart: need-go ## Check that the Helm chart and kustomize install the same objects; no root
	$(GO) -C hack/chart vet .
	$(GO) -C hack/chart test $(TESTFLAGS) .

.PHONY: fuzz
fuzz: need-go ## Fuzz everything that reads foreign data, each target for FUZZTIME=10s
	@GO=$(GO) hack/fuzz.sh $(FUZZTIME)

.PHONY: e2e
e2e: build ## Test the plugin on a real Kubernetes, with Kubernetes' storage suite; asks for root
	@$(SUDO) hack/setup.sh --e2e
	@$(AS_ROOT) hack/kube/e2e.sh

.PHONY: cluster
cluster: build ## Start such a Kubernetes, with the plugin on it; make cluster-down ends it
	@$(SUDO) hack/setup.sh --e2e
	@$(AS_ROOT) hack/kube/cluster up
	@$(SUDO) hack/kube/cluster kubectl apply -k $(CURDIR)/deploy/kubernetes/overlays/snapshots
	@echo "sudo hack/kube/cluster kubectl get pods -A"

.PHONY: cluster-down
cluster-down: ## End the Kubernetes that make cluster started
	@$(SUDO) hack/kube/cluster down

.PHONY: bench-pods
bench-pods: need-go ## Time pods with and without volumes, on the Kubernetes that make cluster started
	@$(AS_ROOT) $(GO) test -tags e2e -count 1 -timeout 30m -run '^$$' -bench Pod -benchtime 20x ./hack/kube/e2e

.PHONY: torture
torture: need-go ## Kill the plugin before each effect, and COUNT times under load, by SEED; asks for root
	@mkdir -p bin/test
	@$(AS_ROOT) COUNT=$(or $(COUNT),500) SEED=$(SEED) $(GO) test $(SYSTEMFLAGS) -timeout 6h -v -run 'Kill|Error|Returns' ./hack/torture

.PHONY: powercut
powercut: need-go ## Cut the power COUNT times while volumes come and go, by SEED; asks for root
	@mkdir -p bin/test
	@$(AS_ROOT) COUNT=$(or $(COUNT),200) SEED=$(SEED) $(GO) test $(SYSTEMFLAGS) -timeout 6h -v -run PowerCut ./hack/torture

.PHONY: bench
bench: need-go ## Measure the plugin beside its floor and beside what people do without it, within half an hour; asks for root
	@$(SUDO) hack/setup.sh --bench
	@$(MAKE) --no-print-directory build
	@$(GO) build -o bin/bench ./hack/bench
	@[ -z "$${SUDO_UID:-}" ] || chown -R --no-dereference "$$SUDO_UID:$$SUDO_GID" bin
	@$(SUDO) env $(foreach v,BENCH_PEER_SOCKET BENCH_PEER_CALLS,"$(v)=$${$(v):-}") bin/bench --plugin bin/csi-disktemplate $(BENCH_FLAGS)

.PHONY: bench-docs
bench-docs: ## Run make bench, and keep its figures in docs/bench and in the README; asks for root
	@$(MAKE) --no-print-directory bench BENCH_FLAGS="--out docs/bench $(BENCH_FLAGS)"
	bin/bench --out docs/bench --quote README.md

.PHONY: microbench
microbench: need-go ## Run the benchmarks of single packages; asks for root
	@mkdir -p bin/test
	@$(AS_ROOT) $(GO) test $(SYSTEMFLAGS) -p 1 -run '^$$' -bench . -benchmem ./...

.PHONY: lint
lint: need-go ## Run gofmt, go vet, staticcheck and govulncheck
	$(call section,gofmt)
	@bad=$$($(GO)fmt -l cmd hack internal pkg); [ -z "$$bad" ] || { echo "run gofmt -w on:" $$bad; exit 1; }
	$(call section,go vet)
	$(GO) vet ./...
	$(GO) vet -tags system,e2e ./...
	$(call section,staticcheck)
	$(TOOL) staticcheck ./...
	$(TOOL) staticcheck -tags system,e2e ./...
	$(call section,govulncheck)
	@GO=$(GO) hack/tools/govulncheck.sh ./...

.PHONY: help
help: ## Show this help
	@awk 'BEGIN { FS = ":.*## " } \
		/^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: need-go
need-go:
	@[ -x "$(GO)" ] || { echo "Go was found neither on PATH nor in /usr/local/go: see https://go.dev/doc/install, and go.mod for the version" >&2; exit 1; }

comma := ,
