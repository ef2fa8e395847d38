"""Redis or PostgreSQL stopped or frozen: what still works works at once, what doesn't says so in time."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
from psycopg.rows import DictRow

from app.database import Database
from app.jobs.dispatch import dispatch
from app.jobs.messages import job_id_of
from app.settings import Settings
from tests.integration.api.conftest import NOOP, count, created, problem, waiting
from tests.processes import Process
from tests.servers import Postgres, Redis
from tests.waiting import until

Db = psycopg.Connection[DictRow]
Serve = Callable[..., httpx.Client]
# Where time counts: in a process of its own, the API does not share its interpreter with the tests.
ServeProcess = Callable[..., tuple[httpx.Client, Process]]
# The API's own limits (`app/api/within.py`: 4 s for PostgreSQL; far less for Redis) and what a loaded machine adds.
WITHOUT_POSTGRESQL, WITHOUT_REDIS = 8, 5


@contextmanager
def away(server: Redis | Postgres, how: str) -> Iterator[None]:
    leave, come_back = {"stopped": (server.stop, server.start), "frozen": (server.freeze, server.thaw)}[how]
    leave()
    try:
        yield
    finally:
        come_back()


def timed(call: Callable[[], httpx.Response]) -> tuple[httpx.Response, float]:
    began = time.monotonic()
    answer = call()
    return answer, time.monotonic() - began


# --- Redis -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["stopped", "frozen"])
def test_jobs_are_accepted_without_redis_and_published_later(
    serve_process: ServeProcess, db: Db, redis: Redis, settings: Settings, database: Database, how: str
) -> None:
    api, _ = serve_process()
    created(api.post("/api/jobs", json=NOOP))
    with away(redis, how):
        answers = [timed(lambda: api.post("/api/jobs", json=NOOP)) for _ in range(20)]
        with ThreadPoolExecutor(20) as pool:
            answers += pool.map(lambda _: timed(lambda: api.post("/api/jobs", json=NOOP)), range(20))
        answers.append(timed(lambda: api.post("/api/jobs/batch", json={"jobs": [NOOP] * 100})))
        assert {answer.status_code for answer, _ in answers} == {202}
        assert max(seconds for _, seconds in answers) < WITHOUT_REDIS
        assert count(db) == 141
    # What went in just before Redis was missed counts as published until repair's patience is over.
    db.execute("UPDATE jobs SET published_at = published_at - interval '1 minute'")

    def all_published() -> bool:
        dispatch(database, redis.client, settings)
        rows = db.execute("SELECT id FROM jobs").fetchall()
        return {row["id"] for row in rows} == {job_id_of(message) for message in waiting(redis, "default")}

    until(all_published, "every job has its message")

    def publishes_by_itself() -> bool:
        dispatch(database, redis.client, settings)  # no older row may be waiting
        job_id = created(api.post("/api/jobs", json=NOOP))["id"]
        [row] = db.execute("SELECT published_at FROM jobs WHERE id = %s", [job_id])
        return row["published_at"] is not None

    until(publishes_by_itself, "the API has seen that Redis is back")


@pytest.mark.parametrize("how", ["stopped", "frozen"])
def test_all_else_works_without_redis(serve: Serve, redis: Redis, how: str) -> None:
    api = serve()
    job = created(api.post("/api/jobs", json=NOOP))
    with away(redis, how):
        ready, seconds = timed(lambda: api.get("/health/ready"))
        assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
        assert ready.json()["checks"]["redis"] == "unavailable"
        assert seconds < WITHOUT_REDIS
        assert {queue["messages"] for queue in api.get("/api/queues").json()["queues"]} == {None}
        assert "jobstack_queue_messages{" not in api.get("/metrics").text
        assert created(api.post(f"/api/jobs/{job['id']}/cancel"))["status"] == "cancelled"
        assert created(api.post(f"/api/jobs/{job['id']}/retry"))["status"] == "queued"
    until(lambda: api.get("/health/ready").json()["status"] == "ok", "it is ready again")


# --- PostgreSQL ------------------------------------------------------------------------------------------------------

SOMEBODY = uuid4()
CALLS: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/api/jobs", {"json": NOOP, "headers": {"Idempotency-Key": "in the dark"}}),
    ("POST", "/api/jobs/batch", {"json": {"jobs": [NOOP, NOOP]}}),
    ("GET", "/api/jobs", {}),
    ("GET", f"/api/jobs/{SOMEBODY}", {}),
    ("POST", f"/api/jobs/{SOMEBODY}/cancel", {}),
    ("POST", f"/api/jobs/{SOMEBODY}/retry", {}),
    ("POST", "/api/files", {"files": {"file": ("a", b"abc")}}),
    ("GET", f"/api/files/{SOMEBODY}", {}),
    ("GET", f"/api/files/{SOMEBODY}/content", {}),
    ("GET", "/api/queues", {}),
]


@pytest.mark.parametrize("how", ["stopped", "frozen"])
def test_without_postgresql_every_call_says_503_in_time_and_recovers(
    serve_process: ServeProcess, postgres: Postgres, settings: Settings, stored: Callable[[], list[str]], how: str
) -> None:
    api, process = serve_process()
    files = stored()
    with ThreadPoolExecutor(60) as pool:
        # So many that the pool is at its largest, and some have to wait for a connection.
        assert {answer.status_code for answer in pool.map(lambda _: api.get("/api/jobs"), range(30))} == {200}

        def call(method: str, path: str, options: dict[str, Any]) -> tuple[httpx.Response, float]:
            return timed(lambda: api.request(method, path, **options))

        with away(postgres, how):
            for _ in range(2):
                answers = list(pool.map(lambda each: call(*each), CALLS * 4))
                for answer, seconds in answers:
                    problem(answer, 503, "unavailable")
                    assert answer.headers["retry-after"]
                    assert seconds < WITHOUT_POSTGRESQL
            ready, seconds = call("GET", "/health/ready", {})
            assert (ready.status_code, ready.json()["status"]) == (503, "unavailable")
            assert ready.json()["checks"]["postgres"] == "unavailable"
            assert ready.json()["checks"]["redis"] == "ok"
            assert seconds < WITHOUT_POSTGRESQL
            metrics, seconds = call("GET", "/metrics", {})
            assert metrics.status_code == 200
            assert seconds < WITHOUT_POSTGRESQL
            assert api.get("/health/live").status_code == 200
        until(lambda: api.get("/health/ready").status_code == 200, "it is ready again")
        # Not by and by, one dead connection after the other.
        answers = list(pool.map(lambda _: call("GET", "/api/jobs", {}), range(30)))
        assert {answer.status_code for answer, _ in answers} == {200}
    again = api.post("/api/jobs", **CALLS[0][2])
    assert again.status_code in (200, 202)
    with psycopg.connect(settings.database_conninfo) as db:
        [[jobs]] = db.execute("SELECT count(*) FROM jobs WHERE idempotency_key = 'in the dark'")
    assert jobs == 1
    assert stored() == files
    assert "Traceback" not in process.log


def test_a_restart_of_postgresql_between_two_calls_is_not_noticed(serve: Serve, postgres: Postgres) -> None:
    api = serve()
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda _: api.get("/api/jobs"), range(40)))
        postgres.restart()
        answers = list(pool.map(lambda _: api.get("/api/jobs"), range(20)))
    assert {answer.status_code for answer in answers} == {200}


def test_an_api_that_starts_before_its_database_waits_for_it(serve: Serve, postgres: Postgres) -> None:
    with away(postgres, "stopped"):
        api = serve()
        assert api.get("/health/live").status_code == 200
        problem(api.post("/api/jobs", json=NOOP), 503, "unavailable")
    until(lambda: api.post("/api/jobs", json=NOOP).status_code == 202, "it accepts jobs")
