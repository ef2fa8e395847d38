"""Looking at jobs, one or many, and what a person may do with them: cancel and retry."""

from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from psycopg.rows import DictRow

from tests.integration.api.conftest import NOOP, created, problem, waiting
from tests.servers import Redis
from tests.waiting import until

Db = psycopg.Connection[DictRow]
Insert = Callable[..., UUID]
Get = Callable[[UUID], DictRow]

RUNNING = {
    "status": "running",
    "attempt": 2,
    "started_at": "now()",
    "heartbeat_at": "now()",
    "worker": "worker@test",
    "node": "node",
    "pid": 7,
    "lease_token": "0197f000-0000-7000-8000-000000000001",
    "lease_expires_at": "2100-01-01",
    "progress": '{"current": 1, "total": 2, "message": "half"}',
}
OVER = {**RUNNING, "lease_expires_at": None, "finished_at": "now()"}
SUCCEEDED = {**OVER, "status": "succeeded", "result": '{"slept": 0}'}
FAILED = {**OVER, "status": "failed", "error": '{"type": "ValueError", "message": "too bad"}'}
CANCELLED = {**OVER, "status": "cancelled", "cancel_requested_at": "now()"}


def pages(api: httpx.Client, **params: Any) -> list[list[str]]:
    """The ids on each page of a list, to its end."""
    found: list[list[str]] = []
    while True:
        answer = api.get("/api/jobs", params=params)
        assert answer.status_code == 200, answer.text
        page = answer.json()
        found.append([job["id"] for job in page["jobs"]])
        if page["next_cursor"] is None:
            return found
        params["cursor"] = page["next_cursor"]


def test_pages_are_newest_first_and_meet_without_gap_or_overlap(api: httpx.Client) -> None:
    # A batch has one created_at for all: there the ids decide.
    ids = [created(api.post("/api/jobs", json=NOOP))["id"] for _ in range(3)]
    ids += [job["id"] for job in api.post("/api/jobs/batch", json={"jobs": [NOOP] * 4}).json()["jobs"]]
    newest_first = ids[::-1]
    assert pages(api) == [newest_first]
    assert pages(api, limit=7) == [newest_first]
    assert pages(api, limit=3) == [newest_first[:3], newest_first[3:6], newest_first[6:]]
    assert pages(api, limit=1) == [[job_id] for job_id in newest_first]


def test_new_jobs_do_not_move_the_pages(api: httpx.Client) -> None:
    ids = [created(api.post("/api/jobs", json=NOOP))["id"] for _ in range(6)][::-1]
    seen: list[str] = []
    params: dict[str, Any] = {"limit": 2}
    while params.get("cursor", "") is not None:
        page = api.get("/api/jobs", params=params).json()
        seen += [job["id"] for job in page["jobs"]]
        params["cursor"] = page["next_cursor"]
        created(api.post("/api/jobs", json=NOOP))
    assert seen == ids


def test_an_empty_list(api: httpx.Client) -> None:
    assert api.get("/api/jobs").json() == {"jobs": [], "next_cursor": None}


@pytest.mark.parametrize("limit", [None, 200])
def test_a_page_has_50_jobs_or_as_many_as_one_asks_for(api: httpx.Client, limit: int | None) -> None:
    api.post("/api/jobs/batch", json={"jobs": [NOOP] * 201})
    page = api.get("/api/jobs", params={"limit": limit} if limit else {}).json()
    assert len(page["jobs"]) == (limit or 50)
    assert page["next_cursor"]


def test_filters(api: httpx.Client, insert_job: Insert) -> None:
    job_ids = {
        "low": insert_job(queue="low_priority", priority="low"),
        "flaky": insert_job("flaky", {"failures": 1}),
        "running": insert_job(**RUNNING),
        "failed": insert_job(**FAILED),
        "flaky failed": insert_job("flaky", {"failures": 1}, **FAILED),
    }
    for params, expected in [
        ({"queue": "low_priority"}, ["low"]),
        ({"queue": "high_priority"}, []),
        ({"kind": "flaky"}, ["flaky failed", "flaky"]),
        ({"status": "failed"}, ["flaky failed", "failed"]),
        ({"status": "queued"}, ["flaky", "low"]),
        ({"status": "running"}, ["running"]),
        ({"status": "failed", "kind": "flaky", "queue": "default"}, ["flaky failed"]),
        ({"status": "cancelled", "kind": "flaky"}, []),
    ]:
        ids = [str(job_ids[name]) for name in expected]
        assert [job_id for page in pages(api, limit=1, **params) for job_id in page] == ids, params


def test_what_a_kind_keeps_secret_is_starred_out_everywhere(api: httpx.Client, db: Db) -> None:
    job = {"kind": "webhook", "payload": {"url": "http://a.test/", "body": 1, "headers": {"Authorization": "hush"}}}
    answers = [api.post("/api/jobs", json=job), api.post("/api/jobs/batch", json={"jobs": [job]})]
    answers += [api.get(answers[0].headers["location"]), api.get("/api/jobs")]
    answers += [api.post(answers[0].headers["location"] + "/cancel")]
    for answer in answers:
        assert answer.is_success
        assert "hush" not in answer.text
        assert '"Authorization":"***"' in answer.text
    assert "hush" in str(db.execute("SELECT payload FROM jobs").fetchone())


def test_a_job_in_full(api: httpx.Client, insert_job: Insert) -> None:
    job = api.get(f"/api/jobs/{insert_job(**FAILED, request_id='mine')}").json()
    assert job["error"] == {"type": "ValueError", "message": "too bad"}
    assert job["progress"] == {"current": 1, "total": 2, "message": "half"}
    assert (job["status"], job["attempt"], job["worker"]) == ("failed", 2, "worker@test")
    assert all(job[name].endswith("Z") for name in ("started_at", "heartbeat_at", "finished_at"))
    # Nobody outside needs them, and who has the token could write to the row.
    assert not {"lease_token", "api_key", "request_hash", "node", "pid"} & set(job)


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("POST", "/cancel"), ("POST", "/retry")])
def test_a_job_that_is_not_there(api: httpx.Client, method: str, path: str) -> None:
    job_id = uuid4()
    assert str(job_id) in problem(api.request(method, f"/api/jobs/{job_id}{path}"), 404, "unknown-job")["detail"]


# --- cancel ----------------------------------------------------------------------------------------------------------


def test_a_queued_job_is_cancelled_in_the_answer(api: httpx.Client) -> None:
    job = created(api.post("/api/jobs", json=NOOP))
    cancelled = created(api.post(f"/api/jobs/{job['id']}/cancel"))
    assert cancelled["status"] == "cancelled"
    assert cancelled["finished_at"] is not None
    assert api.get(f"/api/jobs/{job['id']}").json() == cancelled


def test_a_running_job_keeps_running_with_its_cancel_recorded(
    api: httpx.Client, insert_job: Insert, get_job: Get
) -> None:
    job_id = insert_job(**RUNNING)
    for _ in range(2):  # twice is once
        job = created(api.post(f"/api/jobs/{job_id}/cancel"))
        assert (job["status"], job["finished_at"]) == ("running", None)
    assert get_job(job_id)["cancel_requested_at"] is not None


@pytest.mark.parametrize("columns", [SUCCEEDED, FAILED, CANCELLED], ids=lambda columns: columns["status"])
def test_a_job_that_is_over_is_not_cancelled(
    api: httpx.Client, insert_job: Insert, get_job: Get, columns: dict[str, Any]
) -> None:
    job_id = insert_job(**columns)
    before = get_job(job_id)
    assert columns["status"] in problem(api.post(f"/api/jobs/{job_id}/cancel"), 409, "wrong-status")["detail"]
    assert get_job(job_id) == before


# --- retry -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [FAILED, CANCELLED], ids=lambda columns: columns["status"])
def test_a_retry_starts_anew_but_keeps_recorded_steps(
    serve: Callable[..., httpx.Client], insert_job: Insert, get_job: Get, db: Db, redis: Redis, columns: dict[str, Any]
) -> None:
    job_id = insert_job(**{**columns, "run_at": "2020-01-01", "published_at": "now()"})
    db.execute("INSERT INTO job_steps (job_id, name, result) VALUES (%s, 'paid', '1')", [job_id])
    before = get_job(job_id)
    job = created(serve().post(f"/api/jobs/{job_id}/retry"))
    after = get_job(job_id)
    assert job["status"] == "queued"
    assert after["run_at"] > before["created_at"]
    cleared = {"error", "result", "progress", "started_at", "heartbeat_at", "finished_at", "worker", "node", "pid"}
    cleared |= {"lease_token", "lease_expires_at", "cancel_requested_at", "published_at"}
    changed = {"status": "queued", "attempt": 0, "run_at": after["run_at"]} | dict.fromkeys(cleared)
    assert after == before | changed
    assert db.execute("SELECT name FROM job_steps").fetchall() == [{"name": "paid"}]
    until(lambda: waiting(redis, "maintenance"), "dispatch is asked for")


@pytest.mark.parametrize("columns", [{}, RUNNING, SUCCEEDED], ids=["queued", "running", "succeeded"])
def test_other_jobs_are_not_retried(
    api: httpx.Client, insert_job: Insert, get_job: Get, columns: dict[str, Any]
) -> None:
    job_id = insert_job(**columns)
    before = get_job(job_id)
    problem(api.post(f"/api/jobs/{job_id}/retry"), 409, "wrong-status")
    assert get_job(job_id) == before
