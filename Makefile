# vmferry: everything that is built, run and checked. `make help` lists the targets.
#
# Nothing is downloaded but what requirements.lock and Cargo.lock name, with its hash. Stamp files in .venv remember
# what is done, so a second run rebuilds only what changed.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PROTOS := $(wildcard proto/vmferry/v1/*.proto)
PROGRAM_SOURCES := $(shell find pager pagemap reach refvm deploy/wheel -type f -not -path '*/target/*') Cargo.toml Cargo.lock pyproject.toml $(PROTOS)
# One profile for build, tests and clippy, so that nothing is compiled twice.
CARGO_FLAGS := --release --locked

CARGO_DENY := 0.20.2

DEPENDENCIES := $(VENV)/.stamp-dependencies
GENERATED := src/vmferry/v1/__init__.py
INSTALLED := $(VENV)/.stamp-installed

# Each file of tests has its daemons and guests to itself, so a file stays in one process.
JOBS ?= $(shell nproc | awk '{print ($$1 < 4) ? $$1 : 4}')
PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

# A line for each stage, with the time that it took.
STAGE := @.ci/stage

.PHONY: help setup demo test test-rust test-unit test-network network-page test-kernels test-kernels-short \
  bench bench-history profile coverage coverage-python coverage-rust deny lint lint-python lint-rust lint-text fmt proto docs wheel clean host-tools \
  demo-packages test-packages bench-packages profile-packages lab-packages

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## Virtual environment, generated code, Rust programs: all that demo and test need

demo: demo-packages $(INSTALLED) ## Move a poisoned KVM guest between two daemons; options in ARGS="--qemu --memory 1G --json"
	@$(BIN)/vmferry demo $(ARGS)

test: test-packages test-rust ## All tests, Rust and Python; options for pytest in ARGS="-k wheel"
	@$(PYTEST) $(or $(ARGS),--cov --cov-report=json:target/ci/coverage.json --junitxml target/ci/tests.xml)

test-rust: $(INSTALLED) ## The Rust tests
	$(STAGE) "Rust tests built" cargo test $(CARGO_FLAGS) --workspace --no-run
	$(STAGE) "Rust tests" cargo test $(CARGO_FLAGS) --workspace

test-unit: $(INSTALLED) ## The Python tests that need nothing of the machine; options for pytest in ARGS
	@$(PYTEST) tests/unit tests/house $(ARGS)

coverage: coverage-python coverage-rust ## Lines that the tests reach, in target/coverage

coverage-python: $(INSTALLED)
	@$(PYTEST) tests/unit tests/crash --cov --cov-report=term:skip-covered --cov-report=html:target/coverage/python

coverage-rust: | host-tools
	@.ci/rust-coverage

test-network: test-packages $(INSTALLED) ## Moves over every kind of network that tests/network knows; options in ARGS="-k rtt"
	$(BIN)/python -m pytest tests/network -m "long or not long" $(ARGS)

network-page: test-packages $(INSTALLED) ## The same, and docs/performance/network.md with what it took
	VMFERRY_NETWORK_PAGE=$(or $(OUT),docs/performance/network.md) $(BIN)/python -m pytest tests/network -m "long or not long" $(ARGS)

# The emulator needs no hardware of this machine. Kernels come by apt into target/lab.
test-kernels: lab-packages $(INSTALLED) ## Tests with really bad frames on other kernels, in an emulator; KERNELS="6.12 6.18 7.3"
	@$(BIN)/python -m tests.lab $(KERNELS)

test-kernels-short: lab-packages $(INSTALLED) ## The same on one kernel: kernel facts and real memory errors
	@$(BIN)/python -m tests.lab --short $(or $(KERNELS),6.12)

bench: bench-packages $(INSTALLED) ## Move the same guest with vmferry and with QEMU, in turn; options in ARGS="--quick --out FILE"
	cargo build $(CARGO_FLAGS) --package vmferry-bench
	@bench/vmferry-bench $(ARGS)

bench-history: $(INSTALLED) ## Page, metrics and list with 3,000 ended and 50 active migrations, as ratios to an empty daemon
	@PYTHONPATH=src:bench $(BIN)/python -m vmferry_bench.history

# The programs are built once more, with frame pointers, so that samples have whole stacks.
profile: profile-packages $(INSTALLED) ## Flame graphs of both pagers, and a fault stage by stage, in profile/; options in ARGS="--docs DIRECTORY"
	cargo build $(CARGO_FLAGS) --package vmferry-bench
	RUSTFLAGS="-C force-frame-pointers=yes" cargo build $(CARGO_FLAGS) --target-dir target/profile --package vmferry
	@VMFERRY_PROGRAMS=$(abspath target/profile/release) bench/vmferry-profile $(ARGS)

lint: lint-text lint-python lint-rust ## All linters; changes nothing

lint-text: $(DEPENDENCIES) ## Spelling, and the form of TOML files
	$(STAGE) "typos" $(BIN)/typos
	$(STAGE) "taplo" env RUST_LOG=warn $(BIN)/taplo fmt --check

lint-python: $(GENERATED) ## ruff, mypy, imports, dead code, dependencies
	$(STAGE) "ruff check" $(BIN)/ruff check .
	$(STAGE) "ruff format" $(BIN)/ruff format --check .
	$(STAGE) "mypy" $(BIN)/mypy
	$(STAGE) "mypy bench" env MYPYPATH=src:bench $(BIN)/mypy -p vmferry_bench
	$(STAGE) "import contracts" env PYTHONPATH=src $(BIN)/lint-imports --no-logo
	$(STAGE) "vulture" $(BIN)/vulture
	$(STAGE) "deptry" $(BIN)/deptry .

lint-rust: | host-tools ## cargo fmt, clippy, rustdoc
	$(STAGE) "cargo fmt" cargo fmt --all --check
	$(STAGE) "clippy" cargo clippy $(CARGO_FLAGS) --workspace --all-targets -- -D warnings
	$(STAGE) "rustdoc" env RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" cargo doc $(CARGO_FLAGS) --workspace --no-deps --document-private-items

# cargo-deny is built once; the tests check the same rules but for the texts of the licences.
deny: | host-tools ## Licences and sources of all crates, by cargo-deny
	$(STAGE) "cargo-deny built" cargo install --quiet --locked --root target/tools cargo-deny@$(CARGO_DENY)
	$(STAGE) "cargo-deny" target/tools/bin/cargo-deny --workspace --offline check bans licenses sources

fmt: $(DEPENDENCIES) ## Format Python, Rust and Markdown
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix-only --exit-zero .
	cargo fmt --all
	RUST_LOG=warn $(BIN)/taplo fmt
	$(BIN)/rumdl fmt --silent .

proto: $(GENERATED) ## Generate src/vmferry/v1 from proto/

docs: $(GENERATED) ## Generate docs/reference/api.md from the comments of proto/
	$(BIN)/python docs/generate_api.py

wheel: $(GENERATED) ## Build the wheel, with the Rust programs, into dist/
	$(BIN)/maturin build $(CARGO_FLAGS) --out dist

clean: ## Remove everything that was built or generated
	rm -rf $(VENV) target dist profile src/vmferry/v1 .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

host-tools:
	@missing=""; \
	for tool in $(PYTHON) gcc cargo; do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	if [ -n "$$missing" ]; then \
	  echo "make: not found:$$missing; vmferry is built with Python 3.11, gcc and Rust 1.88 or newer" >&2; exit 1; \
	fi

demo-packages:
	@deploy/debian/packages ip=iproute2 $(if $(filter --qemu,$(ARGS)),qemu-system-x86_64=qemu-system-x86)
	@$(if $(filter --qemu,$(ARGS)),deploy/debian/newer-qemu $(VENV)/qemu)

bench-packages:
	@deploy/debian/packages qemu-system-x86_64=qemu-system-x86

lab-packages:
	@deploy/debian/packages qemu-system-x86_64=qemu-system-x86

profile-packages:
	@deploy/debian/packages perf=linux-perf

test-packages:
	@deploy/debian/packages ip=iproute2 chromium=chromium promtool=prometheus qemu-system-x86_64=qemu-system-x86 \
	  /usr/sbin/libvirtd=libvirt-daemon virsh=libvirt-clients
	@deploy/debian/newer-qemu $(VENV)/qemu
	@deploy/debian/cloud-kernel $(VENV)/cloud-kernel

$(DEPENDENCIES): requirements.lock | host-tools
	@echo "make: virtual environment with what requirements.lock names" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  deploy/debian/packages /usr/lib/python3.11/ensurepip/__init__.py=python3.11-venv && $(PYTHON) -m venv --clear $(VENV); }
	@.ci/stage "Python packages" $(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock >&2
	@touch $@

# The file itself is the stamp. Written beside its place and moved, so that a program that runs meanwhile never sees half of it.
$(GENERATED): $(PROTOS) $(DEPENDENCIES)
	@echo "make: code from proto/" >&2
	@rm -rf $(VENV)/generated && mkdir -p $(VENV)/generated
	@$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=$(VENV)/generated --grpc_python_out=$(VENV)/generated \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --mypy_out=quiet:$(VENV)/generated \
	  --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc --mypy_grpc_out=quiet:$(VENV)/generated \
	  $(PROTOS)
	@touch $(VENV)/generated/vmferry/v1/__init__.py
	@rm -rf src/vmferry/v1 && mv $(VENV)/generated/vmferry/v1 src/vmferry/v1 && rm -r $(VENV)/generated

# Set-up speaks on standard error: `make demo ARGS=--json` prints one object, whatever had to be built before.
# An editable wheel: Python from src/, the two programs and the two scripts in .venv/bin. No index is asked.
$(INSTALLED): $(PROGRAM_SOURCES) $(GENERATED) $(DEPENDENCIES)
	@echo "make: Rust programs and wheel; some minutes the first time" >&2
	@VIRTUAL_ENV=$(abspath $(VENV)) PATH="$(abspath $(BIN)):$$PATH" \
	  .ci/stage "Rust programs and wheel" $(BIN)/python -m pip install --quiet --no-index --no-deps --no-build-isolation \
	  --force-reinstall --editable . >&2
	@touch $@
