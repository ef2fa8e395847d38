"""A job's life through the real API, a real worker and a real dispatcher."""

from collections.abc import Callable
from typing import Any

import httpx

from tests.waiting import until


def create(api: httpx.Client, kind: str, payload: dict[str, Any], **options: Any) -> dict[str, Any]:
    answer = api.post("/api/jobs", json={"kind": kind, "payload": payload, **options})
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job


def finished(api: httpx.Client, job_id: str, *, seconds: float = 60) -> dict[str, Any]:
    def over() -> dict[str, Any] | None:
        job: dict[str, Any] = api.get(f"/api/jobs/{job_id}").json()
        return job if job["finished_at"] else None

    return until(over, f"job {job_id} is over", seconds=seconds)


def test_a_job_runs_to_its_end(api: httpx.Client, start: Callable[..., Any]) -> None:
    start("worker")
    job = create(api, "sleep", {"seconds": 0.2, "steps": 2})
    assert job["status"] == "queued"
    job = finished(api, job["id"])
    assert job["status"] == "succeeded"
    assert job["result"] == {"slept": 0.2}
    assert job["progress"] == {"current": 2, "total": 2, "message": None}
    assert job["attempt"] == 1
