"""Secrets are planted wherever there are some; nothing that can be looked at shows one. The log says who did what."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import psycopg
from psycopg.rows import DictRow

from app.jobs import messages
from app.settings import Settings
from tests.integration.api.conftest import NOOP, created
from tests.integration.api.test_create import in_days
from tests.processes import ROOT, Process
from tests.servers import Redis, free_port
from tests.waiting import until

KEY, SECOND, TOKEN, AWS = "k3y-3a7f19c05be2d648", "k3y-90be4f7712ac35d1", "t0ken-5be2d648aa01", "aw5-77c1d09e44b2f36a"
# So far ahead that no worker takes it, and no more than the API allows.
LATER = in_days(30)


def test_no_secret_is_shown_anywhere(
    serve_process: Callable[..., tuple[httpx.Client, Process]],
    start: Callable[..., Process],
    settings: Settings,
    redis: Redis,
    db: psycopg.Connection[DictRow],
) -> None:
    # In Redis's URL as in PostgreSQL's, "secret" is the password of the servers of these tests.
    env = {
        "APP_ENV": "production",
        "API_KEYS": f"web:{KEY},web:{SECOND}",
        "STORAGE_SHARED": "true",
        "AWS_SECRET_ACCESS_KEY": AWS,
        "FLOWER_BASIC_AUTH": f"admin:{TOKEN}",
        "LOG_LEVEL": "DEBUG",
    }
    api, process = serve_process(**env)
    worker = start("worker", **env)
    api.headers["Authorization"] = f"Bearer {KEY}"
    body = {
        "kind": "webhook",
        "payload": {
            "url": f"http://127.0.0.1:{free_port()}/",
            "body": {"password": "of-the-payload"},
            "headers": {"Authorization": f"Bearer {TOKEN}"},
        },
    }
    job = created(api.post("/api/jobs", json=body))
    until(lambda: api.get(f"/api/jobs/{job['id']}").json()["status"] == "failed", "it has run")
    waits = created(api.post("/api/jobs", json={**body, "run_at": LATER}))
    api.post(f"/api/jobs/{waits['id']}/cancel")
    api.post(f"/api/jobs/{waits['id']}/retry")
    # Keys where they don't belong.
    wrong = [
        api.get("/api/jobs", headers={"Authorization": f"Bearer {SECOND}x"}),
        api.get("/api/jobs", headers={"Authorization": f"Basic {SECOND}"}),
        api.post("/login", data={"key": f"{SECOND}x"}),
        api.post("/api/jobs", json={"kind": "sleep", "payload": {"seconds": SECOND}}),
        api.post("/api/jobs", content=f'{{"kind": "{SECOND}', headers={"Content-Type": "application/json"}),
    ]
    assert [answer.status_code for answer in wrong] == [401, 401, 401, 422, 400]
    api.post("/login", data={"key": KEY})
    api.post("/logout")
    answers = {
        path: api.get(path).text
        for path in ("/metrics", "/openapi.json", "/docs", "/api/kinds", "/api/queues", "/health/ready", "/login")
    } | {"wrong": "".join(answer.text for answer in wrong)}
    for path in ("/api/jobs", f"/api/jobs/{job['id']}", f"/jobs/{job['id']}", "/", "/jobs"):
        answers[path] = api.get(path).text
    # What Flower and `inspect` can show of a job is its message.
    answers["message"] = messages.job_message(messages.Address(job["id"], "webhook", "default"), settings)
    doctor = subprocess.run(
        [sys.executable, "scripts/task_manager.py", "status", waits["id"], "--json"],
        cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    answers["script"] = doctor.stdout + doctor.stderr
    answers["api's log"], answers["worker's log"] = process.log, worker.log

    for where, text in answers.items():
        for secret in (KEY, SECOND, TOKEN, AWS, ":secret@"):
            assert secret not in text, (where, secret)
        if where.endswith("log"):
            assert "of-the-payload" not in text, where

    # --- who did what ---
    lines = [json.loads(line) for line in process.log.splitlines() if '"audit"' in line]
    said = [(line["action"], line["key"], line.get("job")) for line in lines]
    expected: list[Any] = [("cancel", "web", waits["id"]), ("retry", "web", waits["id"]), ("login_failed", "", None)]
    assert said == [*expected, ("login", "web", None), ("logout", "web", None)]
    assert all(line["client"] == "127.0.0.1" and line["request_id"] for line in lines)


def test_the_client_of_an_audit_line_is_not_what_a_client_says(
    serve_process: Callable[..., tuple[httpx.Client, Process]],
) -> None:
    """The proxy in front adds the address that it saw to what came."""
    api, process = serve_process()
    job = created(api.post("/api/jobs", json={**NOOP, "run_at": LATER}))
    api.post(f"/api/jobs/{job['id']}/cancel", headers={"X-Forwarded-For": "1.2.3.4, 198.51.100.7, 10.0.0.3"})
    [line] = [json.loads(line) for line in process.log.splitlines() if '"audit"' in line]
    assert line["client"] == "198.51.100.7"
