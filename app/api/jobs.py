"""`/api/jobs`: create, look, list, cancel, retry."""

import asyncio
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal
from uuid import UUID

import structlog
from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from psycopg.rows import DictRow
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema
from starlette.convertors import StringConvertor, register_url_convertor

from app.api.auth import audit
from app.api.errors import Problem, responses, too_large
from app.api.strict_json import JsonRoute
from app.api.within import within
from app.jobs import statements
from app.jobs.create import new_job
from app.jobs.kinds import all_kinds
from app.jobs.requests import (
    KEY_SCHEMA,
    Job,
    NewJob,
    Status,
    batch_type,
    checked_key,
    request_type,
    shown,
)
from app.jobs.stats import WITHDRAWN
from app.queues import JOB_QUEUES

KEY_HEADER = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "The same key and body again give the same job; another body is refused.",
    "schema": KEY_SCHEMA,
}
# Names from lists made at run time, which OpenAPI then shows.
KindName: Any = Literal[tuple(all_kinds())]
QueueName: Any = Literal[JOB_QUEUES]

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
CURSOR_PATTERN = "^[0-9]{1,17}-[0-9a-f]{32}$"


def _is_cursor(text: str) -> str:
    if not re.fullmatch(CURSOR_PATTERN, text):
        raise ValueError("not a cursor of this API; take next_cursor from the page before, or leave it out")
    return text


Cursor = Annotated[str, AfterValidator(_is_cursor), WithJsonSchema({"type": "string", "pattern": CURSOR_PATTERN})]


class JobFilter(BaseModel):
    """The parameters of a list."""

    model_config = ConfigDict(extra="forbid")

    status: Status | None = None
    kind: KindName | None = None
    queue: QueueName | None = None
    limit: int = Field(50, ge=1, le=200)
    cursor: Cursor | None = Field(None, description="next_cursor of the page before")


class JobPage(BaseModel):
    """Newest first. `next_cursor` is null on the last page."""

    jobs: list[Job]
    next_cursor: str | None


class CreatedJobs(BaseModel):
    """In the order of the request."""

    jobs: list[Job]


class _OneJob(StringConvertor):
    """What may stand for a job in a path. With `batch` among it, GET on that path would be a bad id and not a 405."""

    regex = "(?!batch$)[^/]+"


register_url_convertor("one_job", _OneJob())

LOCATION = {"Location": {"description": "Where the job is.", "schema": {"type": "string"}}}


def make_router(kinds: Sequence[str], operation_id: Callable[[APIRoute], str]) -> APIRouter:
    """The routes for these kinds of jobs: OpenAPI shows each one's payload."""
    router = APIRouter(
        prefix="/api/jobs", tags=["jobs"], route_class=JsonRoute, generate_unique_id_function=operation_id
    )
    one_job = request_type(tuple(kinds))
    many_jobs = batch_type(tuple(kinds))

    @router.post(
        "",
        status_code=202,
        response_model=Job,
        responses={
            200: {"model": Job, "description": "The job that this key made before", "headers": LOCATION},
            202: {"description": "A new job", "headers": LOCATION},
            **responses(400, 401, 413, 415, 422, 503),
        },
        openapi_extra={"parameters": [KEY_HEADER]},
    )
    async def create_job(request: Request, body: one_job) -> Response:  # type: ignore[valid-type]
        """Accepts a job. 202 means: committed in PostgreSQL, it will be run whatever happens to the queue."""
        row, new = await within(request.app.state.creator.one(_new_job(request, body, _key(request))))
        structlog.contextvars.bind_contextvars(job_id=str(row["id"]))  # in the request's line
        return _job(row, 202 if new else 200, {"Location": f"/api/jobs/{row['id']}"})

    @router.post(
        "/batch", status_code=202, response_model=CreatedJobs, responses=responses(400, 401, 413, 415, 422, 503)
    )
    async def create_jobs(request: Request, body: many_jobs) -> Response:  # type: ignore[valid-type]
        """Accepts up to 1,000 jobs, all or none. Each may carry its own `idempotency_key`."""
        if "idempotency-key" in request.headers:
            detail = "A batch has no key of its own: give each job its idempotency_key, and leave the header out."
            raise Problem(422, "key-on-batch", detail)
        items = body.jobs  # type: ignore[attr-defined]
        await asyncio.sleep(0)  # here and below: a thousand jobs take a while, and others wait
        jobs = [_new_job(request, item, item.idempotency_key) for item in items]
        rows = await within(request.app.state.creator.all_or_none(jobs))
        await asyncio.sleep(0)
        answer = CreatedJobs(jobs=[shown(row) for row, _ in rows])
        return Response(answer.model_dump_json(), 202, media_type="application/json")

    @router.get("", responses=responses(401, 422, 503))
    async def list_jobs(request: Request, filters: Annotated[JobFilter, Query()]) -> JobPage:
        """Jobs, newest first. A page costs the same wherever it is."""
        if len(request.query_params.multi_items()) > len(request.query_params):
            raise Problem(422, "repeated-parameter", "A parameter is given twice; give each of them once.")
        rows, next_cursor = await find_jobs(request.app.state, filters)
        return JobPage(jobs=[shown(row) for row in rows], next_cursor=next_cursor)

    @router.get("/{job_id:one_job}", response_model=Job, responses=responses(401, 404, 422, 503))
    async def get_job(request: Request, job_id: UUID) -> Response:
        """One job."""
        return _job(await _get(request, job_id))

    @router.post("/{job_id}/cancel", status_code=202, responses=responses(401, 404, 409, 422, 503))
    async def cancel_job(request: Request, job_id: UUID) -> Job:
        """A queued job is over at once. A running one ends at its next checkpoint, and can't succeed any more."""
        job = await _move(request, "cancel", statements.CANCEL, job_id, "is over and can't be cancelled")
        if job.status == "cancelled":
            request.app.state.stats.count(job.queue, job.kind, WITHDRAWN)
        return job

    @router.post("/{job_id}/retry", status_code=202, responses=responses(401, 404, 409, 422, 503))
    async def retry_job(request: Request, job_id: UUID) -> Job:
        """Runs a failed or cancelled job again. Steps that are recorded are not repeated."""
        job = await _move(request, "retry", statements.RETRY, job_id, "can't be retried; failed and cancelled jobs can")
        request.app.state.publisher.ask_dispatch()
        return job

    return router


async def find_jobs(
    state: Any, filters: JobFilter, ids: tuple[UUID, UUID] | None = None, *, columns: str = statements.SHOWN
) -> tuple[list[DictRow], str | None]:
    """A page of the list and the cursor of the next; with `ids` only jobs from the first to the last of them."""
    wanted = filters.model_dump(include={"status", "kind", "queue"}, exclude_none=True)
    params = {**wanted, "limit": filters.limit + 1}
    if filters.cursor is not None:
        params |= _position(filters.cursor)
    if ids is not None:
        params |= {"low": ids[0], "high": ids[1]}
    statement = statements.list_jobs(
        list(wanted), after_cursor=filters.cursor is not None, id_range=ids is not None, columns=columns
    )
    # Planned for these values, every time: what a filter looks for may be rare and old, or everywhere.
    rows = await within(state.query(statement, params, prepare=False))
    page, more = rows[: filters.limit], rows[filters.limit :]
    return page, _cursor(page[-1]) if more else None


def _job(row: DictRow, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """As FastAPI would answer with a Job, but without validating once more what has just been made."""
    return Response(shown(row).model_dump_json(), status, headers, "application/json")


def _key(request: Request) -> str | None:
    """The header Idempotency-Key."""
    keys = request.headers.getlist("idempotency-key")
    if len(keys) > 1:
        raise Problem(422, "two-keys", "There are two Idempotency-Key headers; send one.")
    try:
        return checked_key(keys[0]) if keys else None
    except ValueError as error:
        raise RequestValidationError([{"loc": ("header", "Idempotency-Key"), "msg": str(error)}]) from None


def _new_job(request: Request, body: Any, idempotency_key: str | None) -> NewJob:
    scope = request.scope
    job = new_job(body, idempotency_key, api_key=scope["api_key"], request_id=scope["request_id"])
    limit = request.app.state.settings.max_payload_bytes
    if len(job.payload.encode()) > limit:
        raise too_large("A job's payload", limit)
    return job


async def _get(request: Request, job_id: UUID) -> DictRow:
    rows: list[DictRow] = await within(request.app.state.query(statements.GET, {"id": job_id}))
    if not rows:
        raise unknown_job(job_id)
    return rows[0]


def unknown_job(job_id: UUID) -> Problem:
    return Problem(404, "unknown-job", f"There is no job {job_id}; jobs are removed some time after their end.")


async def _move(request: Request, action: str, statement: str, job_id: UUID, refusal: str) -> Job:
    rows = await within(request.app.state.query(statement, {"id": job_id}))
    if not rows:
        job = await _get(request, job_id)
        raise Problem(409, "wrong-status", f"Job {job_id} is {job['status']}: it {refusal}.")
    audit(request, action, key=request.scope["api_key"], job=str(job_id))
    return shown(rows[0])


def _cursor(row: DictRow) -> str:
    """A place in the list: microseconds and id of the last job on a page."""
    return f"{(row['created_at'] - EPOCH) // timedelta(microseconds=1)}-{row['id'].hex}"


def _position(cursor: str) -> dict[str, Any]:
    microseconds, _, job_id = cursor.partition("-")
    return {"cursor_time": EPOCH + timedelta(microseconds=int(microseconds)), "cursor_id": UUID(job_id)}
