# Thin names over cargo. `make setup` installs what Debian has and this tree needs; `demo` and
# `test` run it first.

CARGO ?= cargo
ARGS ?=

# boring and quiche build BoringSSL (cmake, clang, libclang); the edge needs libelf and zlib;
# perf-gate needs valgrind; tests of network namespaces need iproute2, nftables, ethtool, setpriv.
PACKAGES := build-essential cmake clang libclang-dev libelf-dev zlib1g-dev pkg-config git \
            ca-certificates valgrind iproute2 nftables ethtool util-linux

# All but the peers (tokio, quinn, s2n-quic), which take minutes to build and have few tests.
TESTED := --workspace --exclude millrace-peers

# A test that cannot run on this host adds a line to this file.
SKIPPED := $(CURDIR)/target/skipped-tests.txt

# Root may do all that the tests need: then a test that cannot run fails, unless the caller sets
# this to 0.
ifeq ($(shell id -u),0)
export MILLRACE_REQUIRE_KERNEL ?= 1
endif

.PHONY: setup demo test verify test-sim test-stress test-fuzz test-loom test-edge mutants lint gates rustdoc deny docs \
        bench bench-edge bench-hostile bench-quick bench-wan peers perf-gate

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
	$(CARGO) run --release -p millrace -- dev --nodes 4 --payload 128MiB --once $(ARGS)

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

# How long a fuzz target runs in full; bolero reads it, and runs each for a second without it.
FUZZ_MS := 60000

# All tests in full: every seed of the simulator, 60 s of stress and of each fuzz target, and loom.
# Over an hour, of which the fuzz targets take ten minutes on two cores.
verify: setup
	MILLRACE_VERIFY=1 MILLRACE_STRESS_SECONDS=60 BOLERO_RANDOM_TEST_TIME_MS=$(FUZZ_MS) $(MAKE) test
	$(MAKE) test-loom
	$(MAKE) mutants

# One-line changes, each of which a test must see.
mutants: setup
	.ci/mutants $(ARGS)

# Single suites in full, each a part of `make verify`.
test-sim: setup
	MILLRACE_VERIFY=1 $(CARGO) test -p millrace-sim

test-stress: setup
	MILLRACE_STRESS_SECONDS=60 $(CARGO) test -p millrace-shards --test wakeups

test-fuzz: setup
	BOLERO_RANDOM_TEST_TIME_MS=$(FUZZ_MS) $(CARGO) test -p millrace-fuzz --test decoders -- --show-output

test-edge: setup
	$(CARGO) test -p millrace-edge -p millrace-edge-policy -p millrace-edge-control

# loom tries every order of the memory accesses of mailbox and parking. It has a folder of its own,
# because `--cfg loom` builds everything anew.
test-loom: setup
	RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom \
	  $(CARGO) test -p millrace-shards --test loom --release

lint: TESTED := --workspace
lint: gates
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

# Checks that are no tests; `make test` runs formatting and lints itself.
gates: rustdoc deny

rustdoc:
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --no-deps $(TESTED)

deny:
	@if $(CARGO) deny --version >/dev/null 2>&1; then \
	  $(CARGO) deny check licenses sources bans; \
	else \
	  echo "deny: cargo-deny is not installed; licences, sources and duplicates were not checked"; \
	fi

# Writes the pages that are generated from the code: docs/reference.
docs:
	MILLRACE_BLESS=1 $(CARGO) test -q -p millrace-node --lib -p millrace --bin millrace reference

bench: setup
	$(CARGO) bench -p millrace-perf -- $(ARGS)

# Side by side with quinn and s2n-quic; ARGS=--quick for a look of under 50 s.
peers: setup
	$(CARGO) run --profile dist -p millrace-peers -- $(ARGS)

# Bodies, RPCs and a mesh over long and lossy links, beside quinn and s2n-quic; 40 minutes.
# ARGS=--quick for the 150 ms row in 3 minutes.
bench-wan: setup
	$(CARGO) run --profile dist -p millrace-peers -- wan $(ARGS)

# What an honest peer's work takes while members attack, and while they do not. Needs root.
# ARGS="--rounds 1" for a look.
bench-hostile: setup
	$(CARGO) bench --profile dist -p millrace --bench hostile -- $(ARGS)

# The cost of a hostile packet: the edge, nftables, xdp-filter on one testbed. Needs root.
# ARGS=--quick for a look of under 50 s.
bench-edge: setup
	$(CARGO) run --profile dist -p millrace-bench-edge -- $(ARGS)

# Every bench with short rounds; fails when a figure is three times worse than its target. Three
# rounds for the peers, whose two sides the host may move apart in the middle of one.
bench-quick: setup
	$(CARGO) run --profile dist -p millrace-peers -- --quick --rounds 3 --check collapse
	$(CARGO) run --profile dist -p millrace-peers -- wan --quick --check collapse
	$(CARGO) run --profile dist -p millrace-bench-edge -- --quick --check collapse

# Instruction counts of the pure hot pieces against the committed baseline; UPDATE=1 records a new one.
perf-gate: setup
	$(CARGO) run --release -p millrace-perf --bin gate -- $(if $(UPDATE),--update) $(ARGS)
