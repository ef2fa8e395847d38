"""The kinds `flaky` and `sleep` in real workers: whatever ends the handler, the next attempt succeeds."""

from collections.abc import Callable
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.rows import DictRow

from tests.processes import Process
from tests.waiting import until

RunKind = Callable[..., dict[str, Any]]


def test_a_transient_error_is_tried_again(run_kind: RunKind) -> None:
    job = run_kind("flaky", {"failures": 2})
    for attempt in (1, 2):
        assert (job["status"], job["attempt"], job["result"]) == ("queued", attempt, None)
        assert job["error"] == {"type": "TransientError", "message": f"attempt {attempt} fails as asked for: transient"}
        job = run_kind("flaky", {}, job_id=job["id"])
    assert (job["status"], job["result"]) == ("succeeded", {"attempt": 3})


def test_a_permanent_error_is_not(run_kind: RunKind) -> None:
    job = run_kind("flaky", {"failures": 1, "error": "permanent"})
    assert (job["status"], job["attempt"], job["error"]["type"]) == ("failed", 1, "PermanentError")


def test_failures_beyond_the_attempts(run_kind: RunKind) -> None:
    job = run_kind("flaky", {"failures": 9}, max_attempts=1)
    assert (job["status"], job["error"]["type"]) == ("failed", "TransientError")


def test_a_no_op(run_kind: RunKind) -> None:
    assert run_kind("flaky", {"failures": 0})["result"] == {"attempt": 1}
    job = run_kind("sleep", {"seconds": 0})
    assert (job["result"], job["progress"]) == ({"slept": 0}, {"current": 10, "total": 10, "message": None})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "reason", "seconds"),
    [
        ("crash", "SIGSEGV", 20),
        ("exit", "exit", 20),
        ("oom", "SIGKILL", 20),
        ("hang", "hard time limit of 10 s", 40),
    ],
)
def test_an_attempt_that_ends_its_process(
    api: httpx.Client,
    db: psycopg.Connection[DictRow],
    start: Callable[..., Process],
    error: str,
    reason: str,
    seconds: float,
) -> None:
    start("worker")
    answer = api.post("/api/jobs", json={"kind": "flaky", "payload": {"failures": 1, "error": error}})
    assert answer.status_code == 202, answer.text

    def over() -> dict[str, Any] | None:
        job: dict[str, Any] = api.get(answer.headers["Location"]).json()
        return job if job["finished_at"] else None

    job = until(over, f"the job survived {error}", seconds=seconds)
    assert (job["status"], job["result"]) == ("succeeded", {"attempt": 2})
    [attempt] = db.execute("SELECT error FROM job_attempts").fetchall()
    assert reason in attempt["error"]["message"]
