"""API keys, and the id of each request."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
from psycopg.rows import DictRow
from structlog.testing import capture_logs

from tests.integration.api.conftest import NOOP, count, created, problem
from tests.processes import ROOT

Db = psycopg.Connection[DictRow]
Serve = Callable[..., httpx.Client]
KEYS = [("anna", "key-a"), ("otto", "key-o")]

OPEN = ["/health", "/health/live", "/health/ready", "/docs", "/openapi.json"]
CLOSED: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/api/jobs", {"json": NOOP}),
    ("POST", "/api/jobs", {"content": b"{nonsense"}),
    ("POST", "/api/jobs/batch", {"json": {"jobs": [NOOP]}}),
    ("GET", "/api/jobs", {}),
    ("GET", "/api/jobs?limit=0", {}),
    ("GET", f"/api/jobs/{uuid4()}", {}),
    ("GET", "/api/jobs/nonsense", {}),
    ("POST", f"/api/jobs/{uuid4()}/cancel", {}),
    ("POST", f"/api/jobs/{uuid4()}/retry", {}),
    ("POST", "/api/files", {"files": {"file": ("a", b"a")}}),
    ("GET", f"/api/files/{uuid4()}", {}),
    ("GET", f"/api/files/{uuid4()}/content", {}),
    ("GET", "/api/kinds", {}),
    ("GET", "/api/queues", {}),
    ("GET", "/metrics", {}),
]


@pytest.fixture(params=["local", "production"])
def app_env(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_locally_no_key_is_needed(serve: Serve) -> None:
    api = serve(app_env="local", api_keys=KEYS)
    created(api.post("/api/jobs", json=NOOP))
    created(serve(app_env="local").post("/api/jobs", json=NOOP))


def test_every_key_opens(serve: Serve, app_env: str) -> None:
    api = serve(app_env=app_env, api_keys=KEYS)
    for scheme, key in (("Bearer", "key-a"), ("bearer", "key-o")):
        created(api.post("/api/jobs", json=NOOP, headers={"Authorization": f"{scheme} {key}"}))


WRONG = ["Bearer wrong", "Bearer", "Bearer key-a key-o", "Bearer KEY-A", "Bearer key-", "Bearer anna", "Bearer \xfc"]


@pytest.mark.parametrize("header", [*WRONG, "Basic a2V5LWE=", "key-a", ""])
def test_a_key_that_is_sent_must_be_right(serve: Serve, app_env: str, header: str) -> None:
    api = serve(app_env=app_env, api_keys=KEYS)
    answer = api.get("/api/kinds", headers=[(b"Authorization", header.encode("latin-1"))])
    problem(answer, 401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_in_production_all_but_health_and_documentation_is_closed(serve: Serve, db: Db) -> None:
    api = serve(app_env="production", api_keys=KEYS)
    for path in OPEN:
        assert api.get(path).status_code == 200, path
    for method, path, options in CLOSED:
        # Before anything else is looked at: a stranger learns nothing, and costs nothing.
        assert "API_KEYS" in problem(api.request(method, path, **options), 401, "unauthorized")["detail"]
    assert count(db) == count(db, "files") == 0


def test_production_does_not_start_without_keys(environment: object) -> None:
    env = {**os.environ, "APP_ENV": "production", "STORAGE_SHARED": "true"}
    env.pop("API_KEYS", None)
    run = subprocess.run(
        [sys.executable, "-m", "app.api"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=30, check=False
    )
    assert run.returncode == 1
    assert "API_KEYS must be set" in run.stderr
    assert "Traceback" not in run.stderr


# --- X-Request-ID ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["a", "A-1_b.2", "x" * 128])
def test_a_request_id_is_taken(api: httpx.Client, db: Db, given: str) -> None:
    answer = api.post("/api/jobs", json=NOOP, headers={"X-Request-ID": given})
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == given
    assert db.execute("SELECT request_id FROM jobs").fetchall() == [{"request_id": given}]


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, "ü", "a/b", "<script>", "a:b"])
def test_or_made(api: httpx.Client, given: str | None) -> None:
    headers = [] if given is None else [(b"X-Request-ID", given.encode())]
    answer = api.post("/api/jobs", json=NOOP, headers=headers)
    made = answer.headers["x-request-id"]
    assert made == answer.json()["request_id"] != given
    assert len(made) == 32


def test_every_answer_has_one(api: httpx.Client) -> None:
    for path in ("/health/live", "/api/jobs", "/api/jobs/nonsense", "/nonsense", "/docs", "/"):
        assert api.get(path, headers={"X-Request-ID": "mine"}).headers["x-request-id"] == "mine"


def test_a_mistake_of_ours_is_a_500_with_the_id_and_without_the_traceback(
    api: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(row: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("app.api.jobs.shown", broken)
    with capture_logs() as lines:
        answer = api.post("/api/jobs", json=NOOP, headers={"X-Request-ID": "mine"})
    assert problem(answer, 500, "internal")["request_id"] == "mine"
    assert "secret" not in answer.text
    # We see it in the log.
    [mistake] = [line for line in lines if line["event"] == "mistake"]
    assert mistake["exc_info"]
    assert mistake["log_level"] == "error"
