"""Flower beside a worker: behind its password, finds jobs by their ids, remembers, and changes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.integration.conftest import QUICK, Jobs
from tests.processes import Process, running
from tests.servers import Redis, free_port
from tests.waiting import until

LOGIN = ("admin", "long-enough-for-a-test")


def test_flower(start: Callable[..., Process], jobs: Jobs, redis: Redis, tmp_path: Path) -> None:
    port = free_port()
    options: dict[str, Any] = {
        "FLOWER_PORT": port,
        "FLOWER_BASIC_AUTH": ":".join(LOGIN),
        "FLOWER_READ_ONLY": "true",
        "FLOWER_PERSISTENT": "true",
        "FLOWER_DB": tmp_path / "state",
    }
    flower = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10, headers={"Connection": "close"})

    def tasks(job_id: object) -> list[str]:
        try:
            answer = flower.get("/api/tasks", params={"search": f"args:{job_id}"}, auth=LOGIN)
        except httpx.TransportError:
            return []
        return [task for task in answer.raise_for_status().json() if task.startswith(str(job_id))]

    start("worker", **QUICK)
    with running("app.flower", tmp_path, **options) as process:
        until(lambda: answers(flower), "Flower answers")
        assert flower.get("/api/tasks").status_code == 401
        # It answers before it hears; what it has not heard it never shows.
        until(lambda: redis.client.publish("/0.celeryev/worker.heartbeat", ""), "it listens to events")
        job_id = jobs.start("sleep", {"seconds": 0})
        jobs.finished(job_id)
        [task] = until(lambda: tasks(job_id), "it has seen the job")
        assert flower.post(f"/api/task/revoke/{task}", auth=LOGIN).status_code in (401, 403, 405)
        process.terminate()
        process.wait(20)
    with running("app.flower", tmp_path, **options):
        until(lambda: tasks(job_id) == [task], "it remembers")


def answers(flower: httpx.Client) -> bool:
    try:
        return flower.get("/healthcheck").status_code == 200
    except httpx.TransportError:
        return False
