"""`trigger_cleanup_manual.py`, `test_celery.py`, `cleanup_redis_manual.py`, `start_celery_worker.sh`."""

import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from app.queues import MAINTENANCE
from tests.integration.conftest import Jobs
from tests.integration.scripts.conftest import Ran, repeated
from tests.processes import ROOT
from tests.servers import Redis
from tests.waiting import until
from worker import maintenance

Script = Callable[..., Ran]


def expired_job(jobs: Jobs) -> Any:
    return jobs.insert(status="running", attempt=1, lease_token=uuid4(), lease_expires_at="2020-01-01", node="gone")


def test_a_task_runs_here(script: Script, jobs: Jobs, redis: Redis) -> None:
    job_id = expired_job(jobs)
    assert script("trigger_cleanup_manual", "cleanup_orphaned_jobs", "--dry-run").code == 1
    # Rescue waits a round of heartbeats after a start of PostgreSQL.
    until(lambda: script("trigger_cleanup_manual", "cleanup_orphaned_jobs").json["result"], "a job is rescued")
    assert jobs.get(job_id)["status"] == "queued"
    for module in maintenance.ALL:
        assert script("trigger_cleanup_manual", module.__name__.rpartition(".")[2]).code == 0


def test_a_task_runs_in_the_worker(script: Script, redis: Redis, start: Callable[..., Any]) -> None:
    ran = script("trigger_cleanup_manual", "health_check", "--enqueue")
    assert ran.code == 1
    assert "no worker that answers consumes maintenance" in ran.json["error"]
    assert redis.length(MAINTENANCE) == 0
    start("worker-maintenance")
    # Refused without a worker that answers, and then nothing is sent.
    ran = repeated(
        lambda: script("trigger_cleanup_manual", "health_check", "--enqueue"), lambda ran: ran.code == 0, "it runs"
    )
    assert ran.json["result"] == {"postgres": "ok", "redis": "ok"}
    assert not redis.client.keys("celery-task-meta-*")


def test_what_is_no_task_is_one_sentence(script: Script, db: object) -> None:
    ran = script("trigger_cleanup_manual", "clean_everything", text=True)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    ran = script("trigger_cleanup_manual", text=True)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "health_check" in ran.err


def test_a_terminal_gets_a_menu(redis: Redis, db: object) -> None:
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "scripts/trigger_cleanup_manual.py"], cwd=ROOT, stdin=inside, stdout=inside, stderr=inside
    )
    os.close(inside)
    seen = b""
    while b"Which one?" not in seen:
        seen += os.read(terminal, 4096)
    assert b"  cleanup_orphaned_jobs: Rescues jobs" in seen
    os.write(terminal, b"health_check\n")
    assert process.wait(30) == 0
    os.close(terminal)


def test_each_leg_is_timed(script: Script, redis: Redis, start: Callable[..., Any]) -> None:
    ran = script("test_celery")
    assert ran.code == 0
    assert list(ran.json["milliseconds"]) == ["connect to PostgreSQL", "connect to Redis", "run"]
    start("worker")  # which does not consume maintenance
    ran = script("test_celery", "--async")
    assert ran.code == 1
    assert "no worker that answers consumes maintenance" in ran.json["message"]
    assert redis.length(MAINTENANCE) == 0  # taken back
    ran = repeated(
        lambda: script("test_celery", "--async", "--queue", "default"), lambda ran: ran.code == 0, "it goes through"
    )
    assert {"send", "until a worker took it", "run, and its result"} < ran.json["milliseconds"].keys()
    assert not redis.client.keys("celery-task-meta-*")


def result(task_id: str, ended: datetime) -> str:
    return json.dumps({"task_id": task_id, "status": "SUCCESS", "result": 1, "date_done": ended.isoformat()})


def test_300_keys_without_ttl(script: Script, jobs: Jobs, redis: Redis, foreign: dict[bytes, bytes]) -> None:
    now = datetime.now(UTC)
    for number in range(300):
        task_id = str(uuid4())
        old = number < 100
        text = result(task_id, now - timedelta(days=2 if old else 0))
        redis.client.set(f"celery-task-meta-{task_id}", text)
    redis.client.set("celery-task-meta-kept", "{}", ex=50)
    # Left by a worker that died between the end of the job and its acknowledgement; and one that is still needed.
    over, running = jobs.insert(status="succeeded", finished_at="now()", result="{}"), expired_job(jobs)
    for tag, job_id in (("a", over), ("b", running)):
        jobs.send(job_id)
        message: Any = redis.client.rpop("default")
        redis.client.hset("unacked", tag, json.dumps([json.loads(message), "", "default"]))
        redis.client.zadd("unacked_index", {tag: time.time()})
    ran = script("cleanup_redis_manual", "--dry-run")
    assert ran.code == 1
    assert ran.json["would_clean"] == {"results_without_ttl": 300, "unacked_of_jobs_over": 1}
    assert ran.json["kinds"]["results"]["keys"] == 301
    assert ran.json["kinds"]["other"]["keys"] == len(foreign)
    assert script("cleanup_redis_manual").code == 2  # nobody can be asked
    ran = script("cleanup_redis_manual", "--yes")
    assert ran.code == 0, ran
    assert ran.json["done"]["deleted"] == 100
    assert ran.json["done"]["expired"] == 200
    assert ran.json["without_ttl"] == 0
    assert ran.json["memory_before"] > 0
    kept: Any = redis.client.ttl("celery-task-meta-kept")
    assert 0 < kept <= 50
    assert redis.client.hkeys("unacked") == redis.client.zrange("unacked_index", 0, -1) == [b"b"]
    assert script("cleanup_redis_manual", "--dry-run").code == 0


def test_a_worker_is_started_by_hand(jobs: Jobs, tmp_path: Path) -> None:
    job_id = jobs.start(queue="low_priority", priority="low")
    process = subprocess.Popen(
        ["scripts/start_celery_worker.sh", "low_priority", "default"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    try:
        assert jobs.finished(job_id)["status"] == "succeeded"
        process.terminate()  # reaches the worker itself
        assert process.wait(30) == 0
    finally:
        process.kill()


def test_a_queue_that_is_none_is_one_sentence(environment: Redis) -> None:
    command = ["scripts/start_celery_worker.sh", "defualt"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "WORKER_QUEUES may name default, high_priority, low_priority, maintenance" in done.stderr
    assert "Traceback" not in done.stderr
