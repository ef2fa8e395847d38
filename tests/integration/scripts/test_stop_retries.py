"""`stop_retries.py`: loops end, with a worker in them and without one."""

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest

from app.celery_app import celery_app
from app.jobs import messages
from tests.integration.conftest import Jobs
from tests.integration.scripts.conftest import Ran, repeated
from tests.servers import Redis
from tests.waiting import until

pytestmark = pytest.mark.slow

Script = Callable[..., Ran]


def test_a_job_that_is_retried_in_postgresql_is_stopped(
    script: Script, jobs: Jobs, start: Callable[..., Any], foreign: object
) -> None:
    loop = jobs.start("flaky", {"failures": 25, "error": "transient"}, max_attempts=25)
    bystander = jobs.insert(run_at="2100-01-01")
    start("worker")
    jobs.until(loop, lambda row: row["attempt"] > 0 and row["status"] == "queued", "it waits for its retry")
    assert script("stop_retries", "--check", loop).code == 1
    assert script("stop_retries", "--check", bystander).code == 0
    assert script("stop_retries", loop, "--dry-run").code == 1
    ran = script("stop_retries", loop)
    assert ran.code == 0
    assert jobs.get(loop)["status"] == "cancelled"
    assert script("stop_retries", "--check", loop).code == 0
    assert script("stop_retries", loop).json["stopped"] is False  # a second time it is over already
    assert jobs.get(bystander)["status"] == "queued"


def test_a_job_that_still_runs_is_not_called_stopped(script: Script, jobs: Jobs, redis: Redis) -> None:
    lease = {"lease_expires_at": "2100-01-01", "heartbeat_at": "now()"}
    first, second = [
        jobs.insert(status="running", attempt=2, lease_token=uuid4(), worker="w", **lease) for _ in range(2)
    ]
    waits = jobs.insert(run_at="2100-01-01", attempt=2)
    ran = script("stop_retries", first, text=True)
    assert ran.code == 0
    assert "none of them is left" not in ran.out
    assert f"1 still runs until its next checkpoint and cannot succeed any more: {first}" in " ".join(ran.out.split())
    ran = script("stop_retries", "--all-retries", "--yes")
    assert (ran.code, ran.json["stopped"], ran.json["ending"]) == (0, [str(waits)], [str(second)])


def test_a_celery_loop_with_a_live_worker_is_stopped(script: Script, redis: Redis, looping: Callable[..., Any]) -> None:
    process = looping()
    quick = celery_app.send_task("retry_for_ever", [0.2], queue="default")
    slow = celery_app.send_task("retry_for_ever", [600], queue="default")
    until(lambda: script("stop_retries", "--check", slow.id).json.get("scheduled"), "the worker holds the slow one")
    assert "job" not in script("stop_retries", "--check", slow.id, text=True).out  # it speaks of none
    for task in (quick, slow):
        ran = script("stop_retries", task.id)
        assert ran.code == 0, ran
        assert script("task_manager", "status", task.id, text=True).code in (0, 2)
    # Not even a worker that knows nothing of the revoke would get them.
    assert redis.client.hlen("unacked") == redis.length("default") == 0
    process.kill()
    looping()
    assert script("stop_retries", "--all-retries", "--dry-run").code == 0


def test_a_celery_loop_without_a_worker_is_stopped(
    script: Script, redis: Redis, looping: Callable[..., Any], foreign: object
) -> None:
    process = looping()
    held = celery_app.send_task("retry_for_ever", [600], queue="default")
    until(lambda: script("stop_retries", "--check", held.id).json.get("scheduled"), "the worker holds it")
    process.kill()
    waiting = celery_app.send_task("retry_for_ever", [1], queue="low_priority", priority=6, countdown=1)
    ran = script("stop_retries", "--check", held.id)
    assert ran.code == 1
    assert ran.json["unacked"]
    ran = script("stop_retries", held.id)
    assert ran.code == 0, ran
    assert ran.json["stopped"] == [held.id]
    assert script("stop_retries", waiting.id).code == 0
    assert redis.client.hlen("unacked") == 0
    assert not redis.client.exists("low_priority\x06\x166")


def test_all_retries_are_stopped_and_nothing_else(script: Script, jobs: Jobs, redis: Redis) -> None:
    retried = [jobs.insert(run_at="2100-01-01", attempt=2, error='{"type": "T", "message": "m"}') for _ in range(30)]
    fresh = jobs.insert()
    running = jobs.insert(
        status="running", attempt=1, lease_token=uuid4(), lease_expires_at="2100-01-01", heartbeat_at="now()"
    )
    task = celery_app.send_task("retry_for_ever", [600], queue="default", countdown=600)
    plain = celery_app.send_task("nap", [1], queue="default")
    ran = script("stop_retries", "--all-retries")
    assert ran.code == 2  # nobody can be asked
    assert "--yes" in ran.json["error"]
    assert set(script("stop_retries", "--all-retries", "--dry-run").json["would_stop"]) == {*map(str, retried), task.id}
    ran = script("stop_retries", "--all-retries", "--yes")
    assert ran.code == 0, ran
    assert {jobs.get(job_id)["status"] for job_id in retried} == {"cancelled"}
    assert jobs.get(fresh)["status"] == "queued"
    assert jobs.get(running)["cancel_requested_at"] is None
    assert script("task_manager", "status", plain.id).json["state"] == "PENDING"
    assert script("stop_retries", "--all-retries", "--dry-run").code == 0


def test_500_of_each_are_stopped_by_a_few_looks(
    script: Script, jobs: Jobs, redis: Redis, looping: Callable[..., Any], foreign: object
) -> None:
    retried = [jobs.insert(run_at="2100-01-01", attempt=2) for _ in range(500)]
    for number in range(250):
        celery_app.send_task("retry_for_ever", [600], queue="default", countdown=600)  # held by the worker
        # Celery takes any text for an id.
        task_id = str(uuid4()).upper() if number % 2 else f"report/2026 (März) #{number}"
        later = {"eta": "2100-01-01T00:00:00+00:00", "retries": 2}
        redis.client.lpush("low_priority", messages.envelope("nap", "low_priority", task_id, [], **later))
    looping(WORKER_QUEUES="default", WORKER_CONCURRENCY=1)
    until(lambda: redis.client.hlen("unacked") == 250, "the worker holds half of them")
    # One look takes more than a second with a worker in it: one for each would take minutes.
    ran = script("stop_retries", "--all-retries", "--yes", seconds=60)
    assert (ran.code, len(ran.json["stopped"]), ran.json["since"]) == (0, 1000, []), ran
    assert {jobs.get(job_id)["status"] for job_id in retried} == {"cancelled"}
    assert redis.client.hlen("unacked") == redis.length("low_priority") == 0
    repeated(lambda: script("stop_retries", "--all-retries", "--dry-run"), lambda ran: ran.code == 0, "none is left")


def test_what_celery_writes_in_capitals_is_stopped_too(
    script: Script, redis: Redis, looping: Callable[..., Any]
) -> None:
    task_id = str(uuid4()).upper()
    celery_app.send_task("retry_for_ever", [600], queue="default", countdown=600, task_id=task_id)
    looping()
    until(lambda: script("stop_retries", "--check", task_id).json.get("scheduled"), "the worker holds it")
    ran = script("stop_retries", task_id)
    assert (ran.code, ran.json["stopped"]) == (0, [task_id])
    assert redis.client.hlen("unacked") == 0
    until(lambda: script("task_manager", "status", task_id).json["state"] == "REVOKED", "the worker will drop it")


def test_one_of_three_is_asked_for(script: Script, db: object) -> None:
    for arguments in ([], ["abc", "--all-retries"], ["--check", "abc", "--all-retries"]):
        ran = script("stop_retries", *arguments, text=True)
        assert (ran.code, ran.err.count("\n")) == (2, 1)
