"""The compare-and-set that decides who runs a job."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from threading import Barrier
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.rows import DictRow

from app.database import Database
from app.jobs import statements
from app.settings import Settings
from tests.integration.conftest import Jobs, events
from tests.processes import Process
from tests.servers import Redis
from tests.waiting import until
from worker.runner import Runner

IN_AN_HOUR = datetime.now(UTC) + timedelta(hours=1)


def test_of_fifty_one_wins(settings: Settings, jobs: Jobs) -> None:
    job_id = jobs.insert()
    barrier = Barrier(50, timeout=60)

    def claim(number: int) -> bool:
        database = Database(settings, f"claimer-{number}")
        database.run("SELECT 1")
        barrier.wait()
        try:
            rows = database.run(
                statements.CLAIM,
                {"id": job_id, "token": uuid4(), "worker": str(number), "node": "n", "pid": number, "lease": 30},
            )
            return bool(rows)
        finally:
            database.close()

    with ThreadPoolExecutor(50) as pool:
        wins = [number for number, won in enumerate(pool.map(claim, range(50))) if won]
    assert len(wins) == 1
    job = jobs.get(job_id)
    assert (job["status"], job["attempt"], job["worker"]) == ("running", 1, str(wins[0]))
    assert job["lease_expires_at"] - job["heartbeat_at"] == timedelta(seconds=30)


@pytest.mark.parametrize(
    "columns",
    [
        {"run_at": IN_AN_HOUR},
        {"attempt": 4},
        {"status": "running", "attempt": 1, "lease_token": uuid4(), "lease_expires_at": "now()"},
        {"status": "succeeded", "result": "{}", "finished_at": "now()"},
        {"status": "failed", "error": "{}", "finished_at": "now()"},
        {"status": "cancelled", "finished_at": "now()"},
    ],
    ids=lambda columns: columns.get("status") or next(iter(columns)),
)
def test_nothing_else_is_claimed(columns: dict[str, Any], jobs: Jobs, runner: Runner) -> None:
    job_id = jobs.insert(**columns)
    before = jobs.get(job_id)
    assert runner.claim(job_id) is None
    assert jobs.get(job_id) == before


def test_a_deleted_job_is_not_claimed(runner: Runner) -> None:
    assert runner.claim(uuid4()) is None


def test_only_the_claims_commit_does_not_wait_for_the_disk(
    db: psycopg.Connection[DictRow], jobs: Jobs, runner: Runner
) -> None:
    # A deferred trigger runs within the commit, so it sees the setting that the commit obeys.
    db.execute(
        """
        CREATE TABLE seen (status text, setting text);
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO seen VALUES (NEW.status, current_setting('synchronous_commit'));
            RETURN NULL;
        END $$;
        CREATE CONSTRAINT TRIGGER note AFTER UPDATE ON jobs DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION note();
        """
    )
    try:
        claim = runner.claim(jobs.insert())
        assert claim is not None
        assert runner.run(claim) == "succeeded"
        seen = db.execute("SELECT * FROM seen").fetchall()
    finally:
        db.execute("DROP TRIGGER note ON jobs; DROP FUNCTION note; DROP TABLE seen")
    assert [tuple(row.values()) for row in seen] == [("running", "off"), ("succeeded", "on")]
    assert runner.database.run("SHOW synchronous_commit") == [{"synchronous_commit": "on"}]


def test_an_answer_that_was_lost(jobs: Jobs, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The claim was committed, the connection broke before its answer came: the job is ours and runs at once."""
    job_id = jobs.insert()
    run = runner.database.run
    lost: list[Any] = []

    def lose_the_first_answer(statement: str, params: Any = None) -> Any:
        rows = run(statement, params)
        if statement == statements.CLAIM and not lost:
            lost.append(rows)
            raise psycopg.OperationalError("server closed the connection unexpectedly")
        return rows

    monkeypatch.setattr(runner.database, "run", lose_the_first_answer)
    claim = runner.wait_and_claim(job_id, patience=5)
    assert claim is not None
    assert claim.attempt == 1
    assert runner.run(claim) == "succeeded"


def test_messages_for_nothing(worker: Process, jobs: Jobs, redis: Redis, settings: Settings) -> None:
    """Late, early, repeated and stray messages end at the claim; the worker goes on."""
    early = jobs.insert(run_at=IN_AN_HOUR)
    spent = jobs.insert(attempt=4)
    cancelled = jobs.insert(status="cancelled", finished_at="now()")
    deleted = jobs.insert()
    before = {job_id: jobs.get(job_id) for job_id in (early, spent, cancelled)}
    jobs.send(early, spent, cancelled, deleted)
    again = jobs.insert()
    jobs.send(*[again] * 20)
    jobs.finished(again)
    until(lambda: not redis.client.llen("default"), "all messages are read")
    assert {job_id: jobs.get(job_id) for job_id in before} == before
    assert jobs.get(again)["attempt"] == 1

    def ends() -> int:
        return len([line for line in events(worker, "job_ended") if line["job_id"] == str(again)])

    until(ends, "its end is logged")
    assert ends() == 1


def test_a_kind_that_this_release_does_not_know(worker: Process, jobs: Jobs) -> None:
    job_id = jobs.start("from_the_future")
    job = jobs.until(job_id, lambda row: row["run_at"] > row["created_at"], "it is handed back")
    assert (job["status"], job["attempt"], job["published_at"]) == ("queued", 0, None)
    assert timedelta(seconds=29) < job["run_at"] - job["heartbeat_at"] < timedelta(seconds=35)
    assert jobs.attempts(job_id) == []
