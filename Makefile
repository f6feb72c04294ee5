# Everything works on a fresh machine with Go, Node and, for what is missing,
# Debian's packages. `make demo` and `make test` are all that most people need.
.DEFAULT_GOAL := help
SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c

OPA ?= go tool opa
TOOL := go tool -modfile=test/tools/go.mod
# Static: no cgo anywhere in the product. -race needs cgo, so tests keep it.
GO_BUILD := CGO_ENABLED=0 go build -trimpath

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

.PHONY: build
build: ## bin/writ, one static binary
	@[[ -e bin/writ ]] || echo "building bin/writ; the first time takes a minute or two"
	$(GO_BUILD) -o bin/writ ./cmd/writ

.PHONY: demo
demo: build ## play the whole story on this machine and exit
	@go run ./test/postgres/run -optional -- sh -c 'WRIT_POSTGRES="$$WRIT_TEST_POSTGRES" exec bin/writ demo'

.PHONY: dev
dev: build ## run Writ with an embedded OpenID provider
	@bin/writ dev

.PHONY: test
test: deps lint policy-test rules-test go-test vectors-test browser-test demo ## everything, from formatting to the end-to-end tests
	@go_passed=$$(cat dist/go-test.json dist/vectors-test.json dist/browser-test.json | grep -c '"Action":"pass".*"Test":'); \
	opa_passed=$$(sed -n 's/^PASS: \([0-9]*\)\/.*/\1/p' dist/opa-test.txt); \
	echo; echo "Passed: format, vet, lint, bundle, alert rules, demo, $$opa_passed policy tests and $$go_passed Go tests (subtests counted)."; \
	echo "$$((go_passed + opa_passed)) passed, 0 failed"

.PHONY: test-full
test-full: test fuzz postgres-test chaos ## the same and the long suites

.PHONY: deps
deps: ## install what the tests need and the machine lacks
	@missing=(); for c in curl node npm gcc chromium promtool; do command -v $$c >/dev/null || missing+=($$c); done; \
	python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv); \
	if (($${#missing[@]})); then \
	  command -v apt-get >/dev/null && [[ $$(id -u) == 0 ]] || { echo "please install: $${missing[*]}" >&2; exit 1; }; \
	  packages=("$${missing[@]/%node/nodejs}"); packages=("$${packages[@]/promtool/prometheus}"); \
	  apt-get update -qq; apt-get install -y -qq --no-install-recommends "$${packages[@]}" >/dev/null; \
	fi

.PHONY: lint
lint: ## gofmt, vet, golangci-lint (import direction included)
	@files=$$(gofmt -l cmd client internal bundles test); if [[ -n "$$files" ]]; then echo "gofmt these files: $$files" >&2; exit 1; fi
	go vet ./...
	$(TOOL) golangci-lint run

.PHONY: policy-test
policy-test: ## opa fmt, check and test; is the sample bundle current?
	@mkdir -p dist
	@files=$$($(OPA) fmt --list policies); if [[ -n "$$files" ]]; then echo "opa fmt these files: $$files" >&2; exit 1; fi
	$(OPA) check --strict --schema bundles/schemas policies
	$(OPA) check --strict --capabilities bundles/capabilities.json policies
	$(OPA) test policies | tee dist/opa-test.txt
	@$(OPA) test policies --coverage --threshold 95 >/dev/null
	@$(MAKE) --no-print-directory bundle
	@cmp dist/writ.tar.gz bundles/writ.tar.gz || { echo "bundles/writ.tar.gz is not what policies/ builds: run make sample" >&2; exit 1; }

.PHONY: rules-test
rules-test: ## the alert rules and the queries of the dashboard, by promtool
	promtool check rules docs/observability/alerts.yaml
	promtool test rules docs/observability/alerts_test.yaml
	@mkdir -p dist; node test/observability/dashboard-rules.mjs docs/observability/writ-dashboard.json > dist/dashboard-rules.json
	promtool check rules dist/dashboard-rules.json

.PHONY: go-test
go-test: ## go test -race on SQLite and a real PostgreSQL, end-to-end tests included
	@mkdir -p dist
	go run ./test/postgres/run -- $(TOOL) gotestsum --format pkgname-and-test-fails --jsonfile dist/go-test.json -- -race ./...

# Where fault tests are. They run one after the other, since many of them measure.
FAULT_TESTS = ./internal/minter ./internal/lease ./internal/decision ./internal/server ./test/crash

.PHONY: chaos
chaos: ## kill replicas and PostgreSQL under load, and the long forms of the fault tests (docs/reliability.md)
	WRIT_CHAOS=full go test -count=1 -timeout 50m -p 1 -run 'TestChaos|TestFault' -v $(FAULT_TESTS) | grep -vE '^=== |^ *--- PASS.*/'

# What speaks to PostgreSQL, on each version that Writ supports.
.PHONY: postgres-test
postgres-test: ## the tests of the store and of the postgres minter on PostgreSQL 16, 17 and 18
	@for v in 16 17 18; do echo "PostgreSQL $$v"; \
	  go run ./test/postgres/run -version $$v -- go test -count=1 -race ./internal/sqlstore ./internal/minter || exit 1; done

.PHONY: bench
bench: ## latency and throughput of /decide on both engines
	go test -run '^$$' -bench . -benchtime 3s ./test/bench

.PHONY: bench-leases
bench-leases: ## roles of a PostgreSQL target, minted and revoked through Writ, beside bare SQL
	WRIT_BENCH=full go test -count=1 -timeout 20m -run '^TestLeases$$' -v ./test/bench

.PHONY: browser-test
browser-test: ## the pages in a real Chromium
	@mkdir -p dist
	$(TOOL) gotestsum --format pkgname-and-test-fails --jsonfile dist/browser-test.json --raw-command -- go -C test/browser test -json ./...

.PHONY: vectors-test
vectors-test: ## Wycheproof's JSON web signatures
	@mkdir -p dist
	$(TOOL) gotestsum --format pkgname-and-test-fails --jsonfile dist/vectors-test.json --raw-command -- go -C test/vectors test -json ./...

FUZZTIME ?= 30s
.PHONY: fuzz
fuzz: ## each fuzz target for FUZZTIME
	@for pkg in $$(go list ./internal/...); do \
	  for f in $$(go test -list '^Fuzz' $$pkg | grep '^Fuzz' || true); do \
	    echo "fuzz $$pkg $$f"; go test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) $$pkg; done; done

.PHONY: bundle
bundle: ## dist/writ.tar.gz from policies/; the revision is a digest of the content
	@rm -rf dist/bundle && mkdir -p dist/bundle
	@cp -R policies/. dist/bundle
	@cp bundles/manifest.json dist/bundle/.manifest
	@cd dist/bundle && $(OPA) build -b . --capabilities ../../bundles/capabilities.json \
		--revision "$$(find . -type f | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -c1-12)" \
		-o ../writ.tar.gz
	@rm -rf dist/bundle

.PHONY: sample
sample: bundle ## make the embedded sample bundle anew
	cp dist/writ.tar.gz bundles/writ.tar.gz

.PHONY: clean
clean: ## remove what was built
	rm -rf bin dist .writ
