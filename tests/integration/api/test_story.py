"""One job in the logs, by its request's id: from HTTP to its worker's last line."""

import json
import os
import signal
from collections.abc import Callable
from typing import Any

import httpx

from scripts.stack import story
from tests.integration.api.conftest import created
from tests.integration.conftest import QUICK
from tests.processes import Process
from tests.waiting import until


def test_from_http_to_the_last_line(
    serve_process: Callable[..., tuple[httpx.Client, Process]], start: Callable[..., Process]
) -> None:
    api, api_process = serve_process()
    processes = {name: start(name, **QUICK) for name in ("worker", "worker-maintenance", "beat")} | {"api": api_process}
    body = {"kind": "sleep", "payload": {"seconds": 60, "steps": 1000}, "max_attempts": 5}
    answer = api.post("/api/jobs", json=body, headers={"X-Request-ID": "story-1"})
    job = created(answer)

    def state() -> dict[str, Any]:
        found: dict[str, Any] = api.get(f"/api/jobs/{job['id']}").json()
        return found

    def runs(attempt: int) -> Callable[[], bool]:
        return lambda: (state()["status"], state()["attempt"]) == ("running", attempt)

    until(runs(1), "it runs")
    for child in [each.pid for each in processes["worker"].children()]:
        os.kill(child, signal.SIGKILL)
    until(runs(2), "it runs again")
    processes["worker"].kill()
    processes["worker-2"] = start("worker", **QUICK)
    until(runs(3), "rescue gave it to another", seconds=45)
    api.post(f"/api/jobs/{job['id']}/cancel", headers={"X-Request-ID": "story-2"})
    until(lambda: state()["status"] == "cancelled", "it is over")

    def told() -> list[dict[str, Any]]:
        lines = [(name, line) for name, process in processes.items() for line in process.log.splitlines()]
        return [json.loads(line) | {"from": name} for name, line in story.of(lines, "story-1")]

    until(lambda: told()[-1]["message"] == "job_ended", "its end is written")
    lines = told()
    seen = [(line["from"], line["message"]) for line in lines]
    assert seen[0] == ("api", "request")
    assert ("worker", "child_ended") in seen
    assert ("worker-maintenance", "rescued") in seen
    assert seen[-1] == ("worker-2", "job_ended")
    for line in lines:
        assert line["job_id"] == job["id"]
        assert line["request_id"] == "story-1"
        if line["from"] != "api":
            assert line["kind"] == "sleep"
            assert line["attempt"] in (1, 2, 3)
    assert lines[-1]["outcome"] == "cancelled"
