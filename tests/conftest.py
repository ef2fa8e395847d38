"""What all tests share: servers of their own for every test process, so that they run side by side."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import hypothesis
import psycopg
import pytest
import structlog
from psycopg.rows import DictRow, dict_row
from uuid_utils.compat import uuid7

from app import migrate
from app.files import store
from app.files.store import FileStore
from app.jobs import statements
from app.jobs.kinds import all_kinds
from app.jobs.requests import shown
from app.queues import QUEUE_OF_PRIORITY
from app.settings import Settings, get_settings
from tests import processes, servers
from tests.processes import Process
from tests.servers import Postgres, Redis
from worker.runner import Claim, Runner

# The same examples each time, however slow the machine is at this moment.
hypothesis.settings.register_profile(
    "jobstack", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("jobstack")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: at the end nobody waits for one of them."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The PostgreSQL server. Whoever stops it starts it again."""
    with servers.postgres_server() as server:
        yield server


@pytest.fixture(scope="session")
def environment(postgres: Postgres) -> Iterator[Redis]:
    """PostgreSQL (migrated by Alembic), Redis and a storage folder, named in this process's environment."""
    folder = servers.folder()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        redis = stack.enter_context(servers.redis_server())
        os.environ.update(
            DATABASE_URL=postgres.url,
            REDIS_URL=redis.url,
            STORAGE_URL=f"file://{folder}/files",
            JOBSTACK_RUN_DIR=str(folder),
            LOG_FORMAT="json",
        )
        get_settings.cache_clear()
        migrate.upgrade()
        yield redis
        get_settings.cache_clear()


@pytest.fixture(autouse=True)
def _settings_of_this_test() -> Iterator[None]:
    """What a test read from an environment that it changed is not there for the next, nor logs as it set them up."""
    yield
    get_settings.cache_clear()
    structlog.reset_defaults()


@pytest.fixture
def redis_url(environment: Redis) -> str:
    return environment.url


@pytest.fixture
def settings(environment: Redis) -> Settings:
    return get_settings()


@pytest.fixture
def redis(environment: Redis) -> Redis:
    """The Redis server, emptied."""
    environment.client.flushall()
    return environment


@pytest.fixture
def db(settings: Settings) -> Iterator[psycopg.Connection[DictRow]]:
    """A connection to the database, with no jobs, files and ticks in it; the storage is emptied with it.

    Bytes that earlier tests left, without their rows, would be another database's files to the first clean-up.
    """
    if settings.storage_url.startswith("file://"):
        # The folder itself stays: processes that are running write into it.
        for path in Path(settings.storage_url.removeprefix("file://")).glob("*"):
            path.unlink(missing_ok=True)
    with psycopg.connect(settings.database_conninfo, autocommit=True, row_factory=dict_row) as connection:
        connection.execute("TRUNCATE jobs, job_steps, job_attempts, job_files, files, schedule_ticks")
        yield connection


@pytest.fixture
def api(settings: Settings, db: object, redis: Redis) -> Iterator[httpx.Client]:
    """The API behind a real socket."""
    with processes.serving(settings) as address, httpx.Client(base_url=address, timeout=10) as client:
        yield client


@pytest.fixture
def start(tmp_path: Path, redis: Redis, db: object) -> Iterator[Callable[..., Process]]:
    """start("worker", **env) -> a running process of the stack; all are killed at the end."""
    with ExitStack() as stack:

        def begin(name: str, **env: object) -> Process:
            return stack.enter_context(processes.started(name, tmp_path, **env))

        yield begin


@pytest.fixture
def insert_job(db: psycopg.Connection[DictRow]) -> Callable[..., UUID]:
    """insert_job("sleep", {"seconds": 0}, status="queued", ...) -> the id of a row put in by SQL."""

    def insert(kind: str = "sleep", payload: dict[str, Any] | None = None, **columns: Any) -> UUID:
        row = {
            "id": uuid7(),
            "kind": kind,
            "priority": "default",
            "queue": "default",
            "payload": json.dumps({"seconds": 0} if payload is None else payload),
            "max_attempts": 4,
            **columns,
        }
        names = ", ".join(row)
        db.execute(f"INSERT INTO jobs ({names}) VALUES ({', '.join(f'%({name})s' for name in row)})", row)
        job_id: UUID = row["id"]
        return job_id

    return insert


@pytest.fixture
def get_job(db: psycopg.Connection[DictRow]) -> Callable[[UUID], DictRow]:
    """The job's whole row."""

    def get(job_id: UUID) -> DictRow:
        row = db.execute("SELECT * FROM jobs WHERE id = %s", [job_id]).fetchone()
        assert row is not None
        return row

    return get


@pytest.fixture
def upload(settings: Settings, db: psycopg.Connection[DictRow]) -> Callable[..., str]:
    """upload("a.txt", b"...") -> the id of a stored file."""

    def put(name: str, data: bytes, content_type: str = "application/octet-stream") -> str:
        file_id = uuid7()
        # The way past the API: straight into the folder, as the API would leave it.
        folder = Path(settings.storage_url.removeprefix("file://"))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / str(file_id)).write_bytes(data)
        row = {"id": file_id, "name": name, "size": len(data), "content_type": content_type}
        db.execute(store.INSERT, {**row, "sha256": hashlib.sha256(data).hexdigest()})
        return str(file_id)

    return put


@pytest.fixture
def runner(settings: Settings, db: object) -> Iterator[Runner]:
    runner = Runner(settings, worker="test", may_kill=False)
    yield runner
    runner.close()


@pytest.fixture
def run_kind(runner: Runner, db: psycopg.Connection[DictRow]) -> Callable[..., dict[str, Any]]:
    """run_kind("thumbnail", {...}) -> the job after one attempt, as the API would show it.

    The row is inserted already claimed and run in this process, through the real runner. `job_id=` goes on with a job
    that an earlier call left queued.
    """

    def run(kind: str, payload: dict[str, Any], *, job_id: str | None = None, **columns: Any) -> dict[str, Any]:
        if job_id is None:
            spec = all_kinds()[kind]
            claimed = {
                **runner.identity(),
                "id": uuid7(),
                "kind": kind,
                "priority": spec.priority,
                "queue": QUEUE_OF_PRIORITY[spec.priority],
                "payload": json.dumps(payload),
                "max_attempts": spec.max_attempts,
                "file_ids": list(spec.file_ids(spec.payload.model_validate(payload))),
                **columns,
            }
            [row] = runner.database.run(statements.CREATE_CLAIMED, claimed)
            claim = Claim(**row)
        else:
            db.execute("UPDATE jobs SET run_at = now() WHERE id = %s", [job_id])
            again = runner.claim(UUID(job_id))
            assert again is not None, "the job is not queued"
            claim = again
        runner.run(claim)
        [row] = runner.database.run(statements.GET, {"id": claim.id})
        return shown(row).model_dump(mode="json")

    return run


@pytest.fixture
def read_file(settings: Settings) -> Callable[[str], bytes]:
    """The bytes of a stored file, such as a result."""
    files = FileStore(settings)

    def read(file_id: str) -> bytes:
        with files.open(UUID(file_id)) as stream:
            return stream.read()

    return read
