"""Which certificates are taken from PostgreSQL and Redis, by whom, and what is said of the others."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import celery
import httpx
import kombu.exceptions
import psycopg
import pytest
import redis

from app.celery_app import configuration
from app.database import Database, open_pool
from app.jobs import messages
from app.settings import Settings, get_settings
from app.tls import is_private, postgres_url, unverified
from tests.processes import ROOT, Process
from tests.security.tls import CERTIFICATES, Authority, front
from tests.servers import Postgres, Redis
from tests.waiting import until

# What OpenSSL calls it, in Python's words and in libpq's.
SAID = {
    "expired": "certificate (verify failed|has expired)",
    "of another host": "mismatch|not valid for|does not match host name|verify failed",
    "of an unknown authority": "verify failed",
}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def connect(
    environment: Redis, postgres: Postgres, authority: Authority, monkeypatch: Any
) -> Iterator[Callable[..., Settings]]:
    """connect("expired", redis="?ssl_...") -> the settings of a stack whose servers have such certificates."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    with ExitStack() as stack:

        def begin(sort: str, *, redis: str = "", postgresql: str = "?sslmode=verify-full") -> Settings:
            ports = [
                stack.enter_context(front(urlsplit(url).port or 0, authority.context(sort), postgres="postgres" in url))
                for url in (environment.url, postgres.url)
            ]
            plain = urlsplit(postgres.url)
            user = plain.netloc.rpartition("@")[0]
            monkeypatch.setenv("REDIS_URL", f"rediss://:secret@localhost:{ports[0]}/0{redis}")
            monkeypatch.setenv("DATABASE_URL", f"postgresql://{user}@localhost:{ports[1]}{plain.path}{postgresql}")
            get_settings.cache_clear()
            return get_settings()

        yield begin


def publisher(settings: Settings) -> Any:
    return messages.connect(settings).ping()


def publisher_of_the_api(settings: Settings) -> Any:
    async def ping() -> Any:
        # Its own limit is so short that a busy machine does not come to look at the certificate.
        async with messages.connect_async(settings, seconds=10) as client:
            return await client.ping()

    return asyncio.run(ping())


def celery_app(settings: Settings) -> celery.Celery:
    app = celery.Celery(set_as_current=False)
    app.conf.update(configuration(settings), broker_connection_retry=False)
    return app


def broker(settings: Settings) -> Any:
    with celery_app(settings).connection() as connection:
        channel: Any = connection.default_channel
        return channel.client.ping()


def results(settings: Settings) -> Any:
    backend: Any = celery_app(settings).backend
    return backend.client.ping()


def database(settings: Settings) -> Any:
    database = Database(settings, "test")
    try:
        return database.run("SELECT 1")
    finally:
        database.close()


def pool(settings: Settings) -> Any:
    async def ask() -> Any:
        async with await psycopg.AsyncConnection.connect(str(open_pool(settings).conninfo)) as connection:
            return await (await connection.execute("SELECT 1")).fetchall()

    return asyncio.run(ask())


CLIENTS = [publisher, publisher_of_the_api, broker, results, database, pool]
FAILURES = (redis.RedisError, psycopg.OperationalError, kombu.exceptions.OperationalError)


@pytest.mark.parametrize("client", CLIENTS)
def test_only_a_good_certificate_is_taken(connect: Callable[..., Settings], client: Callable[[Settings], Any]) -> None:
    for sort in CERTIFICATES:
        settings = connect(sort)
        if sort == "good":
            assert client(settings)
        else:
            with pytest.raises(FAILURES, match=SAID[sort]):
                client(settings)


@pytest.mark.parametrize("client", CLIENTS)
def test_who_asks_for_none_gets_none_and_is_warned(
    connect: Callable[..., Settings], client: Callable[..., Any]
) -> None:
    for sort in CERTIFICATES:
        settings = connect(sort, redis="?ssl_cert_reqs=CERT_NONE", postgresql="?sslmode=require")
        assert client(settings)
        assert len(settings.unverified_connections()) == 2


def test_the_warning_comes_once_and_names_no_password(connect: Callable[..., Settings], start: Any) -> None:
    settings = connect("good", redis="?ssl_cert_reqs=none", postgresql="?sslmode=require")
    process = start("beat", DATABASE_URL=settings.database_conninfo, REDIS_URL=settings.broker_url)
    warnings = [line for line in process.log.splitlines() if "tls_not_verified" in line]
    assert ["DATABASE_URL: sslmode=require" in warnings[0], "REDIS_URL: ssl_cert_reqs=none" in warnings[1]] == [
        True,
        True,
    ]
    assert len(warnings) == 2
    assert "secret" not in process.log


def test_an_authority_of_ones_own_can_be_named(
    connect: Callable[..., Settings], authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {
        "redis": f"?ssl_ca_certs={authority.file}",
        "postgresql": f"?sslmode=verify-full&sslrootcert={authority.file}",
    }
    settings = connect("good", **own)
    monkeypatch.delenv("SSL_CERT_FILE")
    for client in CLIENTS:
        assert client(settings), client


# --- what processes say ----------------------------------------------------------------------------------------------

ONCE = {
    "migrate": ["-m", "app.migrate", "--check"],
    "a script": ["scripts/task_manager.py", "status", "0197f000-0000-7000-8000-000000000000", "--json"],
}


@pytest.mark.parametrize("name", ONCE)
def test_what_ends_says_it_in_a_line(connect: Callable[..., Settings], name: str) -> None:
    connect("expired")
    run = subprocess.run(
        [sys.executable, *ONCE[name]],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    said = run.stdout + run.stderr
    assert run.returncode not in (0, -9), said
    assert "certificate" in said
    assert "Traceback" not in said
    assert "secret" not in said


@pytest.mark.parametrize("name", ["worker", "beat"])
def test_what_goes_on_says_it_and_waits(connect: Callable[..., Settings], tmp_path: Path, name: str) -> None:
    settings = connect("expired")
    urls = {"DATABASE_URL": settings.database_conninfo, "REDIS_URL": settings.broker_url}
    # Not by `start`, which waits for a sign of life: it gives none before PostgreSQL answers.
    process = Process([sys.executable, "-m", name], tmp_path, **urls)
    try:
        until(lambda: "certificate" in process.log, "it is said", seconds=30)
        assert process.process.poll() is None
        assert "Traceback" not in process.log
    finally:
        process.kill()


def test_the_api_is_not_ready_and_says_why(
    connect: Callable[..., Settings], serve_process: Callable[..., tuple[httpx.Client, Process]]
) -> None:
    good, expired = connect("good"), connect("expired")
    api, process = serve_process(DATABASE_URL=good.database_conninfo, REDIS_URL=expired.broker_url)
    body = api.get("/health/ready").json()
    assert (body["status"], body["checks"]["postgres"], body["checks"]["redis"]) == ("degraded", "ok", "unavailable")
    # Accepted all the same: the message follows when Redis can be trusted.
    assert api.post("/api/jobs", json={"kind": "sleep", "payload": {"seconds": 0}}).status_code == 202
    until(lambda: "certificate" in process.log, "it is said")
    assert "Traceback" not in process.log


# --- what a URL without a word about it means -------------------------------------------------------------------------


PRIVATE = """
localhost 127.0.0.1 [::1] postgres 10.1.2.3 192.168.1.1 100.64.0.1 [fd00::1] db.internal postgres.railway.internal:5432
db.default.svc.cluster.local a,b:5433 u:p@pg u:p@[fd00::1]:5432
"""


@pytest.mark.parametrize("host", ["", *PRIVATE.split()])
def test_a_private_server_is_as_libpq_has_it(host: str) -> None:
    url = f"postgresql://{host}/jobs"
    assert postgres_url(url) == url


@pytest.mark.parametrize(
    "host", ["db.example.com", "u:p%40x@db.example.com:5433", "8.8.8.8", "[2606:4700::1]", "pg,db.example.com"]
)
def test_a_public_one_must_show_a_certificate(host: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.touch()
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    url = f"postgresql://{host}/jobs?options=-c%20a%3Db"
    assert postgres_url(url) == f"{url}&sslmode=verify-full&sslrootcert={bundle}"
    for mode in ("disable", "prefer", "require"):
        assert postgres_url(f"{url}&sslmode={mode}") == f"{url}&sslmode={mode}"
    monkeypatch.setenv("PGSSLMODE", "require")
    assert postgres_url(url) == url


def test_a_public_name_is_verified_by_itself(connect: Callable[..., Settings], authority: Authority) -> None:
    for sort, name in (("good", "db.example.com"), ("good", "db.example.org"), ("expired", "db.example.com")):
        server = urlsplit(connect(sort).database_conninfo)
        user = server.netloc.rpartition("@")[0]
        url = f"postgresql://{user}@{name}:{server.port}{server.path}?hostaddr=127.0.0.1"
        if (sort, name) == ("good", "db.example.com"):
            psycopg.connect(postgres_url(url)).close()
        else:
            with pytest.raises(psycopg.OperationalError, match="certificate"):
                psycopg.connect(postgres_url(url))


def test_what_is_warned_of() -> None:
    assert unverified("R", "redis://cache:6379") is None
    assert unverified("R", "rediss://cache.example.com") is None
    assert unverified("R", "redis://:secret@cache.example.com")
    assert unverified("D", "postgresql://db.example.com/x?sslmode=prefer")
    assert unverified("D", "postgresql://db/x?sslmode=prefer") is None
    assert unverified("D", "postgresql://db/x?sslmode=require&sslrootcert=/ca.pem") is None
    assert not is_private("example.com.")
