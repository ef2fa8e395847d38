"""A child that dies in the middle of a job: the parent moves exactly that claim, and the job runs again soon."""

import os
import signal

import psutil
import pytest

from app.celery_app import celery_app
from app.jobs import messages
from app.settings import Settings
from tests.integration.conftest import Cancel, Jobs, events, log_lines
from tests.processes import Process
from tests.servers import Redis
from tests.waiting import until

SLEEP = {"seconds": 120, "steps": 1000}


def test_a_killed_child(worker: Process, jobs: Jobs, cancel: Cancel) -> None:
    victim, neighbour = jobs.start("sleep", SLEEP), jobs.start("sleep", SLEEP)
    first, other = jobs.running(victim), jobs.running(neighbour)
    os.kill(first["pid"], signal.SIGKILL)
    second = jobs.running(victim, attempt=2)
    assert second["pid"] not in (first["pid"], other["pid"])
    assert second["lease_token"] != first["lease_token"]
    [attempt] = jobs.attempts(victim)
    assert (attempt["attempt"], attempt["worker"]) == (1, first["worker"])
    assert attempt["error"]["type"] == "WorkerLostError"
    assert attempt["error"]["message"] == "the worker process died: signal 9 (SIGKILL) (out of memory?)"
    assert jobs.get(neighbour)["attempt"] == 1
    cancel(victim, neighbour)
    assert [jobs.finished(job_id)["status"] for job_id in (victim, neighbour)] == ["cancelled"] * 2
    assert len([line for line in events(worker, "child_ended") if line["job_id"] == str(victim)]) == 1
    assert not [line for line in log_lines(worker) if "exception" in line], worker.log


def test_a_poisonous_job_stops_and_the_others_go_on(worker: Process, jobs: Jobs) -> None:
    poison = jobs.start("flaky", {"failures": 9, "error": "crash"}, max_attempts=3)
    neighbours = [jobs.start("sleep", {"seconds": 0.5}) for _ in range(4)]
    job = jobs.finished(poison)
    assert (job["status"], job["attempt"], job["lease_expires_at"]) == ("failed", 3, None)
    assert job["error"]["message"] == "the worker process died: signal 11 (SIGSEGV)"
    assert [attempt["attempt"] for attempt in jobs.attempts(poison)] == [1, 2, 3]
    for neighbour in neighbours:
        job = jobs.finished(neighbour)
        assert (job["status"], job["attempt"]) == ("succeeded", 1)


def test_its_job_goes_ahead_of_all_that_waits(worker: Process, jobs: Jobs, cancel: Cancel) -> None:
    victim, neighbour = jobs.start("sleep", SLEEP), jobs.start("sleep", SLEEP)
    first = jobs.running(victim)
    jobs.running(neighbour)
    backlog = [jobs.start("sleep", {"seconds": 1}) for _ in range(10)]
    os.kill(first["pid"], signal.SIGKILL)
    again = jobs.running(victim, attempt=2)
    assert [
        job for job in map(jobs.get, backlog) if job["started_at"] and job["started_at"] < again["started_at"]
    ] == []
    cancel(victim, neighbour, *backlog)
    jobs.finished(victim)
    jobs.finished(neighbour)


def test_a_death_is_noticed_at_once(worker: Process, jobs: Jobs) -> None:
    """Celery alone notices every other one after five seconds: see `worker/pool.py`."""
    took = []
    for _ in range(6):
        job_id = jobs.start("flaky", {"failures": 1, "error": "exit"}, max_attempts=1)
        job = jobs.finished(job_id)
        took.append((job["finished_at"] - job["started_at"]).total_seconds())
    assert sorted(took)[-2] < 4, took  # on a busy machine one may be late


@pytest.mark.parametrize(("max_attempts", "status"), [(2, "running"), (1, "failed")])
def test_the_hard_limit(
    max_attempts: int,
    status: str,
    worker: Process,
    jobs: Jobs,
    redis: Redis,
    settings: Settings,
    cancel: Cancel,
) -> None:
    job_id = jobs.insert("odd", {"do": "never look", "seconds": 60}, max_attempts=max_attempts)
    message = messages.envelope("run_job", "default", f"{job_id}:1", [str(job_id)], timelimit=[4, None])
    redis.client.lpush("default", message)
    first = jobs.running(job_id)
    job = jobs.until(job_id, lambda row: row["attempt"] == max_attempts and row["status"] == status, status)
    until(lambda: not psutil.pid_exists(first["pid"]), "its process is gone")
    [attempt] = jobs.attempts(job_id)
    assert attempt["error"] == {
        "type": "TimeLimitExceeded",
        "message": "the job took longer than its hard time limit of 4 s",
    }
    assert job["error"] == attempt["error"]
    cancel(job_id)
    jobs.finished(job_id)


def test_terminated_from_outside(worker: Process, jobs: Jobs, cancel: Cancel) -> None:
    """Flower's button, or `celery control`: for the job it is a crash."""
    job_id = jobs.start("sleep", SLEEP)
    jobs.running(job_id)
    # Not from the pool, whose connections are older than the server if a test restarted it.
    with celery_app.connection_for_write() as connection:
        inspect = celery_app.control.inspect(timeout=2, connection=connection)

        def active() -> str | None:
            tasks = [task["id"] for worker in (inspect.active() or {}).values() for task in worker]
            return next((task_id for task_id in tasks if task_id.startswith(str(job_id))), None)

        task_id = until(active, "the worker says what it does")
        celery_app.control.revoke(task_id, terminate=True, connection=connection)
    jobs.running(job_id, attempt=2)
    assert [attempt["error"]["type"] for attempt in jobs.attempts(job_id)] == ["Terminated"]
    cancel(job_id)
    assert jobs.finished(job_id)["status"] == "cancelled"
