"""Finished jobs and old ticks go in time, and nothing else does."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest
from psycopg.rows import DictRow
from uuid_utils.compat import uuid7

from app.database import Database
from app.files.store import OWNER_MARK
from app.settings import Settings
from tests.integration.conftest import Jobs
from tests.servers import Redis
from tests.waiting import until
from worker import inline, shutdown
from worker.maintenance import _slice, database_maintenance
from worker.runner import Runner

Connection = psycopg.Connection[DictRow]
Run = Callable[..., dict[str, Any]]
FINISHED: dict[str, dict[str, Any]] = {
    "succeeded": {"result": "{}"},
    "failed": {"error": '{"type": "E", "message": "m"}'},
    "cancelled": {},
}


@pytest.fixture
def run(database: Database, settings: Settings, db: Connection) -> Run:
    """run(job_retention_days=30) -> what one run did."""
    db.execute("TRUNCATE schedule_ticks")

    def run(**changes: Any) -> dict[str, Any]:
        return database_maintenance.run(database, None, settings.model_copy(update=changes))

    return run


@pytest.fixture
def ended(jobs: Jobs, db: Connection) -> Callable[..., UUID]:
    """ended("failed", days=31) -> a job that was over so many days ago, and waited for `waited` days."""

    def insert(status: str = "succeeded", days: float = 31, waited: float = 0, **columns: Any) -> UUID:
        job_id = jobs.insert(status=status, finished_at="now()", attempt=1, **FINISHED[status], **columns)
        db.execute(
            "UPDATE jobs SET finished_at = now() - %(days)s * interval '1 day',"
            " created_at = now() - (%(days)s::float + %(waited)s) * interval '1 day' WHERE id = %(id)s",
            {"days": days, "waited": waited, "id": job_id},
        )
        return job_id

    return insert


def ids(db: Connection) -> set[UUID]:
    return {row["id"] for row in db.execute("SELECT id FROM jobs")}


def count(db: Connection, table: str) -> int:
    row = db.execute(f"SELECT count(*) AS found FROM {table}").fetchone()
    assert row is not None
    return int(row["found"])


def test_only_finished_jobs_past_their_time_go(
    run: Run, ended: Callable[..., UUID], jobs: Jobs, db: Connection
) -> None:
    kept = {ended(status, 29) for status in FINISHED}
    # It waited for long, and ended lately.
    kept.add(ended("succeeded", 29, waited=300))
    kept.add(jobs.insert(created_at="2000-01-01", run_at="2000-01-01"))
    kept.add(jobs.insert(created_at="2000-01-01", run_at="2100-01-01"))
    kept.add(
        jobs.insert(
            status="running",
            attempt=1,
            lease_token=uuid7(),
            lease_expires_at="2000-01-02",
            created_at="2000-01-01",
            started_at="2000-01-01",
        )
    )
    for status in FINISHED:
        for _ in range(3):
            ended(status, 31)
    assert run() == {"jobs": 9}
    assert ids(db) == kept
    assert run() == {}


def test_what_belongs_to_a_job_goes_with_it(
    run: Run, ended: Callable[..., UUID], db: Connection, upload: Callable[..., str]
) -> None:
    gone, kept = ended("failed", 31), ended("failed", 1)
    file_id = upload("a.txt", b"bytes")
    for job_id in (gone, kept):
        db.execute("INSERT INTO job_steps (job_id, name, result) VALUES (%s, 'paid', '1')", [job_id])
        db.execute("INSERT INTO job_attempts (job_id, attempt, error) VALUES (%s, 1, '{}')", [job_id])
        db.execute("INSERT INTO job_files VALUES (%s, %s)", [job_id, file_id])
    assert run() == {"jobs": 1}
    for table in ("job_steps", "job_attempts", "job_files"):
        assert [row["job_id"] for row in db.execute(f"SELECT job_id FROM {table}")] == [kept]
    assert count(db, "files") == 1


def test_a_deleted_jobs_idempotency_key_is_free(run: Run, api: httpx.Client, db: Connection) -> None:
    def post() -> httpx.Response:
        body = {"kind": "sleep", "payload": {"seconds": 0}}
        return api.post("/api/jobs", json=body, headers={"Idempotency-Key": "one"})

    first = post()
    assert post().status_code == 200
    db.execute(
        "UPDATE jobs SET status = 'cancelled', cancel_requested_at = now(),"
        " created_at = now() - interval '40 days', finished_at = now() - interval '31 days'"
    )
    assert run() == {"jobs": 1}
    again = post()
    assert again.status_code == 202
    assert again.json()["id"] != first.json()["id"]


def test_zero_days_keep_jobs_for_ever(run: Run, ended: Callable[..., UUID]) -> None:
    ended(days=10_000)
    assert run(job_retention_days=0) == {}
    assert run(job_retention_days=1) == {"jobs": 1}


def test_the_newest_tick_of_each_entry_stays(run: Run, db: Connection) -> None:
    for entry, oldest in (("often", 40), ("dead", 100)):
        db.execute(
            "INSERT INTO schedule_ticks (entry, due_at) SELECT %(entry)s, now() - (n - 0.5) * interval '1 day'"
            " FROM generate_series(%(oldest)s - 20, %(oldest)s) AS n",
            {"entry": entry, "oldest": oldest},
        )
    assert run() == {"ticks": 10 + 20}
    left = db.execute("SELECT entry, count(*) AS found FROM schedule_ticks GROUP BY entry").fetchall()
    assert {row["entry"]: row["found"] for row in left} == {"often": 11, "dead": 1}
    assert run() == {}


def test_a_slice_ends_and_the_next_goes_on(
    run: Run, ended: Callable[..., UUID], db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_slice, "SLICE_SECONDS", 0)
    monkeypatch.setattr(database_maintenance, "BATCH", 4)
    for number in range(15):
        ended(list(FINISHED)[number % 3])
    total, slices = 0, 1
    while "unfinished" in (done := run()):
        total, slices = total + done["jobs"], slices + 1
    # 4 + 1 of each status; a slice without time still does one batch.
    assert (total, slices, count(db, "jobs")) == (15, 7, 0)


def test_nobody_waits_for_nobody(
    run: Run, ended: Callable[..., UUID], db: Connection, settings: Settings, jobs: Jobs
) -> None:
    """A person's retry that is not committed yet keeps its job; the others go meanwhile."""
    retried, *others = (ended("failed") for _ in range(3))
    with psycopg.connect(settings.database_conninfo) as person:
        person.execute(
            "UPDATE jobs SET status = 'queued', attempt = 0, finished_at = NULL, error = NULL, lease_token = NULL"
            " WHERE id = %s",
            [retried],
        )
        assert run() == {"jobs": len(others)}
    assert ids(db) == {retried}
    assert run() == {}


def test_many_at_once(ended: Callable[..., UUID], db: Connection, settings: Settings, run: Run) -> None:
    # In an order of their own, so that whoever locks in another one would meet the others.
    db.execute(
        """INSERT INTO jobs (id, kind, status, priority, queue, payload, max_attempts, created_at, finished_at, result)
        SELECT gen_random_uuid(), 'sleep', 'succeeded', 'default', 'default', '{}', 4,
               now() - (40 + n %% 7) * interval '1 day', now() - interval '35 days', '{}'
        FROM generate_series(1, %(jobs)s) AS n""",
        {"jobs": 12_000},
    )
    db.execute("INSERT INTO job_steps (job_id, name, result) SELECT id, 'one', '1' FROM jobs")
    done: list[dict[str, Any]] = []

    def one() -> None:
        database = Database(settings, "another")
        done.append(database_maintenance.run(database, None, settings))
        database.close()

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(each.get("jobs", 0) for each in done) == 12_000
    assert count(db, "jobs") == count(db, "job_steps") == 0


def test_statistics_are_fresh_afterwards(run: Run, ended: Callable[..., UUID], db: Connection) -> None:
    analysed = "SELECT max(last_analyze) AS at FROM pg_stat_user_tables WHERE relname = %s"

    def last(table: str) -> Any:
        db.execute("SELECT pg_stat_clear_snapshot()")
        row = db.execute(analysed, [table]).fetchone()
        return row and row["at"]

    tables = ("jobs", "job_steps", "job_attempts", "job_files", "files", "schedule_ticks")
    before = {table: last(table) for table in tables}
    run()
    assert all(last(table) != before[table] for table in tables)


def test_inline_mode_does_it_too(
    run: Run, runner: Runner, ended: Callable[..., UUID], db: Connection, redis: Redis, settings: Settings
) -> None:
    """Without Redis, in a thread of the one process."""
    ended()
    folder = Path(settings.storage_url.removeprefix("file://"))
    shutil.rmtree(folder, ignore_errors=True)
    shutdown.reset()
    thread = threading.Thread(target=inline._keep_house, args=(runner,), daemon=True)
    thread.start()
    try:
        until(lambda: not ids(db), "the job is deleted")
        until((folder / OWNER_MARK).exists, "files have been looked at")
    finally:
        shutdown.begin()
        thread.join(10)
        shutdown.reset()
    assert not thread.is_alive()
    assert not redis.client.dbsize()
