"""`/api/jobs`: create, look, list, cancel, retry."""

import base64
import binascii
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from psycopg.rows import DictRow
from pydantic import BaseModel

from app.api import strict_json
from app.api.auth import KeyName
from app.api.errors import Problem, responses
from app.api.within import within
from app.jobs import statements
from app.jobs.create import create, new_job
from app.jobs.kinds import all_kinds
from app.jobs.requests import IDEMPOTENCY_KEY_PATTERN, Job, NewJob, Status, batch_type, request_type, shown
from app.queues import JOB_QUEUES

# A batch may be larger than a single job, but not a thousand times.
BATCH_BYTES_FACTOR = 16

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=IDEMPOTENCY_KEY_PATTERN,
        description="The same key and body again give the same job; another body is refused.",
    ),
]


class JobPage(BaseModel):
    """Newest first. `next_cursor` is null on the last page."""

    jobs: list[Job]
    next_cursor: str | None


class CreatedJobs(BaseModel):
    """In the order of the request."""

    jobs: list[Job]


class _StrictRequest(Request):
    async def json(self) -> Any:
        return strict_json.loads(await self.body())


class _StrictRoute(APIRoute):
    """Reads bodies by `strict_json`."""

    def get_route_handler(self) -> Any:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handler


def make_router(kinds: Sequence[str]) -> APIRouter:
    """The routes for these kinds of jobs: OpenAPI shows each one's payload."""
    router = APIRouter(prefix="/api/jobs", tags=["jobs"], route_class=_StrictRoute)
    one_job = request_type(tuple(kinds))
    many_jobs = batch_type(tuple(kinds))

    @router.post(
        "",
        status_code=202,
        responses={
            200: {"model": Job, "description": "The job that this key made before"},
            **responses(400, 401, 413, 422, 503),
        },
    )
    async def create_job(
        request: Request,
        response: Response,
        key: KeyName,
        body: one_job,  # type: ignore[valid-type]
        idempotency_key: IdempotencyKey = None,
    ) -> Job:
        """Accepts a job. 202 means: committed in PostgreSQL, it will be run whatever happens to the queue."""
        if len(request.headers.getlist("idempotency-key")) > 1:
            raise Problem(422, "two-keys", "Which key?", "Send one Idempotency-Key header.")
        [(row, created)] = await _create(request, [new_job(body, idempotency_key)], key)
        response.status_code = 202 if created else 200
        response.headers["Location"] = f"/api/jobs/{row['id']}"
        return shown(row)

    @router.post("/batch", status_code=202, responses=responses(400, 401, 413, 422, 503))
    async def create_jobs(request: Request, key: KeyName, body: many_jobs) -> CreatedJobs:  # type: ignore[valid-type]
        """Accepts up to 1,000 jobs, all or none. Each may carry its own `idempotency_key`."""
        if "idempotency-key" in request.headers:
            raise Problem(
                422,
                "key-on-batch",
                "A batch has no key of its own",
                "Give each job in the batch its idempotency_key, and leave the header out.",
            )
        items = body.jobs  # type: ignore[attr-defined]
        rows = await _create(request, [new_job(item, item.idempotency_key) for item in items], key)
        return CreatedJobs(jobs=[shown(row) for row, _ in rows])

    @router.get("", responses=responses(401, 422, 503))
    async def list_jobs(
        request: Request,
        key: KeyName,
        status: Status | None = None,
        kind: str | None = None,
        queue: str | None = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        cursor: Annotated[str | None, Query(max_length=200, description="next_cursor of the page before")] = None,
    ) -> JobPage:
        """Jobs, newest first. A page costs the same wherever it is."""
        _known("kind", kind, all_kinds())
        _known("queue", queue, JOB_QUEUES)
        filters = {name: value for name, value in (("status", status), ("kind", kind), ("queue", queue)) if value}
        params: dict[str, Any] = {**filters, "limit": limit + 1}
        if cursor is not None:
            params["cursor_time"], params["cursor_id"] = _read_cursor(cursor)
        statement = statements.list_jobs(list(filters), after_cursor=cursor is not None)
        rows = await within(request.app.state.query(statement, params))
        more = len(rows) > limit
        page = rows[:limit]
        return JobPage(jobs=[shown(row) for row in page], next_cursor=_cursor(page[-1]) if more else None)

    @router.get("/{job_id}", responses=responses(401, 404, 422, 503))
    async def get_job(request: Request, key: KeyName, job_id: UUID) -> Job:
        """One job."""
        return shown(await _get(request, job_id))

    @router.post("/{job_id}/cancel", status_code=202, responses=responses(401, 404, 409, 422, 503))
    async def cancel_job(request: Request, key: KeyName, job_id: UUID) -> Job:
        """A queued job is over at once. A running one ends at its next checkpoint, and can't succeed any more."""
        return await _move(request, statements.CANCEL, job_id, "is over and can't be cancelled")

    @router.post("/{job_id}/retry", status_code=202, responses=responses(401, 404, 409, 422, 503))
    async def retry_job(request: Request, key: KeyName, job_id: UUID) -> Job:
        """Runs a failed or cancelled job again. Steps that are recorded are not repeated."""
        job = await _move(request, statements.RETRY, job_id, "can't be retried; failed and cancelled jobs can")
        request.app.state.publisher.ask_dispatch()
        return job

    return router


async def _create(request: Request, jobs: list[NewJob], key: str) -> list[tuple[DictRow, bool]]:
    state = request.app.state
    largest = max(len(job.payload) for job in jobs)
    if largest > state.settings.max_payload_bytes:
        detail = f"A payload may have {state.settings.max_payload_bytes} bytes at most; upload large data as a file."
        raise Problem(413, "too-large", "The payload is too large", detail)

    async def work() -> list[tuple[DictRow, bool]]:
        async with state.pool.connection() as connection:
            return await create(connection, state.publisher, jobs, api_key=key, request_id=request.scope["request_id"])

    return await within(work())


async def _get(request: Request, job_id: UUID) -> DictRow:
    rows: list[DictRow] = await within(request.app.state.query(statements.GET, {"id": job_id}))
    if not rows:
        raise Problem(404, "unknown-job", "There is no such job", f"There is no job {job_id}.")
    return rows[0]


async def _move(request: Request, statement: str, job_id: UUID, refusal: str) -> Job:
    rows = await within(request.app.state.query(statement, {"id": job_id}))
    if not rows:
        job = await _get(request, job_id)
        detail = f"Job {job_id} is {job['status']}: it {refusal}."
        raise Problem(409, "wrong-status", "The job's status does not allow it", detail)
    return shown(rows[0])


def _known(name: str, value: str | None, known: Any) -> None:
    if value is not None and value not in known:
        message = f"unknown; there are: {', '.join(sorted(known))}"
        raise RequestValidationError([{"loc": ("query", name), "msg": message, "type": "unknown"}])


def _cursor(row: DictRow) -> str:
    position = json.dumps([row["created_at"].isoformat(), str(row["id"])])
    return base64.urlsafe_b64encode(position.encode()).decode()


def _read_cursor(cursor: str) -> tuple[datetime, UUID]:
    try:
        moment, job_id = json.loads(base64.b64decode(cursor, altchars=b"-_", validate=True))
        found = datetime.fromisoformat(moment), UUID(job_id)
        # A time without a zone, or one that is before the year 1 in UTC, is none that we gave out.
        if found[0].utcoffset() is None or found[0].year < 2000:
            raise ValueError
    except (binascii.Error, ValueError, TypeError, AttributeError, RecursionError):
        message = "not a cursor of this API; take next_cursor from the page before, or leave it out"
        raise RequestValidationError([{"loc": ("query", "cursor"), "msg": message, "type": "cursor"}]) from None
    return found
