"""What a scenario gets: the stack, its load, its servers, and the means to break them."""

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psycopg
import redis
from psycopg.rows import DictRow, dict_row
from pydantic import SecretStr
from uuid_utils.compat import uuid7

from app.jobs import messages
from app.jobs.messages import Address
from app.queues import JOB_QUEUES
from app.settings import Settings
from tests.chaos import audit, invariants
from tests.chaos.containers import Container, containers
from tests.chaos.load import LONG, Entry, Load
from tests.chaos.probe import Probe
from tests.chaos.registry import Scenario
from tests.chaos.report import Result
from tests.e2e.stack import Stack
from tests.servers import free_port
from tests.waiting import until

SERVICES = ("api", "worker", "worker-maintenance", "beat", "receiver")
# How long the load goes on before the fault and after it.
BEFORE_SECONDS = 3
AFTER_SECONDS = 4
# Beyond its bound, for the jobs themselves and for what queued up behind them.
DRAIN_SECONDS = 90

DISPATCH = """
import time
from app.database import Database
from app.jobs import messages
from app.jobs.dispatch import dispatch
from app.settings import get_settings

settings = get_settings()
servers = Database(settings, "chaos"), messages.connect(settings)
took = []
for _ in range(10):
    began = time.perf_counter()
    dispatch(*servers, settings)
    took.append(time.perf_counter() - began)
print(sorted(took[1:])[4] * 1000)
"""


class Chaos:
    """One stack, one scenario at a time."""

    stack: Stack
    load: Load
    probe: Probe
    # Children a worker.
    concurrency = 6

    def __init__(self, folder: Path, results: Path) -> None:
        self.folder, self.results = folder, results
        postgres_port, redis_port, receiver_port = free_port(), free_port(), free_port()
        self.stack = Stack(
            folder,
            files=("tests/e2e/receiver.yml", "tests/chaos/compose.yml"),
            REDIS_HOST="broker",
            # Room for the load while long jobs wait for their fault.
            WORKER_CONCURRENCY=str(self.concurrency),
            WORKER_MEMORY="1g",  # what a job that eats memory has to fill within its time limit
            WEBHOOK_ALLOW_PRIVATE="true",  # the receiver's address
            CHAOS_POSTGRES_PORT=str(postgres_port),
            CHAOS_REDIS_PORT=str(redis_port),
            CHAOS_RECEIVER_PORT=str(receiver_port),
        )
        self.url = f"http://127.0.0.1:{self.stack.api_port}"
        self.receiver_url = f"http://127.0.0.1:{receiver_port}"
        self.conninfo = (
            f"postgresql://jobstack:{self.stack.secrets['POSTGRES_PASSWORD']}@127.0.0.1:{postgres_port}/jobstack"
            "?application_name=chaos&connect_timeout=3&options=-c%20timezone%3DUTC"
        )
        # Any: redis-py types each answer as one that may be awaited.
        self.redis: Any = redis.Redis(
            port=redis_port, password=self.stack.secrets["REDIS_PASSWORD"], socket_timeout=5, decode_responses=True
        )
        self.settings = Settings(database_url=SecretStr(self.conninfo), redis_url=SecretStr("redis://redis/0"))
        self._connection: psycopg.Connection[DictRow] | None = None
        self._offset = 0.0
        # When the fault began and ended, by the database's clock.
        self.fault: tuple[float, float] | None = None
        self._began = 0.0
        # What the scenario measured, and what it found wrong besides the invariants.
        self.measured: dict[str, float | str] = {}
        self.violations: list[str] = []
        # Workers that were killed since the stack began: what they held stays in `unacked` for its hour.
        self.killed = 0

    def up(self) -> None:
        self.stack.up(*SERVICES)
        self.sql(audit.JOBS)
        if self.sql("SELECT 1 FROM pg_tables WHERE tablename = 'schedule_ticks'"):
            self.sql(audit.TICKS)
        [row] = self.sql("SELECT extract(epoch FROM clock_timestamp())::float AS now")
        self._offset = row["now"] - time.time()

    def down(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self.redis.close()
        self.stack.down()

    # ---- looking ---------------------------------------------------------------------------------------------------

    def clock(self) -> float:
        """Epoch seconds by the database's clock, also while it is away."""
        return time.time() + self._offset

    def sql(self, statement: str, **values: Any) -> list[DictRow]:
        """Runs a statement, over a new connection if the old one is gone."""
        try:
            return self._sql(statement, values)
        except (psycopg.OperationalError, psycopg.InterfaceError):
            self._connection = None
            return self._sql(statement, values)

    def _sql(self, statement: str, values: dict[str, Any]) -> list[DictRow]:
        if self._connection is None:
            self._connection = psycopg.connect(self.conninfo, autocommit=True, row_factory=dict_row)
        # Without values nothing is a parameter, and several statements may stand in one string.
        cursor = self._connection.execute(statement, values or None)
        return cursor.fetchall() if cursor.description else []

    def answers(self, ask: Callable[[], object], what: str, seconds: float = 60) -> None:
        """Waits until `ask` raises nothing that a server raises while it is away."""

        def answered() -> bool:
            try:
                ask()
            except (psycopg.Error, redis.RedisError, httpx.HTTPError):
                return False
            return True

        until(answered, f"{what} answers", seconds=seconds)

    def postgres_answers(self) -> None:
        self.answers(lambda: self.sql("SELECT 1"), "PostgreSQL")

    def redis_answers(self) -> None:
        self.answers(self.redis.ping, "Redis")

    def job(self, job_id: str | UUID | None) -> DictRow:
        [row] = self.sql("SELECT * FROM jobs WHERE id = %(id)s", id=job_id)
        return row

    def status(self, job_id: str | UUID | None) -> str:
        return str(self.job(job_id)["status"])

    def calls(self) -> list[dict[str, Any]]:
        """What the receiver got: path, key (the job's id), at, status."""
        calls: list[dict[str, Any]] = httpx.get(self.receiver_url, timeout=10).json()
        return calls

    def reaches(self, job_id: str | UUID | None, *statuses: str, seconds: float = 30) -> None:
        """Waits until a job has one of these statuses."""
        until(lambda: self.status(job_id) in statuses, f"job {job_id} is {' or '.join(statuses)}", seconds=seconds)

    def recorded(self, job_id: str | None) -> None:
        """Waits until a job has recorded a step."""
        until(lambda: self.sql("SELECT 1 FROM job_steps WHERE job_id = %(id)s", id=job_id), "a step is recorded")

    def moves(self, job_id: str | UUID | None) -> list[str]:
        """What became of a job: ["queued running", "running succeeded"]."""
        rows = self.sql("SELECT old_status, new_status FROM chaos_audit WHERE job_id = %(id)s ORDER BY n", id=job_id)
        return [f"{row['old_status']} {row['new_status']}" for row in rows]

    def expect(self, holds: object, otherwise: str) -> None:
        """What must hold in this scenario besides the invariants."""
        if not holds:
            self.violations.append(otherwise)

    def insert(self, kind: str, payload: dict[str, Any], *, ends: str = "succeeded", **columns: Any) -> Address:
        """A job by SQL instead of over HTTP: due and not published, unless `columns` say otherwise."""
        row = {
            "id": uuid7(),
            "kind": kind,
            "payload": json.dumps(payload),
            "priority": "default",
            "queue": "default",
            "max_attempts": 4,
            **columns,
        }
        row["idempotency_key"] = self.load.adopt(kind, payload, str(row["id"]), ends=ends)
        names = ", ".join(row)
        self.sql(f"INSERT INTO jobs ({names}) VALUES ({', '.join(f'%({name})s' for name in row)})", **row)
        return Address(row["id"], kind, str(row["queue"]))

    def push(self, jobs: Iterable[Address], copies: int = 1) -> None:
        """Messages for these jobs, as dispatch would send them."""
        for job in jobs:
            self.redis.lpush(job.queue, *(messages.job_message(job, self.settings) for _ in range(copies)))

    def cancel(self, job_id: str | None) -> None:
        answer = self.load.cancel(job_id)
        assert answer.status_code == 202, answer.text

    def drained(self, seconds: float = 30) -> None:
        """Waits until every message for jobs is taken."""
        until(lambda: not any(map(self.redis.llen, JOB_QUEUES)), "the queues are empty", seconds=seconds)

    # ---- the schedule ----------------------------------------------------------------------------------------------

    def tick_mark(self) -> int:
        """Where the record of ticks ends now."""
        return int(self.sql("SELECT COALESCE(max(n), 0) AS n FROM chaos_ticks")[0]["n"])

    def ticked(self, mark: int, *, at_least: int) -> None:
        """Waits until dispatch was started so many times, and looks whether any tick since `mark` came twice."""
        started = (
            "SELECT due_at FROM chaos_ticks WHERE n > %(mark)s AND what = 'started' AND entry = 'enqueue_pending_jobs'"
        )
        until(lambda: len(self.sql(started, mark=mark)) >= at_least, "dispatch is started on time", seconds=30)
        twice = self.sql(
            "SELECT entry, due_at, what, count(*) FROM chaos_ticks WHERE n > %(mark)s GROUP BY 1, 2, 3 "
            "HAVING count(*) > 1",
            mark=mark,
        )
        for row in twice:
            self.expect(False, f"double: tick {row['entry']} of {row['due_at']} was {row['what']} {row['count']} times")

    def dispatch_milliseconds(self) -> float:
        """One run of dispatch with nothing to send, in the worker that does it: the median of nine."""
        return float(self.one("worker-maintenance").run("python", "-c", DISPATCH))

    # ---- breaking --------------------------------------------------------------------------------------------------

    def all(self, *services: str) -> list[Container]:
        return containers(self.stack.project, *services)

    def one(self, service: str) -> Container:
        return self.all(service)[0]

    def busiest_worker(self) -> Container:
        """The worker with the most long jobs, two at least."""

        def busiest() -> Container | None:
            rows = self.sql(
                "SELECT worker, count(*) FROM jobs WHERE status = 'running' AND starts_with(idempotency_key, %(p)s) "
                "AND (payload->>'seconds')::float > 10 GROUP BY worker ORDER BY count DESC LIMIT 1",
                p=self.load.prefix,
            )
            if not rows or rows[0]["count"] < 2:
                return None
            return next(c for c in self.all("worker") if rows[0]["worker"].endswith(c.host))

        found = until(busiest, "a worker runs two long jobs", seconds=30)
        assert found is not None
        return found

    def worker_of(self, job_id: str | UUID | None) -> Container:
        """The worker that has the job, or had it last."""
        name = self.job(job_id)["worker"]
        return next(container for container in self.all("worker") if name == f"worker@{container.host}")

    def try_start(self, service: str, **environment: str) -> tuple[int, str]:
        """Starts the service's process once more, in its container: exit code, 124 if it runs, and what it printed."""
        container = self.one(service)
        return container.try_run("timeout", "15", *container.command, **environment)

    @contextmanager
    def all_frozen(self, service: str) -> Iterator[None]:
        with ExitStack() as stack:
            for container in self.all(service):
                stack.enter_context(container.frozen())
            yield

    @contextmanager
    def end_held_up(self, kind: str, payload: dict[str, Any]) -> Iterator[Entry]:
        """A job whose row is locked as soon as it runs: within the block it may record steps, but not its end."""
        entry = self.load.create(kind, payload, max_attempts=3)
        with psycopg.connect(self.conninfo) as lock:
            running = "SELECT 1 FROM jobs WHERE id = %s AND status = 'running' FOR NO KEY UPDATE"

            def locked() -> bool:
                found = lock.execute(running, [entry.job_id]).fetchone()
                if not found:
                    lock.rollback()
                return found is not None

            until(locked, "the job runs")
            yield entry

    def running_on(self, worker: Container) -> list[DictRow]:
        """The jobs that a worker has now, the longest first."""
        return self.sql(
            "SELECT id, kind, pid, lease_token FROM jobs WHERE status = 'running' AND worker = %(worker)s "
            "ORDER BY (payload->>'seconds')::float DESC NULLS LAST",
            worker=f"worker@{worker.host}",
        )

    def run_again(self, victims: list[DictRow], seconds: float) -> None:
        """Waits until each of these is started again, or over."""
        waiting = (
            "SELECT 1 FROM jobs WHERE id = ANY(%(ids)s) AND lease_token = ANY(%(tokens)s) AND status = 'running' "
            "OR id = ANY(%(ids)s) AND status = 'queued' LIMIT 1"
        )
        held = {"ids": [row["id"] for row in victims], "tokens": [row["lease_token"] for row in victims]}
        end = time.monotonic() + seconds
        while self.sql(waiting, **held) and time.monotonic() < end:
            time.sleep(0.1)

    @property
    def fault_end(self) -> float:
        assert self.fault is not None
        return self.fault[1]

    def queue_up(self) -> None:
        """More short jobs than there are children: their messages wait in Redis, where they can be lost."""
        for _ in range(8 * self.concurrency):
            self.load.create_later("sleep", {"seconds": 0.5, "steps": 1})
        until(lambda: self.redis.llen("default") > 2 * self.concurrency, "messages wait in Redis")

    def fault_over(self) -> None:
        """From here on recovery is measured. For what dies, that is the moment before the blow."""
        self.fault = (self._began, self.clock())

    @contextmanager
    def during(self, fault: Any) -> Iterator[None]:
        """Holds a context manager of a fault; its end is where recovery is measured from."""
        with fault:
            yield
        self.fault_over()

    # ---- one scenario ----------------------------------------------------------------------------------------------

    def run(self, scenario: Scenario) -> Result:
        """Runs it and checks everything. A violated invariant is in the result; a stack that does not heal raises."""
        began = time.monotonic()
        self.begin(scenario.name)
        try:
            if scenario.rate:
                self.load.start(scenario.rate)
                self._long_ones_run()
                time.sleep(BEFORE_SECONDS)
            self._began = self.clock()
            scenario.body(self)
            if self.fault is None:
                self.fault_over()
            if scenario.rate:
                time.sleep(AFTER_SECONDS)
            self.end((scenario.bound or 0) + DRAIN_SECONDS)
            return invariants.check(self, scenario, time.monotonic() - began)
        finally:
            self.load.close()
            self.probe.stop()
            self.heal()

    def begin(self, name: str, seed: int | None = None) -> None:
        self.fault = None
        self.measured, self.violations = {}, []
        self._began = self.clock()
        prefix = f"{name}-{int(self._began)}-"
        journal = self.results / f"{prefix}journal.jsonl"
        self.load = Load(self.url, prefix, journal, self.clock, seed or random.randrange(2**32))
        self.probe = Probe(self.url, self.clock)

    def end(self, seconds: float) -> None:
        """No more load; each request has its answer, each job its end, if it takes no longer than `seconds`."""
        self.load.stop()
        self.load.settle()
        # By status, which has an index: this is asked often, maybe of a large table.
        unfinished = (
            "SELECT 1 FROM jobs WHERE status IN ('queued', 'running') AND starts_with(idempotency_key, %(p)s) LIMIT 1"
        )
        end = time.monotonic() + seconds
        while self.sql(unfinished, p=self.load.prefix) and time.monotonic() < end:
            time.sleep(0.1)
        self.consuming()

    def _long_ones_run(self) -> None:
        running = (
            "SELECT 1 FROM jobs WHERE starts_with(idempotency_key, %(p)s) AND kind = 'sleep' "
            "AND (payload->>'seconds')::float > 10 AND status = 'running'"
        )
        until(lambda: len(self.sql(running, p=self.load.prefix)) == LONG, "the long jobs run")

    # ---- afterwards ------------------------------------------------------------------------------------------------

    def consuming(self, seconds: float = 30) -> None:
        """Each worker takes jobs, and dispatch finds what was never published, without anybody's help."""
        wanted = {f"worker@{worker.host}" for worker in self.all("worker")}
        seen: set[str] = set()
        end = time.monotonic() + seconds
        while not wanted <= seen:
            assert time.monotonic() < end, f"no longer consuming: {', '.join(wanted - seen)}"
            seen |= self._who_takes_jobs()
        [row] = self.sql(
            "INSERT INTO jobs (id, kind, priority, queue, payload, max_attempts) "
            """VALUES (gen_random_uuid(), 'flaky', 'high', 'high_priority', '{"failures": 0}', 1) RETURNING id"""
        )
        until(lambda: self.status(row["id"]) == "succeeded", "dispatch sends a job", seconds=20)

    def _who_takes_jobs(self) -> set[str]:
        """The workers that ran some of a few jobs, more than one worker can run at once."""
        jobs = [{"kind": "sleep", "payload": {"seconds": 0.3, "steps": 1}}] * 4 * self.concurrency
        answer = httpx.post(f"{self.url}/api/jobs/batch", json={"jobs": jobs}, timeout=20)
        assert answer.status_code == 202, answer.text
        ids = [job["id"] for job in answer.json()["jobs"]]
        done = "SELECT worker FROM jobs WHERE id = ANY(%(ids)s::uuid[]) AND status = 'succeeded'"
        until(lambda: len(self.sql(done, ids=ids)) == len(ids), "some more jobs are done", seconds=60)
        return {row["worker"] for row in self.sql(done, ids=ids)}

    def heal(self) -> None:
        """Everything runs and is ready, before the next scenario."""
        for container in self.all():
            container.heal()
        self.postgres_answers()
        self.redis_answers()
        ready = f"{self.url}/health/ready"

        def ok() -> bool:
            try:
                return bool(httpx.get(ready, timeout=10).json()["status"] == "ok")
            except (httpx.HTTPError, ValueError):
                return False

        until(ok, "the API is ready", seconds=60)
