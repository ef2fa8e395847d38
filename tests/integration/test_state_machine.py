"""The moves that a job can make, tried from SQL: neither this code nor a person in psql can make another one."""

import itertools
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.rows import DictRow
from psycopg.sql import SQL, Identifier

Connection = psycopg.Connection[DictRow]
Insert = Callable[..., UUID]

STATES = ("queued", "running", "succeeded", "failed", "cancelled")
ALLOWED = {
    ("queued", "running"),
    ("queued", "cancelled"),
    ("running", "succeeded"),
    ("running", "failed"),
    ("running", "cancelled"),
    ("running", "queued"),
    ("failed", "queued"),
    ("cancelled", "queued"),
}
# What each state needs by the CHECK constraints, so that only the move itself can be refused.
NOTHING = {"lease_token": None, "lease_expires_at": None, "finished_at": None, "cancel_requested_at": None}
COLUMNS: dict[str, dict[str, Any]] = {
    "queued": {**NOTHING},
    "running": {**NOTHING, "lease_token": uuid4(), "lease_expires_at": "now()", "attempt": 1},
    "succeeded": {**NOTHING, "finished_at": "now()", "result": "{}"},
    "failed": {**NOTHING, "finished_at": "now()", "error": "{}"},
    "cancelled": {**NOTHING, "finished_at": "now()"},
}


def update(db: Connection, job_id: UUID, **columns: Any) -> None:
    assignments = SQL(", ").join(SQL("{} = {}").format(Identifier(name), value) for name, value in columns.items())
    assert db.execute(SQL("UPDATE jobs SET {} WHERE id = {}").format(assignments, job_id)).rowcount == 1


@pytest.mark.parametrize(("before", "after"), list(itertools.product(STATES, STATES)))
def test_every_move(before: str, after: str, db: Connection, insert_job: Insert, get_job: Any) -> None:
    job_id = insert_job(status=before, **COLUMNS[before])
    columns = {**COLUMNS[after], "status": after}
    if before == after or (before, after) in ALLOWED:
        update(db, job_id, **columns)
        assert get_job(job_id)["status"] == after
        return
    with pytest.raises(psycopg.errors.CheckViolation, match=f"cannot move from {before} to {after}"):
        update(db, job_id, **columns)
    assert get_job(job_id)["status"] == before


@pytest.mark.parametrize("status", ["running", "succeeded", "failed", "cancelled"])
def test_a_lease_cannot_be_stolen(status: str, db: Connection, insert_job: Insert) -> None:
    job_id = insert_job(status=status, **{**COLUMNS[status], "lease_token": uuid4()})
    with pytest.raises(psycopg.errors.CheckViolation, match="lease belongs to somebody"):
        update(db, job_id, lease_token=uuid4())


@pytest.mark.parametrize("after", ["succeeded", "failed", "queued"])
def test_a_recorded_cancel_leaves_one_way(after: str, db: Connection, insert_job: Insert) -> None:
    job_id = insert_job(status="running", **{**COLUMNS["running"], "cancel_requested_at": "now()"})
    with pytest.raises(psycopg.errors.CheckViolation, match="was cancelled"):
        update(db, job_id, **{**COLUMNS[after], "status": after})
    with pytest.raises(psycopg.errors.CheckViolation, match="was cancelled"):
        update(db, job_id, cancel_requested_at=None)  # ... and then to succeed
    update(db, job_id, finished_at="now()", lease_expires_at=None, status="cancelled")


def test_a_claim_counts_its_attempt(db: Connection, insert_job: Insert) -> None:
    job_id = insert_job()
    with pytest.raises(psycopg.errors.CheckViolation, match="without counting"):
        update(db, job_id, **{**COLUMNS["running"], "status": "running", "attempt": 0})


@pytest.mark.parametrize(
    ("constraint", "status", "columns"),
    [
        ("status", "queued", {"status": "done"}),
        ("priority", "queued", {"priority": "urgent"}),
        ("attempts", "queued", {"max_attempts": 0}),
        ("attempts", "queued", {"max_attempts": 26}),
        ("attempts", "queued", {"attempt": 5, "max_attempts": 4}),
        ("attempts", "queued", {"attempt": -1}),
        ("lease_while_running", "running", {"lease_expires_at": None}),
        ("lease_while_running", "queued", {"lease_expires_at": "now()"}),
        ("running_has_token", "running", {"lease_token": None}),
        ("queued_is_free", "queued", {"lease_token": uuid4()}),
        ("queued_is_free", "queued", {"cancel_requested_at": "now()"}),
        ("finished_has_time", "succeeded", {"finished_at": None}),
        ("finished_has_time", "queued", {"finished_at": "now()"}),
        ("succeeded_has_result", "succeeded", {"result": None}),
        ("failed_has_error", "failed", {"error": None}),
    ],
)
def test_every_constraint(constraint: str, status: str, columns: dict[str, Any], insert_job: Insert) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match=f"jobs_{constraint}_check"):
        insert_job(**{"status": status, **COLUMNS[status], **columns})


def test_a_key_makes_one_job(insert_job: Insert) -> None:
    insert_job(api_key="a", idempotency_key="k")
    insert_job(api_key="b", idempotency_key="k")
    with pytest.raises(psycopg.errors.UniqueViolation):
        insert_job(api_key="a", idempotency_key="k")
