"""PostgreSQL stops and comes back under running jobs: they end where they run, and nothing runs twice."""

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from app.database import Database
from app.jobs import dispatch
from app.settings import Settings
from tests.integration.conftest import QUICK, Jobs, events, log_lines
from tests.processes import Process
from tests.servers import Postgres, Redis
from tests.waiting import until
from worker.maintenance.cleanup_orphaned_jobs import rescue
from worker.runner import Runner


@pytest.fixture
def away(postgres: Postgres, database: Database) -> Iterator[Postgres]:
    """The server, running again at the end whatever happens."""
    yield postgres
    try:
        database.run("SELECT 1")
    except Exception:  # noqa: BLE001
        postgres.start()


def test_a_restart(
    start: Callable[..., Process], jobs: Jobs, away: Postgres, quick: Settings, database: Database
) -> None:
    worker = start("worker", WORKER_CONCURRENCY=3, **QUICK)
    long = jobs.start("sleep", {"seconds": 12, "steps": 100})
    ends_meanwhile = jobs.start("sleep", {"seconds": 4, "steps": 10})
    for job_id in (long, ends_meanwhile):
        jobs.running(job_id)
    waiting = jobs.insert()
    row = jobs.get(waiting)
    away.stop()
    jobs.send_rows(row)
    time.sleep(QUICK["JOB_LEASE_SECONDS"] + 0.5)  # all leases have run out
    away.start()
    assert rescue(database, quick, published=True) == []

    for job_id in (waiting, ends_meanwhile, long):
        job = jobs.finished(job_id)
        assert (job["status"], job["attempt"]) == ("succeeded", 1)
        assert jobs.attempts(job_id) == []
    assert rescue(database, quick, published=True) == []
    # A line for the outage and one for its end, from each child that was at work (one that ends its job first may have
    # nothing to renew by then); no traceback.
    assert 1 <= len(events(worker, "heartbeats_work_again")) <= len(events(worker, "heartbeats_fail")) <= 2
    assert not [line for line in log_lines(worker) if "exception" in line], worker.log


def test_a_claim_has_patience_but_does_not_keep_the_message(jobs: Jobs, away: Postgres, runner: Runner) -> None:
    job_id = jobs.insert(published_at="now()")
    away.stop()
    assert runner.wait_and_claim(job_id, patience=0.1) is None
    away.start()
    assert runner.wait_and_claim(job_id, patience=0.1) is not None


def test_a_child_that_dies_meanwhile(
    start: Callable[..., Process],
    jobs: Jobs,
    redis: Redis,
    away: Postgres,
    quick: Settings,
    database: Database,
) -> None:
    """Nobody can write that down: its lease runs out."""
    worker = start("worker", **QUICK)
    job_id = jobs.start("sleep", {"seconds": 5, "steps": 10})
    pid = jobs.running(job_id)["pid"]
    away.stop()
    os.kill(pid, signal.SIGKILL)
    until(lambda: events(worker, "release_failed"), "the parent has tried")
    away.start()
    until(lambda: rescue(database, quick, published=False), "the lease has run out", seconds=20)
    # The other child may still hold the message that was given back, and claim the job before another is sent.
    dispatch.dispatch(database, redis.client, quick)
    job = jobs.finished(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    assert not [line for line in log_lines(worker) if "exception" in line], worker.log


def test_a_worker_that_is_told_to_stop_meanwhile(start: Callable[..., Process], jobs: Jobs, away: Postgres) -> None:
    worker = start("odd", SHUTDOWN_GRACE_SECONDS=4, **QUICK)
    job_id = jobs.start("odd", {"do": "never look", "seconds": 60})
    jobs.running(job_id)
    away.stop()
    worker.terminate()
    assert worker.wait(10) == 0
    [end] = events(worker, "grace_is_over")
    assert "Connection refused" in end["error"]
    assert not [line for line in log_lines(worker) if "exception" in line], worker.log
    away.start()
    assert jobs.get(job_id)["status"] == "running"  # until its lease has run out
