# Everything a developer or an administrator runs. `make` alone lists the targets.
SHELL := /bin/bash

PREFIX ?= /usr/local
# What is fetched or built once for many runs, outside the clone.
export TROUPE_CACHE ?= $(HOME)/.cache/troupe
export TROUPE_GUESTS ?= $(TROUPE_CACHE)/guests

SHIM := containerd-shim-wasmtime-v1
# The name that older wasm shims were known by.
ALIAS := containerd-shim-wasm-v1
TARGET := $(or $(CARGO_TARGET_DIR),target)
BUILT := $(TARGET)/release/$(SHIM)
# By what the shim's requests do, if the profile is of this compiler.
CARGO := benches/profile.sh cargo
# The tests' own host functions; never in a binary that is installed.
TEST := cargo test --workspace --features test-hooks

.DEFAULT_GOAL := help
.PHONY: help build profile check test bench demo install uninstall guests clean packages containerds protoc

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: protoc ## Build the shim and the image builder for use (release profile)
	$(CARGO) build --release --bins

profile: packages containerds guests ## Count anew what the shim's requests do, for the compiler; as root (half an hour; see benches/profile.sh)
	benches/profile.sh count

check: protoc ## Formatting, lints, documentation and licences; warnings are errors
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --features test-hooks -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items --quiet
	.ci/licences
	benches/profile.sh check

# The integration tests come last: theirs is the summary line to look at.
test: packages containerds guests ## Install what is missing, then run all tests (root, Debian or Ubuntu)
	$(TEST) --lib
	$(TEST) --doc
	$(TEST) --no-fail-fast --bins --test '*'

# Not the shim that cargo builds beside a bench, whose packages have other features.
bench: export TROUPE_SHIM = $(abspath $(BUILT))
bench: build packages containerds guests ## Measure speed and memory; figures on standard output
	cargo bench --bench containers
	cargo bench --bench cache
	cargo bench --bench http
	cargo bench --bench pods

demo: ## Run a guest under a private containerd and show its logs
	examples/demo.sh

install: protoc ## Install the shim below PREFIX (default /usr/local), print what containerd needs
	$(CARGO) build --release --bin $(SHIM)
	install -D -m 0755 "$(BUILT)" "$(DESTDIR)$(PREFIX)/bin/$(SHIM)"
	ln -sf $(SHIM) "$(DESTDIR)$(PREFIX)/bin/$(ALIAS)"
	@cat .ci/containerd.txt

uninstall: ## Remove what `make install` put below PREFIX
	rm -f "$(DESTDIR)$(PREFIX)/bin/$(SHIM)" "$(DESTDIR)$(PREFIX)/bin/$(ALIAS)"

guests: ## Build the wasm programs of tests, demo and benches
	tests/guests/build.sh

clean: ## Remove the build (the caches in TROUPE_CACHE stay)
	cargo clean

packages: protoc
	@.ci/packages curl:'a client of the http servers' openssl:'a server of https' wrk:'their load in the benches' \
	  runc:'native containers beside the wasm ones' busybox-static:'what the native ones run' \
	  containernetworking-plugins:'networks of pods' iproute2:'the same' dnsmasq-base:'their name server' iptables:'ports of pods on the node' \
	  skopeo:'reads the images that are packed' umoci:'reads them, too' \
	  debian-archive-keyring:'checks the containerds that are fetched'

containerds:
	tests/containerds.sh "$(TROUPE_CACHE)/containerds"

# The messages of containerd's API are compiled by it.
protoc:
	@[ -n "$$PROTOC" ] || command -v protoc >/dev/null || .ci/packages protobuf-compiler:'the build compiles the messages of containerd'
