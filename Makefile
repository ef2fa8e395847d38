# `make` alone prints what there is. GNU make 3.81 (macOS) and any /bin/sh will do.
#
# Every variable can be given on the command line (make up API_PORT=8001) or in the environment (API_PORT=8001 make up).

# Any Python from 3.9 starts the stack in containers; without containers it takes 3.11 to 3.14.
PYTHON ?= python3
STACK = $(PYTHON) -m scripts.stack
BIN = .venv/bin

.DEFAULT_GOAL := help
# A recipe that fails half-way must not leave a target that looks made.
.DELETE_ON_ERROR:

##@ The stack (MODE=compose or native; without it Docker Compose where it answers, else processes of this machine)

.PHONY: up
up: ## start everything, wait until it is healthy, run a first job, print the addresses
	@$(STACK) up

.PHONY: down
down: ## stop everything; data stays
	@$(STACK) down

.PHONY: ps
ps: ## each process, its state and its health
	@$(STACK) ps

.PHONY: logs
logs: ## follow the logs (SERVICE=worker for one), or JOB=id: what became of it, through all services
	@$(STACK) logs

.PHONY: monitoring
monitoring: ## Prometheus with alerts, and Grafana, beside the running stack (Docker; docs/monitoring.md)
	@docker compose --profile monitoring up --detach --wait prometheus grafana redis-exporter postgres-exporter \
	  node-exporter blackbox-exporter
	@echo "Prometheus http://127.0.0.1:$${PROMETHEUS_PORT:-9090}   Grafana http://127.0.0.1:$${GRAFANA_PORT:-3000} (admin, GRAFANA_PASSWORD in .env)"

.PHONY: demo
demo: ## send real files of each kind, with progress and results in the terminal
	@$(STACK) demo

.PHONY: run
run: ## run a script where the stack is: make run SCRIPT="task_manager.py status ID"
	@$(STACK) run

.PHONY: clean
clean: ## stop everything and delete its data (asks; YES=1 does not)
	@$(STACK) clean

##@ On a public host (docs/production.md)

.PHONY: production
production: ## build and start it with TLS in front and two API replicas: DOMAIN=jobs.example.org, the first time
	@$(PYTHON) -c 'from scripts.stack import environment; environment.make()'
	@# First a newline: the file may end without one.
	@grep -q '^COMPOSE_FILE=' .env || printf '\nCOMPOSE_FILE=%s\nDOMAIN=%s\n' docker-compose.yml:docker-compose.prod.yml \
	  "$${DOMAIN:?by which name is this host called? make production DOMAIN=jobs.example.org}" >>.env
	@# What is given for this once would be forgotten by the next docker compose.
	@grep -q '^COMPOSE_FILE=.*docker-compose.prod.yml' .env && grep -qx "DOMAIN=$${DOMAIN:-..*}" .env || \
	  { echo 'COMPOSE_FILE or DOMAIN in .env says something else: write there what you want.'; exit 1; }
	@docker compose up --build --detach --wait --wait-timeout 240 caddy worker worker-maintenance beat flower
	@sed -n 's|^DOMAIN=|It runs: https://|p' .env

.PHONY: roll
roll: ## replace every service by this checkout's, without a failed request or a lost job (ARGS="api worker" for some)
	@scripts/roll.sh $(ARGS)

.PHONY: backup
backup: ## copy PostgreSQL and files while it runs, to backups/TIME (ARGS=/elsewhere/name)
	@scripts/backup.sh $(if $(ARGS),"$(ARGS)")

.PHONY: restore
restore: ## put a backup into a stack that has no data yet: FROM=backups/TIME
	@scripts/restore.sh "$(FROM)"

##@ The bad night (all of them: scripts/README.md; ARGS="--yes" is passed on)

.PHONY: doctor
doctor: ## everything at a glance, with the command that helps; fit for a bug report (ARGS=--watch stays)
	@SCRIPT="doctor.py $(ARGS)" $(STACK) run

.PHONY: task
task: ## where a job or a Celery task is, what that means, its end: ARGS="status ID" (info, revoke, cleanup)
	@SCRIPT="task_manager.py $(ARGS)" $(STACK) run

.PHONY: stop-retries
stop-retries: ## end what comes again and again: ARGS="ID", "--check ID" or "--all-retries"
	@SCRIPT="stop_retries.py $(ARGS)" $(STACK) run

.PHONY: debug-beat
debug-beat: ## does the house-keeping happen, and if not, why not
	@SCRIPT="debug_beat_service.py $(ARGS)" $(STACK) run

.PHONY: housekeeping
housekeeping: ## run a task of the house-keeping now (a menu, or ARGS="cleanup_orphaned_jobs --enqueue")
	@SCRIPT="trigger_cleanup_manual.py $(ARGS)" $(STACK) run

.PHONY: test-celery
test-celery: ## a task through Redis and a worker, with the time of each leg
	@SCRIPT="test_celery.py --async $(ARGS)" $(STACK) run

.PHONY: rebuild-queue
rebuild-queue: ## the queues in Redis anew from PostgreSQL, now
	@SCRIPT="rebuild_queue.py $(ARGS)" $(STACK) run

.PHONY: purge-queue
purge-queue: ## throw a queue's messages away (asks; jobs come back): ARGS="low_priority --dry-run"
	@SCRIPT="purge_celery_queue.py $(ARGS)" $(STACK) run

.PHONY: purge-copies
purge-copies: ## leave one message a job in the queues, the oldest (asks)
	@SCRIPT="purge_celery_duplicates.py $(ARGS)" $(STACK) run

.PHONY: cleanup-redis
cleanup-redis: ## what fills Redis, by kind of key, and its clean-up (asks)
	@SCRIPT="cleanup_redis_manual.py $(ARGS)" $(STACK) run

##@ The database's schema

.PHONY: migrate
migrate: ## bring the running stack's database to this code's schema (make up does it too)
	@$(STACK) migrate

.PHONY: revision
revision: dev ## write a migration from what changed in app/tables.py: MESSAGE="add a column"
	@test -n "$$MESSAGE" || { echo 'What changes? make revision MESSAGE="add a column"'; exit 1; }
	@$(STACK) scratch sh -c 'alembic upgrade head && alembic revision --autogenerate --message "$$MESSAGE"'

##@ Checks (neither Docker nor a running stack is needed, but for e2e)

.PHONY: test
test: dev ## unit and integration tests on their own PostgreSQL and Redis (ARGS="-k name")
	@$(BIN)/python -m pytest -n $(TEST_PROCESSES) $(ARGS)
TEST_PROCESSES = 4

.PHONY: lint
lint: dev ## ruff, mypy, hadolint, zizmor, shellcheck, and whether the migrations make the tables in the code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint dockerfiles/Dockerfile.*
	$(BIN)/zizmor --offline --quiet .github
	@# There is no shellcheck for Linux/ARM on PyPI.
	@if test -x $(BIN)/shellcheck; then echo $(BIN)/shellcheck $(SHELL_SCRIPTS); $(BIN)/shellcheck $(SHELL_SCRIPTS); fi
	$(STACK) scratch sh -c 'python -m app.migrate && python -m app.migrate --check'
SHELL_SCRIPTS = $(wildcard requirements/*.sh scripts/*.sh ansible/*.sh)

.PHONY: native-test
native-test: dev ## this very `make up`, without containers, in a copy: start, restart, kill, stop (3 minutes)
	@$(BIN)/python -m pytest tests/native $(ARGS)

.PHONY: e2e
e2e: dev ## build the images and drive the compose stack from outside (needs Docker)
	@$(BIN)/python -m pytest tests/e2e $(ARGS)

.PHONY: railway-check
railway-check: dev ## docs/railway.md as far as it takes no account: images, five services without IPv4, a failed release (needs Docker; COLD=1)
	@$(BIN)/python -m pytest tests/unit/test_railway.py tests/railway $(ARGS)

.PHONY: production-test
production-test: dev ## a public host in containers: front, replacing everything under load, backup, restore (needs Docker)
	@$(BIN)/python -m pytest tests/production $(ARGS)

.PHONY: browser
browser: dev ## the dashboard in a headless Chromium, which is installed if there is none (2 minutes)
	@$(BIN)/python -m pytest tests/browser $(ARGS)

.PHONY: promises
promises: dev ## break each promise by one line, in a copy, and see its test fail (5 minutes)
	@$(BIN)/python -m pytest tests/promises -n 2 --dist=load $(ARGS)

.PHONY: chaos
chaos: dev ## break the compose stack in every way and count what is lost: SCENARIO=name,name | ci | soak (docs/chaos.md)
	@$(BIN)/python -m pytest tests/chaos -v $(ARGS)

.PHONY: runbooks
runbooks: dev ## do what docs/runbooks/ says, on a stack in that state (needs Docker): ARGS="-k disk-full" for one
	@$(BIN)/python -m pytest tests/runbooks $(ARGS)

.PHONY: monitoring-test
monitoring-test: dev ## alerts by promtool, each dashboard query and some alerts on a broken stack (needs Docker; 8 minutes)
	@$(BIN)/python -m pytest tests/monitoring $(ARGS)

.PHONY: bench
bench: dev ## beside plain Celery and a hand-written template: ARGS="--rounds 1 --only drain,posts" | --large | --idle (docs/benchmarks.md)
	@$(BIN)/python -m benchmarks $(ARGS)

##@ Dependencies

.PHONY: dev
dev: ## .venv with all that tests and linters need, as locked
	@$(STACK) install dev

.PHONY: lock
lock: dev ## write requirements/*.txt from the .in files (UPGRADE=--upgrade takes newer releases)
	@UV=$(CURDIR)/$(BIN)/uv requirements/lock.sh $(UPGRADE)

.PHONY: help
help: ## this
	@awk 'BEGIN {FS = ":.*## "} \
	  /^##@ / {printf "\n%s\n", substr($$0, 5)} \
	  /^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
