"""From validated requests to committed rows, and nothing else before the answer: Redis is not waited for."""

import hashlib
import json
from collections.abc import Sequence
from uuid import UUID

import psycopg
from psycopg.rows import DictRow
from uuid_utils.compat import uuid7

from app.jobs import statements
from app.jobs.kinds import all_kinds
from app.jobs.publisher import Publisher
from app.jobs.requests import JobRequest, NewJob
from app.queues import QUEUE_OF_PRIORITY

Connection = psycopg.AsyncConnection[DictRow]


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


def new_job(request: JobRequest, idempotency_key: str | None) -> NewJob:
    """A request model of `requests.request_type` as a row to be."""
    kind = all_kinds()[request.kind]
    priority = request.priority or kind.priority
    return NewJob(
        id=uuid7(),
        kind=kind.name,
        priority=priority,
        queue=QUEUE_OF_PRIORITY[priority],
        payload=request.payload.model_dump_json(),
        max_attempts=request.max_attempts or kind.max_attempts,
        run_at=request.run_at,
        file_ids=list(dict.fromkeys(kind.file_ids(request.payload))),
        idempotency_key=idempotency_key,
        request_hash=_hash(request) if idempotency_key else None,
    )


def _hash(request: JobRequest) -> bytes:
    """Of the validated body, so that spelling, defaults and the order of fields make no difference."""
    body = request.model_dump(mode="json", exclude={"idempotency_key"})
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest()


async def create(
    connection: Connection,
    publisher: Publisher,
    jobs: Sequence[NewJob],
    *,
    api_key: str,
    request_id: str | None,
) -> list[tuple[DictRow, bool]]:
    """Inserts all or none. Returns, in order, each job's row and whether this call made it.

    Raises:
        UnknownFilesError, KeyReusedError: nothing was inserted.
        psycopg.OperationalError: PostgreSQL is away; the same call with the same keys may be repeated.
    """
    try:
        # A single job is a single statement, and needs no BEGIN and COMMIT around it.
        if len(jobs) == 1:
            made, rows = await _insert(connection, publisher, jobs, api_key, request_id)
        else:
            async with connection.transaction():
                made, rows = await _insert(connection, publisher, jobs, api_key, request_id)
    except psycopg.errors.ForeignKeyViolation:
        file_ids = list(dict.fromkeys(file_id for job in jobs for file_id in job.file_ids))
        cursor = await connection.execute(statements.MISSING_FILES, {"file_ids": file_ids})
        raise UnknownFilesError([row["id"] for row in await cursor.fetchall()]) from None
    publisher.submit([row for row in made if row["published_at"] is not None])
    if any(row["published_at"] is None and row["run_at"] == row["created_at"] for row in made):
        publisher.ask_dispatch()
    return [(row, row["id"] == job.id) for job, row in zip(jobs, rows, strict=True)]


async def _insert(
    connection: Connection, publisher: Publisher, jobs: Sequence[NewJob], api_key: str, request_id: str | None
) -> tuple[list[DictRow], list[DictRow]]:
    """(rows made by this call, one row a job)."""
    keys = [job.idempotency_key for job in jobs if job.idempotency_key is not None]
    params = {
        "ids": [job.id for job in jobs],
        "kinds": [job.kind for job in jobs],
        "priorities": [job.priority for job in jobs],
        "queues": [job.queue for job in jobs],
        "payloads": [job.payload for job in jobs],
        "max_attempts": [job.max_attempts for job in jobs],
        "run_ats": [job.run_at for job in jobs],
        "idempotency_keys": [job.idempotency_key for job in jobs],
        "request_hashes": [job.request_hash for job in jobs],
        "file_jobs": [job.id for job in jobs for _ in job.file_ids],
        "file_ids": [file_id for job in jobs for file_id in job.file_ids],
        "open_queues": publisher.open_queues(len(jobs)),
        "api_key": api_key,
        "request_id": request_id,
    }
    made = await (await connection.execute(statements.CREATE, params)).fetchall()
    by_id = {row["id"]: row for row in made}
    if len(made) == len(jobs):
        return made, [by_id[job.id] for job in jobs]
    cursor = await connection.execute(statements.FIND_BY_KEYS, {"api_key": api_key, "idempotency_keys": keys})
    winners = {row["idempotency_key"]: row for row in await cursor.fetchall()}
    for job in jobs:
        if job.id in by_id:
            continue
        winner = winners.get(job.idempotency_key)
        if winner is None:  # clean-up deleted it between the two statements
            raise psycopg.OperationalError(f"the job of the key {job.idempotency_key!r} has just been deleted")
        if bytes(winner["request_hash"]) != job.request_hash:
            raise KeyReusedError(str(job.idempotency_key))
        by_id[job.id] = winner
    return made, [by_id[job.id] for job in jobs]
