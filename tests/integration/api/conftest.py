"""What the tests of the HTTP interface share. PostgreSQL, Redis and sockets are real."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import httpx
import psycopg
import pytest
from psycopg.rows import DictRow
from pydantic import SecretStr

from app.settings import Settings, get_settings
from tests import processes
from tests.processes import Process
from tests.servers import Redis, free_port
from tests.waiting import until

NOOP: dict[str, Any] = {"kind": "flaky", "payload": {"failures": 0}}


@pytest.fixture(scope="session")
def address(environment: Redis) -> Iterator[str]:
    """One API for all tests that neither change its settings nor take its servers away.

    It writes no statistics: they would come some seconds after what they count, in the middle of another test.
    """
    with processes.serving(get_settings().model_copy(update={"job_heartbeat_seconds": 3600})) as address:
        yield address


@pytest.fixture
def api(address: str, db: object, redis: Redis) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=10) as client:
        yield client


@pytest.fixture
def serve(settings: Settings, db: object, redis: Redis) -> Iterator[Callable[..., httpx.Client]]:
    """serve(max_payload_bytes=100, ...) -> a client of another API in this process, with these settings."""
    with ExitStack() as stack:

        def begin(*, api_keys: Sequence[tuple[str, str]] = (), **changed: Any) -> httpx.Client:
            keys = tuple((name, SecretStr(key)) for name, key in api_keys)
            address = stack.enter_context(processes.serving(settings.model_copy(update={"api_keys": keys, **changed})))
            return stack.enter_context(httpx.Client(base_url=address, timeout=10))

        yield begin


@pytest.fixture
def serve_process(db: object, redis: Redis, tmp_path: Path) -> Iterator[Callable[..., tuple[httpx.Client, Process]]]:
    """serve_process(**env) -> a client of `python -m app.api` in a process of its own, and that process."""
    with ExitStack() as stack:

        def begin(**env: Any) -> tuple[httpx.Client, Process]:
            port = free_port()
            process = stack.enter_context(processes.running("app.api", tmp_path, PORT=port, **env))
            client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10))
            until(lambda: process.process.poll() is not None or answers(client), "the API answers")
            assert process.process.poll() is None, process.log
            return client, process

        yield begin


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def stored(settings: Settings) -> Callable[[], list[str]]:
    """The names of the files in the storage's folder."""
    folder = Path(settings.storage_url.removeprefix("file://"))
    return lambda: sorted(path.name for path in folder.iterdir())


def problem(answer: httpx.Response, status: int, slug: str | None = None) -> dict[str, Any]:
    """The answer's problem+json, checked for the shape that every error has."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["status"] == status
    assert body["type"].startswith("urn:jobstack:problem:")
    assert slug is None or body["type"].endswith(f":{slug}"), body
    assert body["title"]
    assert body["detail"]
    assert len(answer.content) < 10_000, "it repeats what was sent"
    assert body["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    return body


def count(db: psycopg.Connection[DictRow], table: str = "jobs") -> int:
    [row] = db.execute(f"SELECT count(*) AS n FROM {table}")
    return int(row["n"])


def created(answer: httpx.Response) -> dict[str, Any]:
    """The job of a 202."""
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job


def waiting(redis: Redis, queue: str) -> list[bytes]:
    """The messages in a queue's list."""
    return cast(list[bytes], redis.client.lrange(queue, 0, -1))
