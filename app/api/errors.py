"""Every error answer: RFC 9457 problem+json that says what was wrong and what to do. No traceback leaves the API."""

from typing import Any

import psycopg
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from app import logs
from app.database import CONNECTION_LOST
from app.jobs.create import KeyReusedError, UnknownFilesError

log = logs.get(__name__)

RETRY_AFTER_SECONDS = 2
MOST_ERRORS_SHOWN = 20


class FieldError(BaseModel):
    """What is wrong with one field of the request."""

    field: str = Field(description="Where: body.payload.width, query.limit, header.Idempotency-Key")
    message: str


class ProblemDetails(BaseModel):
    """An error, by RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str | None = None
    errors: list[FieldError] | None = None


class Problem(HTTPException):
    """Raised anywhere in a request; becomes its answer.

    An HTTPException, since FastAPI turns every other exception from reading a body into a 400.
    """

    def __init__(self, status: int, slug: str, title: str, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, detail, headers)
        self.slug, self.title = slug, title


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route adds to OpenAPI for its errors."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemDetails"}}}
    return {status: {"description": _TITLES[status], "content": content} for status in sorted(statuses)}


_TITLES = {
    400: "The request is malformed",
    401: "A valid API key is needed",
    404: "There is no such thing",
    405: "The method does not fit the path",
    409: "The job's status does not allow it",
    413: "The request is too large",
    415: "The content type does not fit",
    422: "The request cannot be accepted as it is",
    500: "The server made a mistake",
    503: "A part of the service is away",
}


def answer(
    request: Request,
    status: int,
    slug: str,
    title: str,
    detail: str,
    *,
    headers: dict[str, str] | None = None,
    errors: list[FieldError] | None = None,
) -> JSONResponse:
    problem = ProblemDetails(
        type=f"urn:jobstack:problem:{slug}",
        title=title,
        status=status,
        detail=detail,
        request_id=request.scope.get("request_id"),
        errors=errors,
    )
    return JSONResponse(
        problem.model_dump(exclude_none=True),
        status_code=status,
        headers=headers,
        media_type="application/problem+json",
    )


def from_problem(request: Request, problem: Problem) -> JSONResponse:
    headers = dict(problem.headers or {})
    return answer(request, problem.status_code, problem.slug, problem.title, problem.detail, headers=headers)


def unavailable(request: Request, part: str) -> JSONResponse:
    return answer(
        request,
        503,
        "unavailable",
        _TITLES[503],
        f"{part} does not answer. Nothing was lost; try again in a moment (with the same Idempotency-Key).",
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
    )


def install(app: FastAPI) -> None:
    """Connects the exceptions that this program knows to their answers."""

    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem) -> JSONResponse:
        return from_problem(request, error)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        title = _TITLES.get(error.status_code, "The request failed")
        detail = {
            404: "Nothing is at this path; /docs lists what there is.",
            405: f"{request.method} is not possible at this path; see /docs.",
        }.get(error.status_code, str(error.detail))
        return answer(
            request,
            error.status_code,
            f"http-{error.status_code}",
            title,
            detail,
            headers=dict(error.headers or {}),
        )

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> JSONResponse:
        errors = [
            FieldError(
                field=".".join(str(part) for part in found["loc"]),
                # Never the input itself: it may be a secret, or a megabyte.
                message=str(found["msg"]).removeprefix("Value error, "),
            )
            for found in error.errors()[:MOST_ERRORS_SHOWN]
        ]
        detail = "; ".join(f"{e.field}: {e.message}" for e in errors[:3])
        return answer(request, 422, "invalid-request", _TITLES[422], detail, errors=errors)

    @app.exception_handler(UnknownFilesError)
    async def unknown_files(request: Request, error: UnknownFilesError) -> JSONResponse:
        detail = f"There is no file {error}; upload it first with POST /api/files."
        return answer(request, 422, "unknown-file", "The payload names a file that does not exist", detail)

    @app.exception_handler(KeyReusedError)
    async def key_reused(request: Request, error: KeyReusedError) -> JSONResponse:
        detail = (
            f"The idempotency key {error.key!r} belongs to a job with another body. "
            "Send the same body again, or another key for another job."
        )
        return answer(request, 422, "idempotency-key-reused", "The idempotency key is taken", detail)

    async def database_away(request: Request, error: Exception) -> JSONResponse:
        log.warning("postgres_unavailable", error=str(error).strip() or type(error).__name__)
        return unavailable(request, "PostgreSQL")

    for lost in (*CONNECTION_LOST, TimeoutError):
        app.add_exception_handler(lost, database_away)

    @app.exception_handler(psycopg.DataError)
    async def unstorable(request: Request, error: psycopg.DataError) -> JSONResponse:
        log.warning("unstorable_request", error=str(error).strip())
        return answer(request, 422, "unstorable", _TITLES[422], "PostgreSQL cannot store a value in the request.")

    @app.exception_handler(Exception)
    async def mistake(request: Request, error: Exception) -> JSONResponse:
        detail = "This is a mistake of ours, not yours. Tell us the request id."
        return answer(request, 500, "internal", _TITLES[500], detail)
