# weft: build, show, test. Everything but `help`, `build` and `check` needs root.

CARGO ?= cargo
TESTBED = target/debug/weft-testbed
BENCH = target/release/weft-testbed

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## Build the weft binary and the testbed (dev profile)
	$(CARGO) build -p weft-agent -p weft-testbed

release: ## Build the weft binary for use
	$(CARGO) build --release -p weft-agent

demo: deps build ## Three hosts, two networks, names and pings; KEEP=1 leaves them up
	$(TESTBED) demo $(if $(KEEP),--keep)

# One test at a time: each has up to three agents, and measures how quick they are.
test: deps engine-deps web-deps build ## All tests: pure, simulated, kernel and end to end
	RUST_BACKTRACE=0 $(CARGO) test --workspace --exclude weft-testbed
	RUST_BACKTRACE=0 $(CARGO) test -p weft-testbed -- --test-threads=1

test-engines-next: deps engine-deps build ## The drivers with Docker and podman of Debian 13, fetched once (700 MB)
	testbed/engines-tree target/engines/trixie
	WEFT_ENGINES_TREE=$(CURDIR)/target/engines/trixie/tree RUST_BACKTRACE=0 \
	$(CARGO) test -p weft-testbed --test docker --test docker_options --test docker_ports --test docker_health \
		--test docker_crashes --test docker_swarm --test compose -- --test-threads=1
	WEFT_ENGINES_TREE=$(CURDIR)/target/engines/trixie/tree RUST_BACKTRACE=0 \
	$(CARGO) test -p weft-testbed --test podman --test podman_health -- --test-threads=1 --ignored

check: ## Format, lints, crate walls, licences
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- --deny warnings
	.ci/walls
	@if command -v cargo-deny >/dev/null; then $(CARGO) deny check bans licenses sources; \
	else echo "cargo-deny is not installed: licences and bans were not checked (cargo install cargo-deny)"; fi

bench-converge: deps bench-build ## From attach on one host to reached on another, 200 times
	$(BENCH) bench-converge

bench-docker: deps engine-deps bench-build ## Docker's containers on weft against Docker's own overlay in swarm mode
	$(BENCH) bench-docker

bench-ingress: deps engine-deps web-deps bench-build ## Services and published ports against direct, HAProxy, docker-proxy
	$(BENCH) bench-ingress $(BENCH_OPTIONS)

bench-plain: deps bench-build ## Throughput against the same topology made by hand
	$(BENCH) bench-plain

bench-sealed: deps bench-deps bench-build ## Encrypted networks against kernel VXLAN, WireGuard and nebula
	$(BENCH) bench-sealed $(if $(PICTURE),--picture $(PICTURE)) $(BENCH_OPTIONS)

# What encrypted networks are measured against: of Debian, and one of the crates' registry.
bench-deps:
	@deploy/deps.sh peers
	$(CARGO) install boringtun-cli --version 0.7.1 --locked --quiet --root target/peers

bench-build:
	$(CARGO) build --release -p weft-agent -p weft-testbed

fuzz: ## Fuzz the sealed path's parsers, a minute each; needs nightly and cargo-fuzz; FUZZ_SECONDS=n
	$(CARGO) run --quiet -p weft-seal --example fuzz_seeds
	cd vxlan/seal/fuzz && for target in frames split coalesce packets; do \
		$(CARGO) fuzz run --fuzz-dir . $$target -- -max_total_time=$(or $(FUZZ_SECONDS),60) -max_len=70000 || exit 1; \
	done

docker-plugin: release ## Make the plugin for Docker in swarm mode, from the binary of this host
	deploy/docker-plugin.sh target/release/weft target/docker-plugin
	@echo "on each node: docker plugin create weft-swarm target/docker-plugin && docker plugin enable weft-swarm"

install: release ## Install weft on this host: binary, systemd unit, configuration
	deploy/install.sh --binary target/release/weft

deps:
	@deploy/deps.sh

engine-deps:
	@deploy/deps.sh engines

web-deps:
	@deploy/deps.sh web

clean: ## Take down labs that were left up, and remove what was built
	@if [ -x $(TESTBED) ]; then $(TESTBED) sweep; fi
	$(CARGO) clean

sweep: ## Take down labs that were left up
	@if [ -x $(TESTBED) ]; then $(TESTBED) sweep; else echo "no testbed was built"; fi

.PHONY: help build release demo test test-engines-next check bench-converge bench-docker bench-ingress bench-plain bench-sealed bench-deps bench-build fuzz docker-plugin install deps engine-deps web-deps clean sweep
