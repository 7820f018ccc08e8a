# Ambit: every command a person types. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

export AMBIT_CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/ambit
# Compiled dependencies outlive a clone: one folder per compiler and lock file.
export CARGO_TARGET_DIR ?= $(AMBIT_CACHE)/target/$(shell (rustc -V; cat Cargo.lock) 2>/dev/null | sha256sum | cut -c1-16)

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: prerequisites
prerequisites: ## what a fresh Debian machine lacks (packages; names a missing or too old Rust or Go)
	@tests/prerequisites

.PHONY: build
build: prerequisites ## the three programs, release profile
	cargo build --release --locked --bins

.PHONY: test
test: prerequisites ## every ring of tests, lints first; ends with "N passed, N failed"
	tests/run-rings

.PHONY: soak
soak: prerequisites ## what must hold again and again, as often as promised: hours; seed and report in target/soak
	tests/run-soak

.PHONY: fuzz
fuzz: prerequisites ## an hour of a fuzzer for each target; a finding is in fuzz/artifacts
	tests/run-fuzz 3600

.PHONY: images
images: prerequisites ## the container images, as archives that containerd imports; prints their paths
	@tests/images

.PHONY: bench
bench: prerequisites ## a full node's passes; the mesh against plain TCP and raw TLS: tables, and target/bench/latest.json
	tests/run-bench

.PHONY: bench-scale
bench-scale: prerequisites ## a controller with 1,000 nodes, 50,000 pods and 1,000 proxies: table, and target/bench/scale.json
	tests/run-bench-scale

.PHONY: demo
demo: prerequisites ## a real two-node cluster on this machine, with Ambit and a sample application in it
	@tests/demo

.PHONY: demo-down
demo-down: ## takes the demo's cluster away, and leaves nothing of it
	@tests/cluster/down demo
