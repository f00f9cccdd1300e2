# Thin names over cargo. `make setup` installs what Debian has and this tree needs; `demo` and `test` run it first.

CARGO ?= cargo
ARGS ?=

# boring and quiche build BoringSSL (cmake, clang, libclang); the edge needs libelf and zlib; perf-gate valgrind;
# tests of network namespaces iproute2 and nftables.
PACKAGES := build-essential cmake clang libclang-dev libelf-dev zlib1g-dev pkg-config git ca-certificates \
            valgrind iproute2 nftables

# The gate's own tests belong to the rest; the peers (tokio, quinn, s2n-quic) are minutes of building for nothing.
TESTED := --workspace --exclude millrace-peers

# A test that cannot run on this host adds a line to this file.
SKIPPED := $(CURDIR)/target/skipped-tests.txt

# Root may do all that the tests need: then a test that cannot run fails. Set it to 0 to skip all the same.
ifeq ($(shell id -u),0)
export MILLRACE_REQUIRE_KERNEL ?= 1
endif

.PHONY: setup demo test lint docs bench bench-edge peers perf-gate

setup:
	@missing=""; \
	if command -v dpkg-query >/dev/null 2>&1; then \
	  for package in $(PACKAGES); do \
	    status=$$(dpkg-query -W -f='$${db:Status-Status}' $$package 2>/dev/null || true); \
	    [ "$$status" = installed ] || missing="$$missing $$package"; \
	  done; \
	else \
	  echo "setup: this is no Debian; these must be there by your own means: $(PACKAGES)"; \
	fi; \
	if [ -n "$$missing" ]; then \
	  as_root=""; [ "$$(id -u)" = 0 ] || as_root=sudo; \
	  echo "setup: installing missing Debian packages:$$missing"; \
	  $$as_root apt-get update -q; \
	  DEBIAN_FRONTEND=noninteractive $$as_root apt-get install -y -q --no-install-recommends $$missing; \
	fi
	@command -v $(CARGO) >/dev/null 2>&1 || { \
	  echo "setup: cargo is missing; install Rust 1.95 or newer from https://rustup.rs and run this again"; exit 1; }

# Four nodes, one 128 MiB artifact, delivered and hash-checked.
demo: setup
	$(CARGO) build --release -p millrace
	target/release/millrace dev --nodes 4 --payload 128MiB --once $(ARGS)

test: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy $(TESTED) --all-targets -- -D warnings
	@mkdir -p target; rm -f $(SKIPPED)
	@status=0; \
	MILLRACE_SKIPPED_TESTS=$(SKIPPED) $(CARGO) test $(TESTED) || status=$$?; \
	if [ -s $(SKIPPED) ]; then \
	  echo "test: $$(sort -u $(SKIPPED) | wc -l) tests or parts of tests were skipped on this host:"; \
	  sort -u $(SKIPPED) | sed 's/^/  /'; \
	else \
	  echo "test: no test was skipped"; \
	fi; \
	exit $$status

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

# Writes the pages that are generated from the code: docs/reference.
docs:
	MILLRACE_BLESS=1 $(CARGO) test -q -p millrace --bin millrace reference

bench: setup
	$(CARGO) bench -p millrace-perf -- $(ARGS)

# Side by side with quinn and s2n-quic; ARGS=--quick for a look of under 50 s.
peers: setup
	$(CARGO) run --profile dist -p millrace-peers -- $(ARGS)

# What a hostile packet costs: the edge, nftables, xdp-filter on one testbed. Needs root. ARGS=--quick for a look of under 50 s.
bench-edge: setup
	$(CARGO) build --profile dist -p millrace-bench-edge
	target/dist/bench-edge $(ARGS)

# Instruction counts of the pure hot pieces against the committed baseline; UPDATE=1 records a new one.
perf-gate: setup
	$(CARGO) run --release -p millrace-perf --bin gate -- $(if $(UPDATE),--update) $(ARGS)
