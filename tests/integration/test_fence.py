"""After the claim every write names the lease's token: who no longer has it is refused, who has it is not."""

import json
import threading
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.rows import DictRow

from app.database import Database
from app.jobs import statements
from tests.integration.conftest import Jobs
from tests.waiting import until
from worker.context import Context
from worker.runner import Claim, Runner

Connection = psycopg.Connection[DictRow]

ERROR = json.dumps({"type": "Test", "message": "as told"})
# Everything that the holder of a lease may write.
WRITES: dict[str, dict[str, Any]] = {
    "HEARTBEAT": {"progress": ["{}"], "lease": 30},
    "FINISH": {"result": "{}", "progress": None},
    "FAIL": {"error": ERROR, "retry_in": 0, "published": False, "progress": None},
    "HAND_BACK": {"retry_in": 0, "progress": None},
    "CANCELLED": {"progress": None},
}


def take_away(db: Connection, job_id: UUID) -> UUID:
    """As rescue and another worker's claim do it. Returns the new token."""
    token = uuid4()
    db.execute("UPDATE jobs SET status = 'queued', lease_token = NULL, lease_expires_at = NULL WHERE id = %s", [job_id])
    db.execute(
        """UPDATE jobs SET status = 'running', attempt = attempt + 1, lease_token = %s, lease_expires_at = now()
        WHERE id = %s""",
        [token, job_id],
    )
    return token


def claimed(runner: Runner, jobs: Jobs, **columns: Any) -> Claim:
    claim = runner.claim(jobs.insert(**columns))
    assert claim is not None
    return claim


def write(database: Database, name: str, claim: Claim) -> list[DictRow]:
    who = {"id": claim.id, "token": claim.lease_token, "ids": [claim.id], "tokens": [claim.lease_token]}
    return database.run(getattr(statements, name), who | WRITES[name])


@pytest.mark.parametrize("name", WRITES)
def test_a_worker_whose_lease_was_taken_is_refused(
    name: str, db: Connection, database: Database, runner: Runner, jobs: Jobs
) -> None:
    claim = claimed(runner, jobs)
    take_away(db, claim.id)
    if name == "CANCELLED":  # which looks for a recorded cancel
        db.execute("UPDATE jobs SET cancel_requested_at = now()")
    before = jobs.get(claim.id)
    assert write(database, name, claim) == []
    assert jobs.get(claim.id) == before
    assert jobs.attempts(claim.id) == []


@pytest.mark.parametrize("ending", ["return", "fail", "look"])
def test_a_run_that_lost_its_lease_leaves_no_trace(
    ending: str, db: Connection, jobs: Jobs, run_handler: Callable[..., Any]
) -> None:
    tokens = []

    def lose(ctx: Context) -> str:
        tokens.append(take_away(db, ctx.job_id))
        if ending == "fail":
            raise ValueError("too late")
        if ending == "look":
            ctx.sleep(20)
        return "too late"

    outcome, job = run_handler(lose)
    assert outcome == "lease lost"
    assert (job["status"], job["lease_token"], job["result"], job["error"]) == ("running", tokens[0], None, None)
    assert jobs.attempts(job["id"]) == []


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled"])
def test_an_end_whose_answer_was_lost_counts(
    status: str, db: Connection, run_handler: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write was committed, but the connection broke before that was heard: it is repeated, and finds itself."""
    database: Database = run_handler.runner.database  # type: ignore[attr-defined]
    written = database._run
    ends = {statements.FINISH, statements.FAIL, statements.CANCELLED}
    lost: list[str] = []

    def lose_the_answer(statement: str, params: Any) -> list[DictRow]:
        rows = written(statement, params)
        if statement in ends and len(lost) < 2:  # the second is the repetition on a new connection
            lost.append(statement)
            raise psycopg.OperationalError("server closed the connection unexpectedly")
        return rows

    def handler(ctx: Context) -> None:
        if status == "failed":
            raise ValueError("a bug")
        if status == "cancelled":
            db.execute("UPDATE jobs SET cancel_requested_at = now()")
            ctx.sleep(20)

    monkeypatch.setattr(database, "_run", lose_the_answer)
    outcome, job = run_handler(handler)
    assert len(lost) == 2
    assert outcome == job["status"] == status


def test_a_connection_cut_in_the_middle_of_the_finish(
    db: Connection, database: Database, jobs: Jobs, runner: Runner
) -> None:
    claim = claimed(runner, jobs)
    outcomes: list[str] = []
    cut = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE wait_event_type = 'Lock' AND query LIKE '%succeeded%'"""
    with db.transaction():
        db.execute("SELECT FROM jobs FOR UPDATE")
        thread = threading.Thread(target=lambda: outcomes.append(runner.run(claim)), daemon=True)
        thread.start()
        until(lambda: database.run(cut), "the finish waits for the row")
    thread.join(20)
    assert outcomes == [jobs.get(claim.id)["status"]] == ["succeeded"]


def test_an_expired_lease_that_nobody_took_is_renewed(
    db: Connection, jobs: Jobs, run_handler: Callable[..., Any]
) -> None:
    def oversleep(ctx: Context) -> None:
        db.execute("UPDATE jobs SET lease_expires_at = now() - interval '1 hour'")
        jobs.until(ctx.job_id, lambda row: row["lease_expires_at"] > row["heartbeat_at"], "the lease is renewed")
        ctx.checkpoint()

    outcome, job = run_handler(oversleep)
    assert outcome == job["status"] == "succeeded"
