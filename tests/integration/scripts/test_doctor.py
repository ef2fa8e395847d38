"""`doctor.py` and `debug_beat_service.py`: what is wrong is named, with what helps."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.rows import DictRow

from app.celery_app import celery_app
from app.database import Database
from app.jobs import messages
from app.queues import MAINTENANCE
from scripts.broker import NEAR, Broker
from tests.integration.conftest import Jobs
from tests.integration.scripts.conftest import Ran, repeated
from tests.processes import ROOT, Process
from tests.servers import Redis
from tests.waiting import until

pytestmark = pytest.mark.slow

Script = Callable[..., Ran]
Start = Callable[..., Process]


@pytest.fixture(autouse=True)
def _no_ticks(db: psycopg.Connection[DictRow]) -> None:
    db.execute("TRUNCATE schedule_ticks")


def found(ran: Ran, level: str) -> dict[str, str]:
    return {one["check"]: one["message"] for one in ran.json["findings"] if one["level"] == level}


def diagnosis(script: Script) -> str:
    return str(script("debug_beat_service").json["diagnosis"])


def doing(ran: Ran) -> bool:
    """Whether a worker says that it runs a job."""
    return any("run_job" in one["message"] for one in ran.json["findings"] if one["check"] == "workers")


def test_a_healthy_stack(script: Script, jobs: Jobs, start: Start) -> None:
    for name in ("worker", "worker-maintenance", "beat"):
        start(name)
    jobs.start(payload={"seconds": 600})
    until(lambda: diagnosis(script) == "fine", "beat and maintenance have begun", seconds=60)
    ran = repeated(lambda: script("debug_beat_service", text=True), lambda ran: ran.code == 0, "all is fine")
    assert "enqueue_pending_jobs" in ran.out
    ran = repeated(lambda: script("doctor"), lambda ran: ran.code == 0 and doing(ran), "it sees the worker run the job")
    assert (ran.json["ok"], found(ran, "problem")) == (True, {}), ran
    checks = {one["check"] for one in ran.json["findings"]}
    wanted = {"settings", "versions", "postgres", "migrations", "redis", "keys", "clocks", "queues", "workers"}
    assert checks >= wanted | {"leases", "drift", "unacked", "beat", "storage", "disk"}
    assert all(one.keys() == {"check", "level", "message", "fix"} for one in ran.json["findings"])
    assert all(one["fix"] for one in ran.json["findings"] if one["level"] != "ok")
    ran = repeated(lambda: script("doctor", text=True), lambda ran: ran.code == 0, "all is well")
    assert "0 problems" in ran.out


def test_beat_stopped(script: Script, start: Start) -> None:
    beat = start("beat")
    start("worker-maintenance")
    until(lambda: diagnosis(script) == "fine", "beat and maintenance have begun", seconds=60)
    beat.kill()
    until(lambda: diagnosis(script) == "beat not running", "it is noticed", seconds=60)
    ran = script("debug_beat_service")
    assert ran.code == 1
    assert "docker compose up -d beat" in ran.json["fix"]
    assert "beat not running" in found(script("doctor"), "problem")["beat"]


def test_maintenance_is_not_consumed(script: Script, start: Start) -> None:
    start("beat")
    start("worker")  # of the job queues
    until(lambda: diagnosis(script) == "queue not consumed", "it is noticed", seconds=60)
    ran = script("debug_beat_service")
    assert ran.code == 1
    assert "worker-maintenance" in ran.json["fix"]
    assert "No worker that answers consumes maintenance" in ran.json["message"]

    def not_consumed(ran: Ran) -> set[str]:
        queues = [one for one in ran.json["findings"] if one["check"] == "queues" and one["level"] == "problem"]
        return {one["message"].partition(":")[0] for one in queues}

    ran = repeated(lambda: script("doctor"), lambda ran: not_consumed(ran) == {MAINTENANCE}, "one is not consumed")
    assert ran.code == 1


def test_beat_connected_and_silent(script: Script, database: Database, settings: Any, start: Start) -> None:
    start("worker-maintenance")
    frozen = Database(settings, "beat")  # a beat that hangs
    frozen.run("SELECT 1")
    assert diagnosis(script) == "beat not scheduling"
    frozen.close()
    assert diagnosis(script) == "beat not running"


def test_a_task_that_fails(script: Script, db: psycopg.Connection[DictRow], start: Start) -> None:
    start("beat")
    start("worker-maintenance")
    until(lambda: diagnosis(script) == "fine", "beat and maintenance have begun", seconds=60)
    # The fence of no job: what deletes jobs meets a table that it cannot read.
    db.execute("ALTER TABLE job_attempts RENAME TO hidden")
    try:
        db.execute(
            "UPDATE schedule_ticks SET finished_at = NULL, started_at = NULL, sent_at = NULL "
            "WHERE entry = 'database_maintenance'"
        )

        def is_seen() -> bool:
            ran = script("debug_beat_service")
            return ran.json["diagnosis"] == "tasks failing" and "database_maintenance" in ran.json["message"]

        until(is_seen, "the failure is seen", seconds=60)
    finally:
        db.execute("ALTER TABLE hidden RENAME TO job_attempts")


def test_what_is_wrong_is_found(script: Script, db: psycopg.Connection[DictRow], jobs: Jobs, redis: Redis) -> None:
    jobs.insert(published_at="2020-01-01", run_at="2020-01-01")  # its message is lost
    jobs.insert(status="running", attempt=1, lease_token=uuid4(), lease_expires_at="2020-01-01")
    for _ in range(5):
        task_id = str(uuid4())
        redis.client.set(f"celery-task-meta-{task_id}", json.dumps({"task_id": task_id, "status": "SUCCESS"}))
    redis.client.set("celery-task-meta-theirs", "{}")
    redis.client.hset("unacked", "tag", json.dumps([{"headers": {"id": "x", "task": "t"}}, "", "default"]))
    redis.client.zadd("unacked_index", {"tag": time.time() - 100})
    redis.client.config_set("maxmemory", "100mb")
    redis.client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        ran = script("doctor")
    finally:
        redis.client.config_set("maxmemory-policy", "noeviction")
        redis.client.config_set("maxmemory", "0")
    assert ran.code == 1
    problems, warnings = found(ran, "problem"), found(ran, "warning")
    assert problems.keys() >= {"redis", "leases", "queues", "workers", "beat"}
    assert warnings.keys() >= {"drift", "keys", "unacked"}
    assert "5 results" in warnings["keys"]
    assert "allkeys-lru" in problems["redis"]
    db.execute("ALTER TABLE alembic_version RENAME TO hidden")
    try:
        assert "migrations" in found(script("doctor"), "problem")
    finally:
        db.execute("ALTER TABLE hidden RENAME TO alembic_version")


def test_a_storage_folder_is_not_made(script: Script, db: object, tmp_path: Path) -> None:
    typo = tmp_path / "fiels"
    problems = found(script("doctor", STORAGE_URL=typo.as_uri()), "problem")
    assert "is no folder that is there" in problems["storage"]
    assert not typo.exists()


@pytest.mark.parametrize("redis_url", ["", "redis://127.0.0.1:1/0"])
def test_inline_needs_neither_redis_nor_workers(script: Script, jobs: Jobs, tmp_path: Path, redis_url: str) -> None:
    jobs.insert(run_at="2020-01-01")
    env = {"JOBS_EXECUTION": "inline", "REDIS_URL": redis_url, "STORAGE_URL": tmp_path.as_uri()}
    ran = script("doctor", **env)
    assert (ran.code, found(ran, "problem")) == (0, {}), ran
    assert found(ran, "warning").keys() <= {"postgres", "disk"}, "the tests' server, this machine's disk"
    checks = {one["check"] for one in ran.json["findings"]}
    assert checks >= {"settings", "postgres", "migrations", "leases", "storage"}
    assert not checks & {"redis", "queues", "workers", "drift", "beat"}
    # Who needs it says so.
    ran = script("purge_celery_queue", "--dry-run", **env)
    assert ran.code == 2
    assert "Redis" in ran.json["error"]


def test_a_queue_of_any_length(script: Script, jobs: Jobs, redis: Redis) -> None:
    jobs.insert(queue="low_priority", published_at="2020-01-01", run_at="2020-01-01")  # its message is lost
    message = messages.envelope("run_job", "default", "x:1", [str(uuid4())])
    fill = "for i = 1, 60000 do redis.call('lpush', KEYS[1], ARGV[1]) end"
    redis.client.eval(fill, 1, "default", message)
    ran = script("doctor")
    drift = [one["message"] for one in ran.json["findings"] if one["check"] == "drift"]
    assert len(drift) == 2, ran
    assert "default: too many messages (60,000)" in drift[0]
    assert "1 job of low_priority should have a message" in drift[1], "the others are looked at"
    assert "drift" not in found(ran, "problem")


def test_wake_ups_are_looked_for_at_the_ends(redis: Redis) -> None:
    broker = Broker(redis.client, celery_app)
    wake_up = messages.envelope(messages.RUN_SHORT_JOBS, "default", "short:default:1", [])
    others = ["not JSON"] * (2 * NEAR)
    redis.client.lpush("default", *others, wake_up, *others)
    assert not broker.has_wake_up("default")
    for push, pop in ((redis.client.lpush, redis.client.lpop), (redis.client.rpush, redis.client.rpop)):
        push("default", wake_up)
        assert broker.has_wake_up("default")
        pop("default")


def test_watching_goes_on(environment: Redis, db: object) -> None:
    command = [sys.executable, "scripts/doctor.py", "--watch", "--json"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for _ in range(2):
            assert json.loads(process.stdout.readline())["findings"]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
