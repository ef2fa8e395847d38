"""Short jobs: groups behind one message, and each promise kept for each one of them."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import httpx
import pytest
from celery.exceptions import Reject

from app.database import Database
from app.jobs import dispatch, messages, statements
from app.settings import Settings
from tests.integration.conftest import Cancel, Jobs, events
from tests.processes import Process, serving
from tests.servers import Redis
from tests.waiting import until
from worker import short_jobs, shutdown, tasks
from worker.maintenance.cleanup_orphaned_jobs import rescue
from worker.runner import Claim, Runner

Wake = Callable[[], None]


@pytest.fixture
def wake(redis: Redis, settings: Settings) -> Wake:
    return lambda: dispatch.wake(redis.client, settings, ["default"])


def many(jobs: Jobs, count: int, payload: dict[str, object] | None = None, **columns: object) -> list[UUID]:
    return [jobs.insert("sleep", payload or {"seconds": 0}, short=True, **columns) for _ in range(count)]


def test_one_message_stands_for_them_all(worker: Process, jobs: Jobs, redis: Redis, wake: Wake) -> None:
    ids = many(jobs, 250)
    for _ in range(3):
        wake()
    rows = [jobs.finished(job_id) for job_id in ids]
    assert {(row["status"], row["attempt"], row["lease_expires_at"]) for row in rows} == {("succeeded", 1, None)}
    assert all(row["result"] == {"slept": 0.0} and row["progress"]["current"] == 10 for row in rows)
    assert len({row["lease_token"] for row in rows}) < 10  # groups
    until(lambda: not redis.client.exists(messages.wake_key("default")), "no wake-up is left")
    names = set(map(str, ids))

    def logged() -> list[str]:
        return [line["job_id"] for line in events(worker, "job_ended") if line["job_id"] in names]

    until(lambda: len(logged()) >= 250, "each end is logged")
    assert sorted(logged()) == sorted(names)


def test_over_http(worker: Process, settings: Settings, jobs: Jobs, redis: Redis) -> None:
    """What is short is decided at the creation; such a job starts without any dispatcher."""
    with serving(settings) as address, httpx.Client(base_url=address) as client:
        short = client.post("/api/jobs", json={"kind": "text_report", "payload": {"text": "a b a"}}).json()["id"]
        job = jobs.finished(UUID(short))
        assert (job["status"], job["short"], job["result"]["words"]) == ("succeeded", True, 3)
        for body in (
            {"kind": "sleep", "payload": {"seconds": 0.01}},
            {"kind": "sleep", "payload": {"seconds": 0}, "max_attempts": 1},
            {"kind": "flaky", "payload": {"failures": 0}},
            {"kind": "text_report", "payload": {"text": "a" * 10_001}},
        ):
            job = jobs.finished(UUID(client.post("/api/jobs", json=body).json()["id"]))
            assert (job["status"], job["short"]) == ("succeeded", False)


def test_one_that_fails_is_retried_alone(worker: Process, jobs: Jobs, wake: Wake) -> None:
    good, bad = many(jobs, 20), jobs.insert("odd", {"do": "come back later"}, short=True)
    also_good = many(jobs, 20)
    hopeless = jobs.insert("odd", {"do": "ValueError"}, short=True)
    wake()
    assert {jobs.finished(job_id)["status"] for job_id in good + also_good} == {"succeeded"}
    row = jobs.until(bad, lambda row: row["error"], "it failed")
    assert (row["status"], row["attempt"], row["short"]) == ("queued", 1, False)
    assert [attempt["error"]["message"] for attempt in jobs.attempts(bad)] == ["come back later"]
    assert jobs.finished(hopeless)["status"] == "failed"


def test_a_result_that_cannot_be_stored_spoils_no_other(worker: Process, jobs: Jobs, wake: Wake) -> None:
    good, bad, also_good = many(jobs, 5), jobs.insert("odd", {"do": "nul"}, short=True), many(jobs, 5)
    wake()
    assert {jobs.finished(job_id)["status"] for job_id in good + also_good} == {"succeeded"}
    job = jobs.finished(bad)
    assert (job["status"], job["error"]["type"]) == ("failed", "PermanentError")


def test_a_slow_one_keeps_no_other_waiting(worker: Process, jobs: Jobs, cancel: Cancel, wake: Wake) -> None:
    """What it has behind it is written down, and what it has before it goes to another child, still short."""
    before, slow = many(jobs, 5), jobs.insert("sleep", {"seconds": 60}, short=True)
    after = many(jobs, 5)
    wake()
    first = jobs.running(slow)
    for job_id in before:
        assert jobs.finished(job_id)["pid"] == first["pid"]
    for job_id in after:
        job = jobs.finished(job_id, seconds=20)  # of 60
        assert (job["status"], job["attempt"], job["short"]) == ("succeeded", 1, True)
        assert job["pid"] != first["pid"]
    assert jobs.get(slow)["status"] == "running"
    cancel(slow)
    assert jobs.finished(slow)["status"] == "cancelled"


def test_one_that_is_not_short_runs_alone(worker: Process, jobs: Jobs, wake: Wake) -> None:
    """Its child is taken from it, uncounted; alone it has its kind's limits. The test's worker waits for 5 s."""
    before, slow = many(jobs, 3), jobs.insert("odd", {"do": "never look", "seconds": 8}, short=True)
    wake()
    first = jobs.running(slow)
    job = jobs.finished(slow, seconds=40)
    assert (job["status"], job["attempt"], job["short"]) == ("succeeded", 1, False)
    assert job["pid"] != first["pid"]
    assert not jobs.attempts(slow)
    assert {jobs.finished(job_id)["pid"] for job_id in before} == {first["pid"]}


def test_a_cancel_sticks_for_one_that_has_not_begun(worker: Process, jobs: Jobs, cancel: Cancel, wake: Wake) -> None:
    slow = jobs.insert("sleep", {"seconds": 2.5}, short=True)
    behind = many(jobs, 1)[0]
    wake()
    jobs.running(behind)
    cancel(behind)
    assert jobs.finished(behind)["status"] == "cancelled"
    assert jobs.finished(slow)["status"] == "succeeded"


def test_a_poisonous_one_breaks_its_group_once(worker: Process, jobs: Jobs, wake: Wake, tmp_path: Path) -> None:
    """The others have done nothing wrong: not counted, and alone from then on, like the poison itself."""
    neighbours = many(jobs, 10)
    poison = jobs.insert("flaky", {"failures": 9, "error": "crash"}, short=True, max_attempts=2)
    traces = [jobs.insert("odd", {"do": "trace", "path": str(tmp_path / "x")}, short=True) for _ in range(10)]
    wake()
    job = jobs.finished(poison)
    assert (job["status"], job["attempt"], job["short"]) == ("failed", 2, False)
    assert [attempt["attempt"] for attempt in jobs.attempts(poison)] == [1, 2]
    for job_id in neighbours + traces:
        row = jobs.finished(job_id)
        assert (row["status"], row["attempt"]) == ("succeeded", 1)
        assert not jobs.attempts(job_id)
    assert len((tmp_path / "x").read_text().splitlines()) == 10


def test_a_slow_claim_uses_up_no_slice(
    runner: Runner, redis: Redis, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a group would go back unbegun as long as PostgreSQL is slow, which keeps it slow."""
    ids, claim = many(jobs, 3), runner.claim_short

    def slow(queue: str, most: int) -> list[Claim]:
        claims = claim(queue, most)
        time.sleep(0.3)
        return claims

    monkeypatch.setattr(short_jobs, "SLICE_SECONDS", 0.2)
    monkeypatch.setattr(runner, "claim_short", slow)
    short_jobs.run(runner, redis.client, "default")
    assert {jobs.get(job_id)["status"] for job_id in ids} == {"succeeded"}


def test_a_wake_up_that_a_stopping_worker_took_goes_back() -> None:
    shutdown.begin()
    try:
        with pytest.raises(Reject) as refused:
            tasks.run_short_jobs("default")
    finally:
        shutdown.reset()
    assert refused.value.requeue  # type: ignore[attr-defined]


def test_rescue_counts_nothing_for_a_group(database: Database, jobs: Jobs, settings: Settings) -> None:
    [job_id] = many(jobs, 1)
    identity = {"token": UUID(int=1), "worker": "w", "node": "n", "pid": 1, "lease": -1, "queue": "default", "limit": 9}
    assert [row["id"] for row in database.run(statements.CLAIM_SHORT, identity)] == [job_id]
    # The test's PostgreSQL may have just been started.
    until(lambda: rescue(database, settings.model_copy(update={"job_heartbeat_seconds": -1}), published=True), "rescue")
    job = jobs.get(job_id)
    assert (job["status"], job["attempt"], job["short"], job["error"]) == ("queued", 0, False, None)
    assert job["published_at"] is not None
    assert not jobs.attempts(job_id)


def test_a_group_that_was_taken_away_is_refused(database: Database, jobs: Jobs) -> None:
    [mine, taken] = many(jobs, 2)
    identity = {"worker": "w", "node": "n", "pid": 1, "lease": 30, "queue": "default", "limit": 9}
    database.run(statements.CLAIM_SHORT, identity | {"token": UUID(int=1)})
    database.run(
        "UPDATE jobs SET status = 'queued', attempt = 0, lease_token = NULL, lease_expires_at = NULL WHERE id = %(id)s",
        {"id": taken},
    )
    database.run(statements.CLAIM_SHORT, identity | {"token": UUID(int=2)})
    done = {"ids": [mine, taken], "results": ["{}", "{}"], "progress": [None, None]}
    rows = database.run(statements.FINISH_SHORT, done | {"token": UUID(int=1)})
    assert [row["id"] for row in rows] == [mine]
    assert jobs.get(taken)["lease_token"] == UUID(int=2)


def test_sigterm_hands_back_what_has_not_begun(worker: Process, jobs: Jobs, wake: Wake) -> None:
    """Last in this file: it ends the worker."""
    slow, behind = jobs.insert("sleep", {"seconds": 2.5}, short=True), many(jobs, 3)
    wake()
    jobs.until(slow, lambda row: row["progress"], "it has begun")  # which is after its group's claim
    jobs.running(behind[-1])
    os.kill(worker.process.pid, signal.SIGTERM)
    assert worker.wait(30) == 0
    assert jobs.get(slow)["status"] == "succeeded"
    for job_id in behind:
        job = jobs.get(job_id)
        assert (job["status"], job["attempt"], job["short"], job["lease_token"]) == ("queued", 0, True, None)
