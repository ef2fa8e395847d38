"""What a handler has of its context: steps that happen once, progress, sleep, cancel, time limits."""

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import DictRow

from app.jobs import statements
from tests.integration import odd
from tests.integration.conftest import Jobs
from tests.processes import Process
from worker import errors
from worker.context import Context

Connection = psycopg.Connection[DictRow]
RunHandler = Callable[..., Any]


# --- once ----------------------------------------------------------------------------------------------------------


def test_a_recorded_step_is_not_repeated_after_a_crash(worker: Process, jobs: Jobs, tmp_path: Path) -> None:
    path = tmp_path / "calls"
    job_id = jobs.start("odd", {"do": "once, then crash", "path": str(path)})
    job = jobs.finished(job_id)
    first = {"call": 1, "key": f"{job_id}:paid"}
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    assert job["result"] == {"seen": [first, first, f"{job_id}:paid"]}
    assert [line.split()[0] for line in path.read_text().splitlines()] == ["1"]
    assert [attempt["error"]["type"] for attempt in jobs.attempts(job_id)] == ["WorkerLostError"]


def test_of_two_records_both_attempts_use_the_first(db: Connection, run_handler: RunHandler) -> None:
    """The attempt that believes to be alone was overtaken by another one between its call and its record."""

    def overtaken(ctx: Context) -> Any:
        def call() -> str:
            db.execute("INSERT INTO job_steps VALUES (%s, 'paid', '\"first\"')", [ctx.job_id])
            return "second"

        return [ctx.once("paid", call), ctx.once("paid", lambda: "third")]

    outcome, job = run_handler(overtaken)
    assert outcome == "succeeded"
    assert job["result"] == {"seen": ["first", "first"]}


@pytest.mark.parametrize("value", [None, False, 0, "", [], {"a": [1, 2.5, None]}, "ä𝄞", 2**70])
def test_a_steps_result_comes_back_as_it_was(value: Any, run_handler: RunHandler) -> None:
    calls = []

    def handler(ctx: Context) -> Any:
        calls.append(ctx.once("step", lambda: value))
        if ctx.attempt == 1:
            raise errors.TransientError("once more", retry_after=0)

    _, job = run_handler(handler)
    run_handler.runner.database.run("UPDATE jobs SET run_at = now()")  # type: ignore[attr-defined]
    outcome, _ = run_handler(handler, job_id=job["id"])
    assert outcome == "succeeded"
    assert calls == [value, value]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("nul", "a\x00b", "the result of the step 'nul' cannot be stored: .*u0000 cannot be converted to text"),
        ("nan", float("nan"), "not JSON compliant"),
        ("object", object(), "not JSON serializable"),
        ("surrogate", "\ud800", "the result of the step 'surrogate' cannot be stored"),
        # "Program limit exceeded" is an OperationalError: taken for a lost connection, it was repeated for ever.
        (os.urandom(4000).hex(), 1, "cannot be stored: index row size"),
    ],
    ids=["nul", "nan", "object", "surrogate", "long name"],
)
def test_what_cannot_be_recorded(name: str, value: Any, message: str, run_handler: RunHandler) -> None:
    outcome, job = run_handler(lambda ctx: ctx.once(name, lambda: value))
    assert outcome == job["status"] == "failed"
    assert re.search(message, job["error"]["message"])


# --- progress ------------------------------------------------------------------------------------------------------


@pytest.fixture
def progress_writes(db: Connection) -> Any:
    """Every progress that was written to a row, in order."""
    db.execute(
        """
        CREATE TABLE seen (at timestamptz DEFAULT clock_timestamp(), progress jsonb);
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO seen (progress) VALUES (NEW.progress);
            RETURN NULL;
        END $$;
        CREATE TRIGGER note AFTER UPDATE ON jobs FOR EACH ROW WHEN (OLD.progress IS DISTINCT FROM NEW.progress)
            EXECUTE FUNCTION note();
        """
    )
    yield lambda: db.execute("SELECT * FROM seen ORDER BY at").fetchall()
    db.execute("DROP TRIGGER note ON jobs; DROP FUNCTION note; DROP TABLE seen")


def test_progress_is_written_twice_a_second_and_at_the_end(run_handler: RunHandler, progress_writes: Any) -> None:
    def busy(ctx: Context) -> None:
        number = 0
        while len(progress_writes()) < 4:
            number += 1
            ctx.progress(number, 1_000_000, "counting")
            time.sleep(0.001)
        ctx.progress(1_000_000, 1_000_000)

    _, job = run_handler(busy)
    writes = progress_writes()
    assert len(writes) >= 5
    gaps = [(b["at"] - a["at"]).total_seconds() for a, b in pairwise(writes[:-1])]
    assert min(gaps) >= 0.45
    assert job["progress"] == {"current": 1_000_000, "total": 1_000_000, "message": None}


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        (None, "succeeded"),
        (ValueError(), "failed"),
        (errors.TransientError("x"), "queued"),
        (errors.HandBack(), "queued"),
    ],
)
def test_the_last_progress_is_kept(ending: BaseException | None, status: str, run_handler: RunHandler) -> None:
    def handler(ctx: Context) -> None:
        ctx.progress(3, 4, "almost")
        if ending:
            raise ending

    _, job = run_handler(handler)
    assert (job["status"], job["progress"]) == (status, {"current": 3, "total": 4, "message": "almost"})


def test_progress_that_cannot_be_stored_harms_no_heartbeat(run_handler: RunHandler, jobs: Jobs) -> None:
    """Progress travels with the renewal of the leases: refused, it would take them along."""

    def handler(ctx: Context) -> None:
        ctx.progress(1, message="a\x00b\ud800")
        jobs.until(ctx.job_id, lambda row: row["progress"], "progress is written")

    outcome, job = run_handler(handler)
    assert outcome == "succeeded"
    assert job["progress"]["message"] == "a\ufffdb?"
    for value in (float("nan"), "1"):
        outcome, job = run_handler(lambda ctx, value=value: ctx.progress(value))
        assert outcome == "failed"


# --- sleep and cancel ----------------------------------------------------------------------------------------------


def test_sleep_and_cancelled_see_a_cancel(db: Connection, run_handler: RunHandler) -> None:
    seen = []

    def handler(ctx: Context) -> None:
        seen.append(ctx.cancelled)
        db.execute(statements.CANCEL, {"id": ctx.job_id})
        try:
            ctx.sleep(60)
        finally:
            seen.append(ctx.cancelled)

    begin = time.monotonic()
    outcome, job = run_handler(handler)
    assert outcome == job["status"] == "cancelled"
    assert seen == [False, True]
    assert time.monotonic() - begin < 20  # of 60


def test_a_cancel_cannot_be_swallowed(db: Connection, run_handler: RunHandler) -> None:
    def handler(ctx: Context) -> str:
        db.execute(statements.CANCEL, {"id": ctx.job_id})
        for _ in range(2):
            with suppress(Exception):  # as handlers do
                ctx.sleep(60)
        return "never"

    assert run_handler(handler)[0] == "cancelled"


@pytest.mark.parametrize("ending", ["return", "fail"])
def test_who_never_looks_still_ends_cancelled(ending: str, db: Connection, run_handler: RunHandler) -> None:
    def handler(ctx: Context) -> str:
        db.execute(statements.CANCEL, {"id": ctx.job_id})
        if ending == "fail":
            raise errors.TransientError("try again")
        return "done"

    outcome, job = run_handler(handler)
    assert outcome == job["status"] == "cancelled"
    assert job["result"] is None


# --- the soft time limit -------------------------------------------------------------------------------------------


def limited(monkeypatch: pytest.MonkeyPatch, run_handler: RunHandler, seconds: Any) -> None:
    kinds = run_handler.runner._kinds  # type: ignore[attr-defined]
    monkeypatch.setitem(kinds, "odd", replace(odd.KIND, soft_time_limit=seconds))


def test_the_soft_limit_is_an_exception_that_is_retried(
    run_handler: RunHandler, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, run_handler, 0.2)
    tidied = []

    def handler(ctx: Context) -> None:
        try:
            time.sleep(20)  # no checkpoint: the signal ends it
        except errors.SoftTimeLimitExceeded:
            tidied.append(True)
            raise

    outcome, job = run_handler(handler)
    assert outcome == "retry"
    assert tidied == [True]
    assert job["error"]["type"] == "SoftTimeLimitExceeded"
    [attempt] = jobs.attempts(job["id"])
    assert 1 <= (job["run_at"] - attempt["ended_at"]).total_seconds() <= 2
    assert attempt["error"] == job["error"]


def test_the_soft_limit_spares_the_record_of_a_step(
    run_handler: RunHandler, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Struck in there, a paid step would be paid again."""
    limited(monkeypatch, run_handler, 2)
    database = run_handler.runner.database  # type: ignore[attr-defined]
    run = database.run

    def slowly(statement: str, params: Any = None) -> Any:
        if statement == statements.RECORD_STEP:
            time.sleep(3)
        return run(statement, params)

    monkeypatch.setattr(database, "run", slowly)
    outcome, job = run_handler(lambda ctx: ctx.once("paid", lambda: "receipt"))
    assert outcome == "retry"
    assert db.execute("SELECT name, result FROM job_steps").fetchall() == [{"name": "paid", "result": "receipt"}]
    assert job["error"]["type"] == "SoftTimeLimitExceeded"


def test_the_soft_limit_does_not_outlive_the_handler(run_handler: RunHandler, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, run_handler, 0.3)
    database = run_handler.runner.database  # type: ignore[attr-defined]
    run = database.run

    def slowly(statement: str, params: Any = None) -> Any:
        if statement == statements.FINISH:
            time.sleep(0.6)
        return run(statement, params)

    monkeypatch.setattr(database, "run", slowly)
    assert run_handler(lambda ctx: None)[0] == "succeeded"
