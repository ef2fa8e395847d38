"""What the tests of a job's life share."""

import json
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from psycopg.rows import DictRow

from app.celery_app import celery_app
from app.database import Database
from app.jobs import messages, statements
from app.jobs.kinds import all_kinds
from app.settings import Settings
from tests import processes
from tests.integration import odd
from tests.processes import Process
from tests.servers import Redis
from tests.waiting import until
from worker.context import Context
from worker.runner import Runner

FINAL = ("succeeded", "failed", "cancelled")


class Jobs:
    """Jobs put in by SQL and messages put in by hand: a worker has no need of an API."""

    def __init__(self, database: Database, insert: Callable[..., UUID], redis: Redis, settings: Settings) -> None:
        self._database, self._redis, self._settings = database, redis, settings
        self.insert = insert

    def get(self, job_id: UUID) -> DictRow:
        """The job's whole row."""
        [row] = self._database.run("SELECT * FROM jobs WHERE id = %(id)s", {"id": job_id})
        return row

    def start(self, kind: str = "sleep", payload: dict[str, Any] | None = None, **columns: Any) -> UUID:
        """A queued job and its message."""
        job_id = self.insert(kind, payload, published_at="now()", **columns)
        self.send(job_id)
        return job_id

    def send(self, *job_ids: UUID) -> None:
        """A message for each, in this order."""
        self.send_rows(*map(self.get, job_ids))

    def send_rows(self, *rows: DictRow) -> None:
        for row in rows:
            address = messages.Address(row["id"], row["kind"], row["queue"])
            self._redis.client.lpush(row["queue"], messages.job_message(address, self._settings))

    def until(self, job_id: UUID, condition: Callable[[DictRow], Any], what: str, *, seconds: float = 60) -> DictRow:
        """The job's row, once `condition` holds for it."""

        def fits() -> DictRow | None:
            row = self.get(job_id)
            return row if condition(row) else None

        try:
            return until(fits, what, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; the job is {self.get(job_id)}") from None

    def running(self, job_id: UUID, *, attempt: int = 1, seconds: float = 60) -> DictRow:
        def is_running(row: DictRow) -> bool:
            return bool(row["status"] == "running" and row["attempt"] == attempt)

        return self.until(job_id, is_running, f"attempt {attempt} runs", seconds=seconds)

    def finished(self, job_id: UUID, *, seconds: float = 60) -> DictRow:
        return self.until(job_id, lambda row: row["status"] in FINAL, "the job is over", seconds=seconds)

    def attempts(self, job_id: UUID) -> list[DictRow]:
        """The unsuccessful ones, oldest first."""
        return self._database.run("SELECT * FROM job_attempts WHERE job_id = %(id)s ORDER BY id", {"id": job_id})


@pytest.fixture
def jobs(database: Database, insert_job: Callable[..., UUID], redis: Redis, settings: Settings) -> Jobs:
    return Jobs(database, insert_job, redis, settings)


# Everything that takes seconds in production, shorter. Not shorter still: a busy machine must not lose leases.
QUICK = {"JOB_HEARTBEAT_SECONDS": 0.5, "JOB_LEASE_SECONDS": 4, "CANCEL_GRACE_SECONDS": 1.5}


@pytest.fixture(scope="module")
def shared_worker(environment: Redis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A worker with two children and the kind `odd`, for all tests of a file."""
    with processes.started("odd", tmp_path_factory.mktemp("worker"), **QUICK) as process:
        yield process


def is_idle() -> bool:
    """Whether the only worker says that it has nothing: no job, and no last look for short ones."""
    # Not from the pool, whose connections are older than the server if a test restarted it.
    with celery_app.connection_for_write() as connection:
        inspect = celery_app.control.inspect(timeout=2, limit=1, connection=connection)
        # In the order in which a message passes through them.
        found = inspect.reserved(), inspect.active()
    return all(answer is not None and not any(answer.values()) for answer in found)


@pytest.fixture
def worker(shared_worker: Process, jobs: Jobs, redis: Redis) -> Process:
    """The file's worker, alive and idle."""
    assert shared_worker.process.poll() is None, shared_worker.log
    until(lambda: redis.length("default") == 0 and is_idle(), "the worker has done with the test before")
    return shared_worker


Cancel = Callable[..., None]


@pytest.fixture
def cancel(database: Database) -> Cancel:
    """cancel(job_id, ...) as the API does it."""

    def cancel_all(*job_ids: UUID) -> None:
        for job_id in job_ids:
            database.run(statements.CANCEL, {"id": job_id})

    return cancel_all


@pytest.fixture
def database(settings: Settings, db: object) -> Iterator[Database]:
    """A connection as the processes have it."""
    database = Database(settings, "test")
    yield database
    database.close()


def events(process: Process, name: str) -> list[dict[str, Any]]:
    """The log lines of that name."""
    return [line for line in log_lines(process) if line.get("message") == name]


def log_lines(process: Process) -> list[dict[str, Any]]:
    return [json.loads(line) for line in process.log.splitlines() if line.startswith("{")]


@pytest.fixture
def quick(settings: Settings) -> Settings:
    return settings.model_copy(update={name.lower(): value for name, value in QUICK.items()})


@pytest.fixture
def run_handler(quick: Settings, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """run_handler(function, **columns) -> (how the attempt ended, the row), in this process: `function(ctx)` is the
    handler, what it returns the result. `job_id=` goes on with an earlier job. `.runner` is the runner."""
    monkeypatch.setitem(all_kinds(), "odd", odd.KIND)
    runner = Runner(quick, worker="test", may_kill=False)

    def run(handler: Callable[[Context], Any], *, job_id: UUID | None = None, **columns: Any) -> tuple[str, DictRow]:
        module = SimpleNamespace(run=lambda payload, ctx: odd.Result(seen=handler(ctx)))
        monkeypatch.setitem(sys.modules, "worker.handlers.odd", module)
        claim = runner.claim(job_id or jobs.insert("odd", {"do": "as told"}, **columns))
        assert claim is not None, "it cannot be claimed"
        return runner.run(claim), jobs.get(claim.id)

    run.runner = runner  # type: ignore[attr-defined]
    yield run
    runner.close()
