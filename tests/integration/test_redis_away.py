"""Redis restarts without its data under a worker that nobody restarts."""

from collections.abc import Callable
from functools import partial

from app.database import Database
from app.jobs import messages
from app.jobs.dispatch import dispatch
from app.settings import Settings
from tests.integration.conftest import QUICK, Cancel, Jobs, log_lines
from tests.processes import Process
from tests.servers import Redis
from tests.waiting import until


def test_a_worker_goes_on_with_all_its_children(
    start: Callable[..., Process],
    jobs: Jobs,
    redis: Redis,
    database: Database,
    settings: Settings,
    cancel: Cancel,
) -> None:
    """Twice, with a job at work and a child to spare: the moment that Celery 5.7.0 does not survive, and after which
    5.6.3 gives the next message to the child that is at work (see `worker/pool.py`)."""
    worker = start("worker", **QUICK)

    def noticed(times: int) -> bool:
        return worker.log.count("redis_away") >= times

    long = jobs.start("sleep", {"seconds": 120, "steps": 1000})
    jobs.running(long)
    for times in (1, 2):
        waiting = jobs.insert()
        redis.stop()
        until(partial(noticed, times), "the worker has noticed")
        redis.start()
        dispatch(database, redis.client, settings)
        job = jobs.finished(waiting, seconds=20)
        assert (job["status"], job["attempt"]) == ("succeeded", 1)
        job = jobs.get(long)
        assert (job["status"], job["attempt"]) == ("running", 1)
    cancel(long)
    assert jobs.finished(long)["status"] == "cancelled"
    # Both children take jobs again.
    pair = [jobs.start("sleep", {"seconds": 120, "steps": 1000}) for _ in range(2)]
    for job_id in pair:
        jobs.running(job_id)
    cancel(*pair)
    for job_id in pair:
        jobs.finished(job_id)
    assert worker.process.poll() is None
    lines = log_lines(worker)
    assert not [line for line in lines if "exception" in line or line.get("logger") == "py.warnings"], worker.log
    assert [line["message"] for line in lines if line["message"].startswith("redis_")] == [
        "redis_lost",
        "redis_away",
        "redis_back",
    ] * 2
    assert "secret" not in worker.log


def test_hard_limits_outlast_it(start: Callable[..., Process], jobs: Jobs, redis: Redis) -> None:
    """Celery clears all its timers when the connection breaks, those of running jobs too."""
    start("odd", **QUICK)
    job_id = jobs.insert("odd", {"do": "never look", "seconds": 60}, max_attempts=1)
    redis.client.lpush(
        "default", messages.envelope("run_job", "default", f"{job_id}:1", [str(job_id)], timelimit=[4, None])
    )
    jobs.running(job_id)
    redis.stop()
    redis.start()
    job = jobs.finished(job_id, seconds=15)
    assert job["error"]["type"] == "TimeLimitExceeded"
    # Of 4: the limit counts from when the child has the message, `started_at` is the claim, which may take a while.
    assert (job["finished_at"] - job["started_at"]).total_seconds() > 2
