"""What workers count: each end of each attempt, once, whoever saw it."""

import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg.rows import DictRow

from app import workers
from app.database import Database
from app.jobs import dispatch
from app.settings import Settings
from tests.integration.conftest import QUICK, Cancel, Jobs
from tests.processes import Process
from tests.servers import Redis
from tests.waiting import until
from worker.consumer import TOUCH_SECONDS
from worker.maintenance.cleanup_orphaned_jobs import count_rescued, rescue
from worker.runner import Runner

Db = psycopg.Connection[DictRow]
Counted = Callable[..., None]


@pytest.fixture
def counted(db: Db) -> Iterator[Counted]:
    """counted(succeeded=3, ...): waits until just that is in the table, by status; errors by their types."""
    db.execute("TRUNCATE job_stats")

    def seen() -> Counter[str]:
        rows = db.execute(
            "SELECT status, error, sum(jobs)::int AS jobs FROM job_stats GROUP BY status, error"
        ).fetchall()
        return Counter({row["error"] or row["status"]: row["jobs"] for row in rows})

    def expect(**wanted: int) -> None:
        try:
            until(lambda: seen() == Counter(wanted), "all is counted", seconds=20)
        except AssertionError as error:
            raise AssertionError(f"{error}: {wanted}, there is {dict(seen())}") from None

    yield expect
    db.execute("TRUNCATE job_stats")


# These start a worker of their own, so they come before the file's, which would take their jobs.


def test_a_worker_that_stops(start: Callable[..., Process], jobs: Jobs, counted: Counted) -> None:
    """Its children write down what they counted since their last heartbeat, and it what it gives back."""
    process = start("worker", JOB_HEARTBEAT_SECONDS=60, JOB_LEASE_SECONDS=200, SHUTDOWN_GRACE_SECONDS=12)
    jobs.finished(jobs.start("sleep", {"seconds": 0}))
    jobs.finished(jobs.start("sleep", {"seconds": 0}))
    jobs.running(jobs.start("sleep", {"seconds": 60, "steps": 1000}))
    process.terminate()
    assert process.wait(40) == 0, process.log
    counted(succeeded=2, **{"handed back": 1})


def test_signs_of_life(start: Callable[..., Process], redis: Redis, jobs: Jobs) -> None:
    name = f"worker@{socket.gethostname()}"
    ours = workers.member(name, ("default", "low_priority"))
    process = start("worker", WORKER_QUEUES="default,low_priority", **QUICK)
    until(lambda: redis.client.zscore(workers.KEY, ours), "the worker gives a sign")
    assert 0 < int(redis.client.ttl(workers.KEY)) <= workers.SHOWN_SECONDS  # type: ignore[arg-type]
    # Neither a full Redis nor one that lost its data stops it, and it comes back by itself.
    redis.client.config_set("maxmemory", 1)
    redis.client.delete(workers.KEY)
    time.sleep(1.1 * TOUCH_SECONDS)  # for a sign that is refused
    assert not redis.client.zscore(workers.KEY, ours)
    redis.client.config_set("maxmemory", 0)
    jobs.finished(jobs.start("sleep", {"seconds": 0}))
    until(lambda: redis.client.zscore(workers.KEY, ours), "it gives a sign again")
    signs = workers.signs(redis.client.eval(workers.LOOK, 1, workers.KEY))
    assert signs[name].seconds_ago < 20
    process.terminate()
    process.wait(20)
    assert not redis.client.zscore(workers.KEY, ours), "it has said good-bye"
    assert "redis_refuses" not in process.log


def test_ends_by_the_worker(worker: Process, jobs: Jobs, counted: Counted, cancel: Cancel, db: Db) -> None:
    finished = [jobs.start("sleep", {"seconds": 0}) for _ in range(3)]
    finished.append(jobs.start("flaky", {"failures": 1, "error": "permanent"}))
    finished.append(jobs.start("odd", {"do": "ValueError"}))
    retried = jobs.start("flaky", {"failures": 1, "error": "transient"})
    for job_id in finished:
        jobs.finished(job_id)
    jobs.until(retried, lambda row: row["status"] == "queued" and row["attempt"] == 1, "it waits for its retry")
    stopped = jobs.start("sleep", {"seconds": 60, "steps": 1000})
    jobs.running(stopped)
    cancel(stopped)
    jobs.finished(stopped)
    counted(succeeded=3, failed=2, retry=1, cancelled=1, PermanentError=1, ValueError=1, TransientError=1)
    rows = db.execute("SELECT * FROM job_stats WHERE status = 'cancelled'").fetchall()
    assert [(sum(row["run_buckets"]), sum(row["wait_buckets"]), row["queue"]) for row in rows] == [(1, 1, "default")]
    assert rows[0]["run_us"] > 0


def test_short_ones(worker: Process, jobs: Jobs, counted: Counted, redis: Redis, settings: Settings) -> None:
    ids = [jobs.insert("sleep", {"seconds": 0}, short=True) for _ in range(150)]
    dispatch.wake(redis.client, settings, ["default"])
    for job_id in ids:
        jobs.finished(job_id)
    counted(succeeded=150)


def test_a_dead_child(worker: Process, jobs: Jobs, counted: Counted) -> None:
    job_id = jobs.start("sleep", {"seconds": 60}, max_attempts=1)
    os.kill(jobs.running(job_id)["pid"], signal.SIGKILL)
    jobs.finished(job_id)
    counted(failed=1, WorkerLostError=1)


def test_one_that_must_be_stopped_with_its_child(worker: Process, jobs: Jobs, counted: Counted, cancel: Cancel) -> None:
    job_id = jobs.start("odd", {"do": "never look", "seconds": 60})
    jobs.running(job_id)
    cancel(job_id)
    jobs.finished(job_id)
    counted(cancelled=1)


def test_a_lease_that_ran_out(jobs: Jobs, counted: Counted, database: Database, quick: Settings) -> None:
    gone = {
        "status": "running",
        "lease_token": "00000000-0000-0000-0000-000000000000",
        "lease_expires_at": "2000-01-01",
    }
    jobs.insert(**gone, attempt=1)
    jobs.insert(**gone, attempt=4)
    jobs.insert(**gone, attempt=1, short=True)
    rows = until(lambda: rescue(database, quick, published=False), "PostgreSQL has run for long enough")
    count_rescued(rows, database)
    counted(retry=1, failed=1, LeaseLost=2, **{"handed back": 1})


def test_a_cancel_that_meets_a_hand_back(runner: Runner, jobs: Jobs, counted: Counted, cancel: Cancel) -> None:
    claim = runner.claim(jobs.insert("of a later release", {}))
    assert claim is not None
    cancel(claim.id)
    assert runner.run(claim) == "cancelled"
    runner.stats.flush(runner.database)
    counted(cancelled=1)


def test_a_runner_that_is_closed_leaves_nothing(runner: Runner, jobs: Jobs, counted: Counted) -> None:
    """Its heartbeat would open the connection again, for what is counted later."""
    claim = runner.claim(jobs.insert())
    assert claim is not None
    assert runner.run(claim) == "succeeded"
    runner.close()
    counted(succeeded=1)
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}
