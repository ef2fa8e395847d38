"""Jobs whose worker sends no heartbeats any more, and those whose worker does."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from app.database import Database
from app.jobs import messages
from app.jobs.dispatch import dispatch
from app.settings import Settings
from tests.integration.conftest import Jobs, events
from tests.processes import Process
from tests.servers import Redis
from tests.waiting import until
from worker.context import Context
from worker.maintenance import cleanup_orphaned_jobs
from worker.maintenance.cleanup_orphaned_jobs import rescue

REASON = {"type": "LeaseLost", "message": "lease lost: its worker gave no sign of life for 4 s"}


@pytest.fixture(autouse=True)
def settled(database: Database) -> None:
    """PostgreSQL has been up for longer than rescue leaves to the workers."""
    up = "SELECT now() - pg_postmaster_start_time() > interval '4 seconds' AS long"
    until(lambda: database.run(up)[0]["long"], "PostgreSQL has been up for a while")


def orphan(jobs: Jobs, **columns: Any) -> UUID:
    expired = {"status": "running", "attempt": 1, "lease_token": uuid4(), "lease_expires_at": "2020-01-01"}
    return jobs.insert(**expired | columns)


def test_they_run_again_at_once(jobs: Jobs, redis: Redis, database: Database, quick: Settings) -> None:
    job_id = orphan(jobs)
    assert cleanup_orphaned_jobs.run(database, redis.client, quick) == {"queued": 1}
    job = jobs.get(job_id)
    assert (job["status"], job["attempt"], job["lease_token"], job["error"]) == ("queued", 1, None, REASON)
    assert job["published_at"] is not None
    assert [attempt["error"] for attempt in jobs.attempts(job_id)] == [REASON]
    assert messages.job_id_of(redis.client.lpop("default")) == job_id  # type: ignore[arg-type]
    assert cleanup_orphaned_jobs.run(database, redis.client, quick) == {}


def test_a_clock_that_was_set_back(jobs: Jobs, redis: Redis, database: Database, quick: Settings) -> None:
    """The worker died while the database's clock was a day ahead: its lease ends tomorrow."""
    tomorrow = "now() + interval '1 day'"
    job_id = orphan(jobs)
    database.run(f"UPDATE jobs SET heartbeat_at = {tomorrow}, lease_expires_at = {tomorrow}")
    assert cleanup_orphaned_jobs.run(database, redis.client, quick) == {"queued": 1}
    database.run(f"UPDATE jobs SET published_at = {tomorrow}")
    redis.client.flushall()
    assert dispatch(database, redis.client, quick) == {"repaired": 1}
    assert messages.job_id_of(redis.client.rpop("default")) == job_id  # type: ignore[arg-type]


def test_ahead_of_all_that_waits(jobs: Jobs, redis: Redis, database: Database, quick: Settings) -> None:
    """They have waited before, and a backlog of an hour must not come between."""
    for _ in range(5):
        jobs.start()
    older, newer = orphan(jobs), orphan(jobs)
    cleanup_orphaned_jobs.run(database, redis.client, quick)
    next_ones = [messages.job_id_of(message) for message in redis.client.rpop("default", 2)]  # type: ignore[union-attr]
    assert next_ones == [older, newer]


@pytest.mark.parametrize(
    ("columns", "status", "error", "attempts"),
    [
        ({"attempt": 4}, "failed", REASON, 1),  # the poison that takes its whole worker along
        ({"cancel_requested_at": "now()"}, "cancelled", REASON, 0),
    ],
)
def test_or_are_over(
    columns: dict[str, Any], status: str, error: Any, attempts: int, jobs: Jobs, database: Database, quick: Settings
) -> None:
    job_id = orphan(jobs, **columns)
    rescue(database, quick, published=True)
    job = jobs.get(job_id)
    assert (job["status"], job["error"], job["published_at"]) == (status, error, None)
    assert len(jobs.attempts(job_id)) == attempts


def test_whose_lease_lasts_is_left_alone(jobs: Jobs, database: Database, quick: Settings) -> None:
    job_id = orphan(jobs, lease_expires_at="2100-01-01")
    assert rescue(database, quick, published=True) == []
    assert jobs.get(job_id)["status"] == "running"


def test_after_a_start_of_postgresql_workers_come_first(jobs: Jobs, database: Database, quick: Settings) -> None:
    orphan(jobs)
    longer_than_it_is_up = quick.model_copy(update={"job_heartbeat_seconds": 1e6})
    assert rescue(database, longer_than_it_is_up, published=True) == []


def test_two_at_once_rescue_each_job_once(jobs: Jobs, settings: Settings, quick: Settings) -> None:
    job_ids = {orphan(jobs) for _ in range(200)}

    def run(number: int) -> list[UUID]:
        database = Database(settings, f"rescue-{number}")
        rows = rescue(database, quick, published=True)
        database.close()
        return [row["id"] for row in rows]

    with ThreadPoolExecutor(4) as pool:
        rescued = [*chain.from_iterable(pool.map(run, range(4)))]
    assert len(rescued) == 200
    assert set(rescued) == job_ids


def test_a_living_workers_job_is_not_rescued(
    run_handler: Callable[..., Any], database: Database, quick: Settings
) -> None:
    """Longer than its lease, under a rescue that never sleeps."""

    def handler(ctx: Context) -> None:
        end = time.monotonic() + quick.job_lease_seconds + 1.5
        while time.monotonic() < end:
            assert rescue(database, quick, published=True) == []
            ctx.sleep(0.1)

    outcome, job = run_handler(handler)
    assert outcome == "succeeded"
    assert job["attempt"] == 1


def test_a_handler_that_holds_the_interpreter(
    worker: Process, jobs: Jobs, redis: Redis, database: Database, quick: Settings, tmp_path: Path
) -> None:
    """No heartbeat gets out, so somebody else has the job when it wakes up: what it does then is refused."""
    path = tmp_path / "ran"
    job_id = jobs.start("odd", {"do": "hold the interpreter", "seconds": 8, "path": str(path)})
    first = jobs.running(job_id)
    until(lambda: cleanup_orphaned_jobs.run(database, redis.client, quick), "the lease has run out", seconds=15)
    job = jobs.finished(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    assert job["pid"] != first["pid"]
    assert [attempt["error"] for attempt in jobs.attempts(job_id)] == [REASON]

    def outcomes() -> list[str]:
        found = [line["outcome"] for line in events(worker, "job_ended") if line["job_id"] == str(job_id)]
        return found if len(found) == 2 else []

    assert until(outcomes, "the first has woken up") == ["succeeded", "lease lost"]
    assert jobs.get(job_id) == job
    assert len(path.read_text().splitlines()) == 2
