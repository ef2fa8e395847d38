"""From validated requests to committed rows, and nothing else before the answer: Redis is not waited for.

Calls that come together share one INSERT and one commit: the disk is what takes the time, and it takes no longer for
fifty rows. Each is still answered only after the commit, with its own job or its own error.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from contextvars import Context
from itertools import accumulate, islice, takewhile
from typing import Any, NamedTuple, cast
from uuid import UUID

import psycopg
from psycopg.rows import DictRow
from psycopg_pool import AsyncConnectionPool
from pydantic_core import from_json
from uuid_utils.compat import uuid7

from app.database import CONNECTION_LOST
from app.jobs import statements
from app.jobs.kinds import all_kinds
from app.jobs.publisher import Publisher
from app.jobs.requests import JobRequest, NewJob
from app.jobs.stats import CREATED, Stats
from app.queues import QUEUE_OF_PRIORITY

Connection = psycopg.AsyncConnection[DictRow]
# What every new job has.
_NEW: DictRow = {"status": "queued", "attempt": 0} | dict.fromkeys(
    ("result", "error", "progress", "started_at", "heartbeat_at", "finished_at", "worker")
)

# While one group waits for its commit the next one gathers; with a second lane the disk is never waited for idly.
LANES = 2
MOST_IN_GROUP = 100
MOST_CHARACTERS = 2**21  # of payload: a group of large ones must be done in time, too
# Who waited longer than this for a lane is refused while there is still time to say so, and gets no job later.
TURN_SECONDS = 2.0
# After this a lane gives a group up that a frozen server keeps; its callers have had their 503.
GIVE_UP_SECONDS = 5.0


class Created(NamedTuple):
    """A job's row, and whether this call made it (or found what the same key made before)."""

    row: DictRow
    new: bool


class _Call(NamedTuple):
    """Somebody who waits for a job to be created."""

    job: NewJob
    created: "asyncio.Future[Created]"
    since: float


class UnknownFilesError(Exception):
    """A payload names files that don't exist."""

    def __init__(self, file_ids: list[UUID]) -> None:
        super().__init__(", ".join(map(str, file_ids)))
        self.file_ids = file_ids


class KeyReusedError(Exception):
    """An idempotency key that belongs to a job with another body."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def new_job(request: JobRequest, idempotency_key: str | None, *, api_key: str, request_id: str | None) -> NewJob:
    """A request model of `requests.request_type` as a row to be."""
    kind = all_kinds()[request.kind]
    priority = request.priority or kind.priority
    max_attempts = request.max_attempts or kind.max_attempts
    return NewJob(
        id=uuid7(),
        kind=kind.name,
        priority=priority,
        queue=QUEUE_OF_PRIORITY[priority],
        payload=request.payload.model_dump_json(),
        max_attempts=max_attempts,
        run_at=request.run_at,
        file_ids=list(dict.fromkeys(kind.file_ids(request.payload))),
        idempotency_key=idempotency_key,
        request_hash=_hash(request) if idempotency_key else None,
        api_key=api_key,
        request_id=request_id,
        # Members of a broken group run again uncounted: not what somebody means who allows one run.
        short=max_attempts > 1 and kind.short(request.payload),
    )


def _hash(request: JobRequest) -> bytes:
    """Of the validated body, so that spelling, defaults and the order of fields make no difference."""
    body = request.model_dump(mode="json", exclude={"idempotency_key"})
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest()


class Creator:
    """Inserts jobs for one API process."""

    def __init__(self, pool: AsyncConnectionPool[Connection], publisher: Publisher, stats: Stats) -> None:
        self._pool = pool
        self._publisher = publisher
        self._stats = stats
        self._waiting: list[_Call] = []
        self._lanes: set[asyncio.Task[None]] = set()

    def one(self, job: NewJob) -> "asyncio.Future[Created]":
        """Inserts a job together with others that wait.

        Raises:
            UnknownFilesError, KeyReusedError: nothing was inserted for this one.
            psycopg.OperationalError: PostgreSQL is away; the same call with the same key may be repeated.
        """
        call = _Call(job, asyncio.get_running_loop().create_future(), time.monotonic())
        self._waiting.append(call)
        if len(self._lanes) < LANES:
            # In no request's context: what is logged there speaks for all of them.
            self._lanes.add(asyncio.create_task(self._lane(), context=Context()))
        return call.created

    async def all_or_none(self, jobs: Sequence[NewJob]) -> list[Created]:
        """Inserts these jobs in one transaction, and returns them in order. Raises as `one` does."""
        async with self._begin(jobs) as (connection, open_queues):
            try:
                async with connection.transaction():
                    results = await self._insert(connection, jobs, open_queues)
                    for result in results:
                        if isinstance(result, Exception):
                            raise result
            except psycopg.errors.ForeignKeyViolation:
                raise await _unknown_files(connection, jobs) from None
            created = [result for result in results if isinstance(result, Created)]
            self._publish(created)
        return created

    async def _lane(self) -> None:
        try:
            await self._empty()
        finally:
            # Here and not by a callback, which comes a moment later: a call in between would find no lane.
            self._lanes.discard(cast("asyncio.Task[None]", asyncio.current_task()))

    async def _empty(self) -> None:
        while self._waiting:
            size = accumulate(len(call.job.payload) for call in self._waiting)
            count = max(1, sum(1 for _ in takewhile(MOST_CHARACTERS.__ge__, islice(size, MOST_IN_GROUP))))
            turn, self._waiting = self._waiting[:count], self._waiting[count:]
            late = time.monotonic() - TURN_SECONDS
            for call in turn:
                if call.since < late and not call.created.done():
                    call.created.set_exception(psycopg.OperationalError("PostgreSQL is slow, and others came first"))
            group = [call for call in turn if not call.created.done()]
            if group:
                task = asyncio.create_task(self._create(group))
                if not (await asyncio.wait({task}, timeout=GIVE_UP_SECONDS))[0]:
                    task.cancel()

    async def _create(self, group: list[_Call]) -> None:
        jobs = [call.job for call in group]
        results: Sequence[Created | Exception]
        try:
            async with self._begin(jobs) as (connection, open_queues):
                results = await self._insert_each(connection, jobs, open_queues)
                self._publish([result for result in results if isinstance(result, Created)])
        except Exception as error:  # noqa: BLE001 - whatever it is, each caller gets it
            results = [error] * len(group)
        for call, result in zip(group, results, strict=True):
            if call.created.done():
                continue  # its time was up, and it has been told so
            if isinstance(result, Exception):
                call.created.set_exception(result)
            else:
                call.created.set_result(result)

    @asynccontextmanager
    async def _begin(self, jobs: Sequence[NewJob]) -> AsyncIterator[tuple[Connection, list[str]]]:
        """A connection, and the queues that have room for these jobs' messages until the end of the block."""
        async with self._pool.connection() as connection:
            with self._publisher.room_for(job.queue for job in jobs if not job.short) as open_queues:
                yield connection, open_queues

    def _publish(self, created: list[Created]) -> None:
        rows = [row for row, new in created if new]
        for row in rows:
            self._stats.count(row["queue"], row["kind"], CREATED)
        self._publisher.submit(row for row in rows if row["published_at"] is not None)
        due = [row for row in rows if row["published_at"] is None and row["run_at"] == row["created_at"]]
        self._publisher.wake({row["queue"] for row in due if row["short"]})
        if any(not row["short"] for row in due):
            self._publisher.ask_dispatch()

    async def _insert_each(
        self, connection: Connection, jobs: Sequence[NewJob], open_queues: list[str]
    ) -> list[Created | Exception]:
        try:
            return await self._insert(connection, jobs, open_queues)
        except CONNECTION_LOST:
            raise
        except psycopg.errors.ForeignKeyViolation:
            if len(jobs) == 1:
                return [await _unknown_files(connection, jobs)]
        except psycopg.Error as error:
            if len(jobs) == 1:
                return [error]
        # One row spoilt it for all: each for itself.
        return [result for job in jobs for result in await self._insert_each(connection, [job], open_queues)]

    async def _insert(
        self, connection: Connection, jobs: Sequence[NewJob], open_queues: list[str]
    ) -> list[Created | Exception]:
        """One statement, and a second one only where a key was there before."""
        hashes = (job.request_hash and f"\\x{job.request_hash.hex()}" for job in jobs)
        params = {
            "ids": array(job.id for job in jobs),
            "kinds": array(job.kind for job in jobs),
            "priorities": array(job.priority for job in jobs),
            "queues": array(job.queue for job in jobs),
            "payloads": array(job.payload for job in jobs),
            "max_attempts": array(job.max_attempts for job in jobs),
            "run_ats": array(job.run_at for job in jobs),
            "idempotency_keys": array(job.idempotency_key for job in jobs),
            "request_hashes": array(hashes),
            "api_keys": array(job.api_key for job in jobs),
            "request_ids": array(job.request_id for job in jobs),
            "short": array(job.short for job in jobs),
            "file_jobs": array(job.id for job in jobs for _ in job.file_ids),
            "file_ids": array(file_id for job in jobs for file_id in job.file_ids),
            "open_queues": open_queues,
        }
        made = {row["id"]: row for row in await (await connection.execute(statements.CREATE, params)).fetchall()}
        by_id: dict[UUID, Created | Exception] = {
            job.id: Created(_row(job, made[job.id]), new=True) for job in jobs if job.id in made
        }
        repeated = [job for job in jobs if job.id not in by_id]
        if repeated:
            keys = {
                "api_keys": [job.api_key for job in repeated],
                "idempotency_keys": [job.idempotency_key for job in repeated],
            }
            try:
                cursor = await connection.execute(statements.FIND_BY_KEYS, keys)
                winners = {(row["api_key"], row["idempotency_key"]): row for row in await cursor.fetchall()}
            except CONNECTION_LOST as error:
                # The others' jobs are committed, unless this is a transaction: then nobody's are.
                by_id |= {job.id: error for job in repeated}
            else:
                by_id |= {job.id: _winner(job, winners.get((job.api_key, job.idempotency_key))) for job in repeated}
        return [by_id[job.id] for job in jobs]


def array(values: Iterable[object]) -> str:
    """A list as PostgreSQL reads it. The driver quotes item by item and character by character: 20 ms for a batch, and
    a second for a megabyte, in which the event loop answers nobody."""
    return f"{{{','.join(map(_item, values))}}}"


def _item(value: object) -> str:
    if value is None:
        return "NULL"
    text = str(value).replace("\\", r"\\").replace('"', r"\"")
    return f'"{text}"'


def _row(job: NewJob, made: DictRow) -> DictRow:
    """A new job's row, as `GET` would read it."""
    return {
        **_NEW,
        "id": job.id,
        "kind": job.kind,
        "priority": job.priority,
        "queue": job.queue,
        "payload": from_json(job.payload),
        "max_attempts": job.max_attempts,
        "request_id": job.request_id,
        "short": job.short,
        **made,
    }


def _winner(job: NewJob, row: Any) -> Created | Exception:
    """The job that this one's key made before."""
    if row is None:  # clean-up deleted it between the two statements
        return psycopg.OperationalError(f"the job of the key {job.idempotency_key!r} has just been deleted")
    if bytes(row["request_hash"]) != job.request_hash:
        return KeyReusedError(str(job.idempotency_key))
    return Created(row, new=False)


async def _unknown_files(connection: Connection, jobs: Sequence[NewJob]) -> UnknownFilesError:
    file_ids = list(dict.fromkeys(file_id for job in jobs for file_id in job.file_ids))
    cursor = await connection.execute(statements.MISSING_FILES, {"file_ids": file_ids})
    return UnknownFilesError([row["id"] for row in await cursor.fetchall()])
