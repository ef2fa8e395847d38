"""`task_manager.py`: a task is found wherever it is, and ended for good."""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.rows import DictRow

from app.celery_app import celery_app
from app.jobs import messages
from app.queues import MAINTENANCE
from tests.integration.conftest import Jobs
from tests.integration.scripts.conftest import Ran, repeated
from tests.servers import Redis
from tests.waiting import until

pytestmark = pytest.mark.slow

Script = Callable[..., Ran]


def state(ran: Ran) -> tuple[str, int]:
    return ran.json["state"], ran.code


def test_a_job_is_found_in_its_place(script: Script, jobs: Jobs, redis: Redis) -> None:
    ours = jobs.insert()
    assert state(script("task_manager", "status", ours)) == ("waits for dispatch", 0)
    first, second = jobs.start(), jobs.start()
    ran = script("task_manager", "status", second)
    # Nobody consumes: that is what should be done something about.
    assert state(ran) == ("waits in its queue", 1)
    assert ran.json["waiting"][0]["position"] == 2
    assert "start_celery_worker.sh default" in ran.json["next"]
    assert script("task_manager", "status", first).json["waiting"][0]["position"] == 1
    later = jobs.insert(run_at="2100-01-01")
    assert state(script("task_manager", "status", later)) == ("waits for its time", 0)
    retried = jobs.insert(run_at="2100-01-01", attempt=2, error='{"type": "Timeout", "message": "no answer"}')
    ran = script("task_manager", "status", retried, text=True)
    assert ran.code == 0
    assert "waits for its retry" in ran.out
    assert "run 3 of 4; Timeout: no answer" in ran.out
    lost = jobs.insert(published_at="2020-01-01")
    ran = script("task_manager", "status", lost)
    assert state(ran) == ("lost", 1)
    assert "rebuild_queue.py default" in ran.json["next"]
    abandoned = jobs.insert(
        status="running",
        attempt=1,
        lease_token=uuid4(),
        lease_expires_at="2020-01-01",
        worker="w",
        heartbeat_at="now()",
    )
    assert state(script("task_manager", "status", abandoned)) == ("abandoned", 1)
    failed = jobs.insert(status="failed", attempt=4, error='{"type": "Bad", "message": "no"}', finished_at="now()")
    assert state(script("task_manager", "status", str(failed).upper())) == ("failed", 1)


def test_a_message_that_nobody_acknowledged_is_young_or_lost(script: Script, jobs: Jobs, redis: Redis) -> None:
    job_id = jobs.start()
    message: Any = redis.client.rpop("default")
    redis.client.hset("unacked", "tag", json.dumps([json.loads(message), "", "default"]))
    redis.client.zadd("unacked_index", {"tag": time.time()})
    assert state(script("task_manager", "status", job_id)) == ("taken", 0)
    redis.client.zadd("unacked_index", {"tag": time.time() - 100})
    assert state(script("task_manager", "status", job_id)) == ("lost", 1)


def test_a_running_job_is_found_and_ended(script: Script, jobs: Jobs, start: Callable[..., Any]) -> None:
    start("worker", WORKER_CONCURRENCY=1)
    job_id = jobs.start(payload={"seconds": 600, "steps": 1000})
    jobs.running(job_id)
    ran = repeated(lambda: script("task_manager", "status", job_id), lambda ran: ran.json["active"], "a worker has it")
    assert state(ran) == ("running", 0)
    [active] = ran.json["active"]
    assert active == jobs.get(job_id)["worker"]
    ran = script("task_manager", "info", job_id, text=True)
    assert "run 1 of 4" in ran.out
    assert "payload: steps 1000, seconds 600" in ran.out
    assert script("task_manager", "revoke", job_id, "--dry-run").code == 1
    assert jobs.get(job_id)["cancel_requested_at"] is None
    # Its message's id is the job's too.
    ran = script("task_manager", "revoke", f"{job_id}:abcd")
    assert ran.code == 0
    assert ran.json["state"] in ("being cancelled", "cancelled")
    assert jobs.finished(job_id)["status"] == "cancelled"
    assert script("task_manager", "revoke", job_id).code == 1


def test_scripts_are_in_the_statistics(script: Script, jobs: Jobs, db: psycopg.Connection[DictRow]) -> None:
    """What they create, run and end is counted like everybody's, or more would be over than ever began."""
    db.execute("TRUNCATE job_stats")
    assert script("run_job", "sleep", "--payload", '{"seconds": 0}').code == 0
    queued = jobs.insert()
    assert script("task_manager", "revoke", queued).json["state"] == "cancelled"
    counted = db.execute("SELECT status, jobs FROM job_stats ORDER BY status").fetchall()
    assert [(row["status"], row["jobs"]) for row in counted] == [("created", 1), ("succeeded", 1), ("withdrawn", 1)]


def test_pending_is_not_unknown(script: Script, redis: Redis, db: object) -> None:
    unknown = script("task_manager", "status", uuid4(), text=True)
    assert unknown.code == 2
    assert len(unknown.err.strip().splitlines()) == 1
    assert "Nobody knows" in unknown.err
    redis.client.lpush(MAINTENANCE, messages.envelope("nap", MAINTENANCE, "by-hand", []))
    ran = script("task_manager", "status", "by-hand")
    assert state(ran) == ("PENDING", 1)  # nobody consumes
    assert script("task_manager", "revoke", "by-hand").json["state"] == "gone"
    assert redis.length(MAINTENANCE) == 0
    # At another of Celery's priorities.
    redis.client.lpush("default\x06\x166", messages.envelope("nap", "default", "by-hand", []))
    assert state(script("task_manager", "status", "by-hand")) == ("PENDING", 1)


@pytest.mark.usefixtures("db")
def test_a_celery_task_is_found_in_workers(script: Script, redis: Redis, looping: Callable[..., Any]) -> None:
    looping(WORKER_CONCURRENCY=2)
    running = celery_app.send_task("nap", [600], queue="default")
    later = celery_app.send_task("nap", [600], queue="default", countdown=600)
    until(lambda: script("task_manager", "status", running.id).json["state"] == "STARTED", "it runs")
    ran = repeated(
        lambda: script("task_manager", "status", later.id), lambda ran: ran.json.get("scheduled"), "the worker holds it"
    )
    assert state(ran) == ("PENDING", 0)
    eta = datetime.fromisoformat(ran.json["scheduled"][0]["eta"])
    assert timedelta() < eta - datetime.now(UTC) < timedelta(seconds=601)
    for task in (running, later):
        ran = script("task_manager", "revoke", task.id)
        assert ran.code == 0
    until(lambda: redis.client.hlen("unacked") == 0, "nothing would come back")
    until(lambda: script("task_manager", "status", later.id).json["state"] == "REVOKED", "the worker will drop it")


def test_what_a_finished_task_left_is_taken_away(script: Script, jobs: Jobs, redis: Redis, foreign: object) -> None:
    job_id = jobs.start(queue="low_priority", priority="low")
    jobs.send(job_id, job_id)
    assert script("task_manager", "cleanup", job_id).code == 1  # it is not over
    assert script("task_manager", "revoke", job_id).json["state"] == "cancelled"
    assert script("task_manager", "cleanup", job_id, "--dry-run").json["would_remove"]["messages"] == 3
    assert redis.length("low_priority") == 3
    assert script("task_manager", "cleanup", job_id).json["removed"]["messages"] == 3
    assert redis.length("low_priority") == 0
    redis.client.set("celery-task-meta-abc", '{"status": "SUCCESS", "result": 1}')
    assert state(script("task_manager", "status", "abc")) == ("SUCCESS", 0)
    assert script("task_manager", "cleanup", "abc", "--yes").json["removed"]["results"] == 1


def test_what_has_not_run_yet_is_not_taken_away(script: Script, db: object, redis: Redis) -> None:
    redis.client.lpush(MAINTENANCE, messages.envelope("nap", MAINTENANCE, "waits", []))
    # It waits for its time in a worker that does not answer.
    held = json.loads(messages.envelope("nap", "default", "held", [], eta="2100-01-01T00:00:00+00:00"))
    redis.client.hset("unacked", "tag", json.dumps([held, "", "default"]))
    redis.client.zadd("unacked_index", {"tag": time.time() - 100})
    redis.client.set("celery-task-meta-held", '{"status": "RETRY", "result": null}')
    for task_id in ("waits", "held"):
        for more in (["--yes"], ["--dry-run"]):
            ran = script("task_manager", "cleanup", task_id, *more)
            assert ran.code == 2
            assert f"task_manager.py revoke {task_id}" in ran.json["error"]
    assert (redis.length(MAINTENANCE), redis.client.hlen("unacked")) == (1, 1)
    redis.client.set("celery-task-meta-held", '{"status": "SUCCESS", "result": 1}')
    assert script("task_manager", "cleanup", "held").json["removed"] == {"messages": 0, "unacked": 1, "results": 1}
    # It speaks of a job whose row is gone: no worker would run it.
    gone = str(uuid4())
    redis.client.lpush("default", messages.envelope("run_job", "default", f"{gone}:1", [gone]))
    assert script("task_manager", "cleanup", gone).json["removed"]["messages"] == 1


@pytest.mark.parametrize("bad", ["", "a\nb", "x" * 300, "\x1b[2J"])
def test_a_bad_id_is_one_sentence(script: Script, bad: str) -> None:
    ran = script("task_manager", "status", bad, text=True)
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert "is not an id" in ran.err


@pytest.mark.parametrize("odd", ["a b", "../x", "*"])
def test_an_odd_id_may_be_one_of_celery_s(script: Script, redis: Redis, db: object, odd: str) -> None:
    ran = script("task_manager", "status", odd, text=True)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert f"Nobody knows {odd}:" in ran.err
    redis.client.lpush(MAINTENANCE, messages.envelope("nap", MAINTENANCE, odd, []))
    assert state(script("task_manager", "status", odd)) == ("PENDING", 1)
