# The tests that need no service, for `make check`.
CHECK_TESTS = --lib --test tidy --test reference --test simulation --test operator -- --skip ::real::

# More arguments for `cargo test` in `make test`, such as TEST_ARGS='--test kafka'.
TEST_ARGS =

.DEFAULT_GOAL = help
.PHONY: help demo test lint check

help:
	@echo 'make demo    build, then deliver ten sample messages to a test receiver and show what became of them'
	@echo 'make lint    format, clippy, docs'
	@echo 'make check   before a commit: format, clippy, docs, the tests that need no service'
	@echo 'make test    every test on every backend; installs, starts and stops what they need'

demo:
	@dev/packages build
	cargo build --release --locked
	@"$${CARGO_TARGET_DIR:-target}/release/ams" demo --exit-when-done

lint:
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS=-Dwarnings cargo doc --locked --no-deps

check: lint
	env -u DATABASE_URL -u REDIS_URL -u KAFKA_BROKERS -u AMS_TEST_REQUIRE_SERVICES \
		cargo test --locked $(CHECK_TESTS)

test:
	@dev/test $(TEST_ARGS)
