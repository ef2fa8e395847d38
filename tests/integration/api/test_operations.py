"""What operators and machines ask: kinds, queues, health, OpenAPI."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from psycopg.rows import DictRow
from pydantic import SecretStr

from app.api import counts, middleware, operations
from app.jobs.kinds import all_kinds
from app.queues import ALL_QUEUES
from tests.integration.api.conftest import NOOP, created, problem
from tests.servers import Postgres, Redis

Serve = Callable[..., httpx.Client]
Insert = Callable[..., UUID]
Db = psycopg.Connection[DictRow]


def test_kinds_come_with_their_schemas(api: httpx.Client) -> None:
    kinds = {kind["kind"]: kind for kind in api.get("/api/kinds").json()["kinds"]}
    assert list(kinds) == sorted(all_kinds())
    sleep = kinds["sleep"]
    assert set(sleep) == {"kind", "description", "priority", "payload_schema", "result_schema"}
    assert sleep["payload_schema"]["properties"]["seconds"]["maximum"] == 86_400
    assert sleep["payload_schema"]["additionalProperties"] is False
    assert "slept" in sleep["result_schema"]["properties"]


def test_demo_kinds_can_be_left_out(serve: Serve) -> None:
    api = serve(demo_jobs=False)
    assert "flaky" not in [kind["kind"] for kind in api.get("/api/kinds").json()["kinds"]]
    problem(api.post("/api/jobs", json=NOOP), 422, "invalid-request")
    assert "FlakyJob" not in api.get("/openapi.json").text


RUNNING = {"status": "running", "attempt": 1, "lease_token": uuid4(), "lease_expires_at": "2100-01-01"}


def test_queues_tell_how_much_waits_where(serve: Serve, insert_job: Insert, redis: Redis) -> None:
    low = {"queue": "low_priority", "priority": "low"}
    long_ago = datetime.now(UTC) - timedelta(seconds=100)
    insert_job(**low, run_at=long_ago)
    insert_job(**low, run_at=long_ago + timedelta(seconds=50), published_at=long_ago)
    insert_job(**low, run_at="2100-01-01")
    insert_job(**RUNNING)
    redis.client.lpush("low_priority", "x", "y")
    queues = {queue.pop("name"): queue for queue in serve(queue_window=7).get("/api/queues").json()["queues"]}
    assert list(queues) == list(ALL_QUEUES)
    empty = {"queued": 0, "running": 0, "oldest_queued_seconds": None, "messages": 0, "window": 7}
    assert 100 <= queues["low_priority"].pop("oldest_queued_seconds") < 130
    assert queues["low_priority"] == {"queued": 3, "running": 0, "messages": 2, "window": 7}
    assert queues["default"] == {**empty, "running": 1}
    assert queues["high_priority"] == empty
    assert queues["maintenance"] == {**empty, "window": None}


def test_queues_count_all_that_waits(serve: Serve, insert_job: Insert, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it travels in groups, waits for dispatch, or has a message: each of them is in another index."""
    monkeypatch.setattr(counts, "EXACT_UP_TO", 5)
    api = serve()
    for _ in range(2):
        insert_job()
        insert_job(short=True)
        insert_job(published_at=datetime.now(UTC))
    seen = {queue["name"]: queue["queued"] for queue in api.get("/api/queues").json()["queues"]}
    assert seen == {**dict.fromkeys(ALL_QUEUES, 0), "default": 6}


# --- health ----------------------------------------------------------------------------------------------------------

FINE = {"postgres": "ok", "migrations": "ok", "redis": "ok", "storage": "ok"}


@pytest.mark.parametrize("path", ["/health", "/health/ready"])
def test_ready(api: httpx.Client, path: str) -> None:
    answer = api.get(path)
    assert (answer.status_code, answer.json()) == (200, {"status": "ok", "checks": FINE})


def test_live_asks_nobody(api: httpx.Client) -> None:
    assert api.get("/health/live").json() == {"status": "ok"}


@pytest.fixture
def _no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look for each question."""
    monkeypatch.setattr(operations, "LOOK_SECONDS", 0.0)


def test_who_asks_without_end_makes_it_look_no_more_often(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "LOOK_SECONDS", 3600.0)
    look = AsyncMock(wraps=operations._look)
    monkeypatch.setattr(operations, "_look", look)
    api = serve(max_requests=1)
    with ThreadPoolExecutor(20) as pool:
        paths = ["/health", "/health/ready"] * 50
        assert {answer.json()["status"] for answer in pool.map(api.get, paths)} == {"ok"}
    assert look.await_count == 1


def test_only_the_health_checks_themselves_go_uncounted() -> None:
    for path in ("/health", "/health/live", "/health/ready", "/events", f"/api/jobs/{uuid4()}/events"):
        assert middleware.UNCOUNTED.fullmatch(path), path
    for path in ("/healthy", "/health/", "/health/ready/x", "/api/files/events", "/x/events", "/api/jobs/a/b/events"):
        assert not middleware.UNCOUNTED.fullmatch(path), path


@pytest.mark.parametrize("revision", [None, "", "0000"])
def test_a_database_that_is_not_migrated(serve: Serve, postgres: Postgres, revision: str | None) -> None:
    url = postgres.another_database(f"unmigrated_{uuid4().hex}")
    if revision is not None:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE TABLE alembic_version (version_num text)")
            connection.execute("INSERT INTO alembic_version SELECT %(v)s::text WHERE %(v)s <> ''", {"v": revision})
    api = serve(database_url=SecretStr(url))
    answer = api.get("/health/ready")
    assert answer.status_code == 503
    assert answer.json()["status"] == "unavailable"
    assert answer.json()["checks"]["postgres"] == "ok"
    assert "python -m app.migrate" in answer.json()["checks"]["migrations"]
    # What needs the tables says the same, and is no mistake of ours: a deploy may start in any order.
    problem(api.post("/api/jobs", json=NOOP), 503, "unavailable")


def test_a_newer_database_is_fine(api: httpx.Client, db: Db) -> None:
    [before] = db.execute("SELECT version_num FROM alembic_version").fetchall()
    db.execute("UPDATE alembic_version SET version_num = '9999'")
    try:
        assert api.get("/health/ready").json()["checks"] == FINE
    finally:
        db.execute("UPDATE alembic_version SET version_num = %(version_num)s", before)


@pytest.mark.usefixtures("_no_memory")
def test_without_storage_it_is_degraded(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    api = serve(storage_url=f"file://{folder}")
    assert api.get("/health/ready").json()["status"] == "ok"
    folder.rmdir()
    folder.write_bytes(b"not a folder")
    answer = api.get("/health/ready")
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    assert answer.json()["checks"] == {**FINE, "storage": "unavailable"}


# --- OpenAPI ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openapi(address: str) -> dict[str, Any]:
    document: dict[str, Any] = httpx.get(f"{address}/openapi.json").json()
    return document


def test_openapi_shows_each_kinds_payload(openapi: dict[str, Any]) -> None:
    schemas = openapi["components"]["schemas"]
    body = openapi["paths"]["/api/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["discriminator"]["propertyName"] == "kind"
    for name, kind in all_kinds().items():
        job = schemas[body["discriminator"]["mapping"][name].rpartition("/")[2]]
        assert job["description"] == kind.description
        payload = schemas[job["properties"]["payload"]["$ref"].rpartition("/")[2]]
        assert payload["properties"].keys() == kind.payload.model_fields.keys()
    # Names that a generated client can live with.
    assert all(re.fullmatch("[A-Za-z]+", name) for name in schemas), list(schemas)


def test_openapi_shows_every_answer_and_header(openapi: dict[str, Any]) -> None:
    operations = {
        operation["operationId"]: operation for path in openapi["paths"].values() for operation in path.values()
    }
    assert len(operations) == 15
    shown = {name: set(operation["responses"]) for name, operation in operations.items()}
    assert shown["create_job"] == {"200", "202", "400", "401", "413", "415", "422", "503"}
    assert shown["retry_job"] == {"202", "401", "404", "409", "422", "503"}
    assert shown["upload_file"] == {"201", "400", "401", "413", "415", "422", "503", "507"}
    for name, operation in operations.items():
        for status, response in operation["responses"].items():
            assert "X-Request-ID" in response["headers"]
            if status >= "400" and name != "ready":
                assert list(response["content"]) == ["application/problem+json"], (name, status)
        assert ("security" in operation) == (name not in ("live", "ready"))
    assert "Location" in operations["create_job"]["responses"]["202"]["headers"]
    assert {p["name"] for p in operations["create_job"]["parameters"]} == {"Idempotency-Key", "X-Request-ID"}
    assert "multipart/form-data" in operations["upload_file"]["requestBody"]["content"]
    assert "application/octet-stream" in operations["get_file_content"]["responses"]["200"]["content"]
    assert openapi["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"


def test_a_job_made_from_its_location(api: httpx.Client) -> None:
    answer = api.post("/api/jobs", json=NOOP)
    assert api.get(answer.headers["location"]).json()["id"] == created(answer)["id"]
