"""An attempt that failed: which errors are tried again, when, and what no error may do to the worker."""

from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

import psutil
import pytest

from app.database import Database
from app.jobs.dispatch import dispatch
from app.settings import Settings
from tests.integration.conftest import Jobs, log_lines
from tests.processes import Process
from tests.servers import Redis
from tests.waiting import until


def test_a_retry_is_a_row_in_the_future(
    worker: Process, jobs: Jobs, redis: Redis, database: Database, settings: Settings
) -> None:
    job_id = jobs.start("flaky", {"failures": 1})
    job = jobs.until(job_id, lambda row: row["error"], "the first attempt has failed")
    assert (job["status"], job["attempt"], job["published_at"], job["lease_token"]) == ("queued", 1, None, None)
    [attempt] = jobs.attempts(job_id)
    assert attempt["error"] == job["error"]
    delay = job["run_at"] - attempt["ended_at"]
    assert timedelta(seconds=1) <= delay <= timedelta(seconds=2)  # half of it is chance
    # Nothing waits in the worker or in Redis; dispatch sends it when it is due, and not before.
    assert not redis.client.exists("default", "unacked")
    database.run("UPDATE jobs SET run_at = now() + interval '1 hour'")  # its own delay may be over by now
    assert dispatch(database, redis.client, settings) == {}
    database.run("UPDATE jobs SET run_at = now()")
    until(lambda: dispatch(database, redis.client, settings), "it is due")
    job = jobs.finished(job_id)
    assert (job["status"], job["attempt"], job["result"]) == ("succeeded", 2, {"attempt": 2})
    assert job["started_at"] > job["run_at"]
    assert job["error"] is None


def test_the_other_side_said_when(worker: Process, jobs: Jobs) -> None:
    job_id = jobs.start("odd", {"do": "come back later"})
    job = jobs.until(job_id, lambda row: row["error"], "it has failed")
    assert (job["status"], job["error"]["message"]) == ("queued", "come back later")
    assert job["run_at"] - jobs.attempts(job_id)[0]["ended_at"] == timedelta(seconds=45)


@pytest.mark.parametrize(
    ("do", "status", "message"),
    [
        ("ValueError", "failed", "a bug"),
        ("SystemExit", "failed", "3"),
        ("KeyboardInterrupt", "failed", "KeyboardInterrupt"),
        ("RecursionError", "failed", "maximum recursion depth exceeded"),
        ("MemoryError", "queued", "MemoryError"),
        ("nul", "failed", "the result cannot be stored: unsupported Unicode escape sequence: \\u0000"),
    ],
)
def test_no_exception_ends_the_child(do: str, status: str, message: str, worker: Process, jobs: Jobs) -> None:
    children = {child.pid for child in worker.children()}
    job_id = jobs.start("odd", {"do": do})
    job = jobs.until(job_id, lambda row: row["error"], "it has failed")
    assert (job["status"], job["attempt"]) == (status, 1)
    assert job["error"]["message"].startswith(message)
    assert [attempt["error"] for attempt in jobs.attempts(job_id)] == [job["error"]]
    assert job["pid"] in children
    assert psutil.pid_exists(job["pid"])


def test_a_payload_of_another_release(worker: Process, jobs: Jobs) -> None:
    job = jobs.finished(jobs.start("sleep", {"minutes": 5}))
    assert (job["status"], job["attempt"], job["error"]["type"]) == ("failed", 1, "PermanentError")
    assert "does not fit this release's sleep" in job["error"]["message"]


def test_what_the_log_says(worker: Process, jobs: Jobs) -> None:
    """A line for the failure and one for the end; a traceback for what nobody expected and for nothing else."""

    def lines_of(job_id: UUID) -> list[dict[str, Any]]:
        lines = [line for line in log_lines(worker) if line.get("job_id") == str(job_id)]
        return lines if lines and lines[-1]["message"] == "job_ended" else []

    for kind, payload in (("flaky", {"failures": 1, "error": "permanent"}), ("odd", {"do": "ValueError"})):
        lines = until(partial(lines_of, jobs.start(kind, payload)), "the end is in the log")
        assert [line["message"] for line in lines] == ["attempt_failed", "job_ended"]
        assert ("exception" in lines[0]) == (kind == "odd")
        assert (lines[1]["outcome"], lines[1]["attempt"], lines[1]["kind"]) == ("failed", 1, kind)
