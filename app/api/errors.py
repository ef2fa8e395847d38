"""Every error answer: RFC 9457 problem+json that says what was wrong and what to do. No traceback leaves the API."""

from collections.abc import Callable
from typing import Any

import psycopg
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from obstore.exceptions import BaseError as StorageError
from psycopg.errors import UndefinedColumn, UndefinedTable
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from app import logs
from app.database import CONNECTION_LOST
from app.files.store import in_short, is_full
from app.jobs.create import KeyReusedError, UnknownFilesError
from app.web.templating import page, wants_page

log = logs.get(__name__)

RETRY_AFTER_SECONDS = 2
MOST_ERRORS_SHOWN = 20
MOST_FILES_SHOWN = 5
# Names and values that a client sent come back in messages: shortened, since they may be megabytes.
LONGEST_TEXT = 300

TITLES = {
    400: "The request is malformed",
    401: "A valid API key is needed",
    403: "The request comes from where it should not",
    404: "There is no such thing",
    405: "The method does not fit the path",
    408: "The request took too long",
    409: "The job's status does not allow it",
    413: "The request is too large",
    415: "The content type does not fit",
    422: "The request cannot be accepted as it is",
    500: "The server made a mistake",
    503: "A part of the service is away",
    507: "There is no room for it",
}


class FieldError(BaseModel):
    """What is wrong with one field of the request."""

    field: str = Field(description="Where: body.payload.width, query.limit, header.Idempotency-Key")
    message: str


class ProblemDetails(BaseModel):
    """An error, by RFC 9457."""

    type: str = Field(description="urn:jobstack:problem:..., the same for every error of this sort: to be compared.")
    title: str
    status: int
    detail: str = Field(description="For people: what was wrong, and what to do.")
    request_id: str | None = None
    errors: list[FieldError] | None = Field(None, description="Where the request's fields are what is wrong.")


class Problem(HTTPException):
    """Raised anywhere in a request; becomes its answer.

    An HTTPException, since FastAPI turns every other exception from reading a body into a 400.
    """

    def __init__(
        self,
        status: int,
        slug: str,
        detail: str,
        *,
        headers: dict[str, str] | None = None,
        errors: list[FieldError] | None = None,
    ) -> None:
        super().__init__(status, detail, headers)
        self.slug, self.errors = slug, errors


def away(part: str, reason: object) -> Problem:
    """503: a part of the service does not answer. The reason goes to the log only."""
    log.warning("unavailable", part=part, reason=str(reason).strip() or type(reason).__name__)
    detail = f"{part} does not answer. Nothing was lost; try again in a moment (with the same Idempotency-Key)."
    return Problem(503, "unavailable", detail, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})


def busy() -> Problem:
    """503: a queue in memory would only make everybody wait."""
    detail = "This process has as many requests in progress as it takes; try again in a moment."
    return Problem(503, "busy", detail, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})


def too_large(what: str, limit: int) -> Problem:
    return Problem(413, "too-large", f"{what} may have {limit} bytes at most.")


def mistake() -> Problem:
    return Problem(500, "internal", "This is a mistake of ours, not yours. Tell us the request id.")


def respond(request: Request, problem: Problem) -> Response:
    """As problem+json, or as a page for a person who opened one."""
    details = ProblemDetails(
        type=f"urn:jobstack:problem:{problem.slug}",
        title=TITLES.get(problem.status_code, "The request failed"),
        status=problem.status_code,
        detail=problem.detail,
        request_id=request.scope.get("request_id"),
        errors=problem.errors,
    )
    headers = dict(problem.headers or {})
    if wants_page(request):
        return page(request, "problem.html", {"problem": details}, problem.status_code, headers)
    return JSONResponse(
        details.model_dump(exclude_none=True), problem.status_code, headers, media_type="application/problem+json"
    )


def _http(request: Request, error: HTTPException) -> Problem:
    """The framework's own."""
    status, detail, headers = error.status_code, str(error.detail), dict(error.headers or {})
    if status == 404:
        detail = "Nothing is at this path; /docs lists what there is."
    if status == 405:
        allowed = _methods(request)
        detail, headers = f"{request.method} is not possible at this path, {allowed} is; see /docs.", {"Allow": allowed}
    return Problem(status, f"http-{status}", detail, headers=headers)


def _methods(request: Request) -> str:
    """All that the path has: the framework tells only the first route's."""

    def there(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)

    return ", ".join(filter(there, ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")))


def _invalid(request: Request, error: RequestValidationError) -> Problem:
    errors = [
        FieldError(
            field=_short(".".join(str(part) for part in found["loc"])),
            # Never the input itself, which may be a secret.
            message=_short(str(found["msg"]).removeprefix("Value error, ")),
        )
        for found in error.errors()[:MOST_ERRORS_SHOWN]
    ]
    detail = "; ".join(f"{e.field}: {e.message}" for e in errors[:3])
    return Problem(422, "invalid-request", detail, errors=errors)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…"


def _unknown_files(request: Request, error: UnknownFilesError) -> Problem:
    more = len(error.file_ids) - MOST_FILES_SHOWN
    names = ", ".join(map(str, error.file_ids[:MOST_FILES_SHOWN])) + (f" (and {more} more)" if more > 0 else "")
    return Problem(422, "unknown-file", f"There is no file {names}; upload it first with POST /api/files.")


def _key_reused(request: Request, error: KeyReusedError) -> Problem:
    detail = (
        f"The idempotency key {error.key!r} belongs to a job with another body. "
        "Send the same body again, or another key for another job."
    )
    return Problem(422, "idempotency-key-reused", detail)


def _storage(request: Request, error: StorageError) -> Problem:
    if not is_full(error):
        return away("The storage of files", in_short(error))
    # Unlike a 503, no moment's wait helps: somebody has to make room.
    log.error("storage_full", reason=in_short(error))
    return Problem(507, "storage-full", "The disk for files is full. Nothing was kept; tell whoever runs this service.")


def _unstorable(request: Request, error: Exception) -> Problem:
    log.warning("unstorable_request", reason=str(error).strip())
    return Problem(422, "unstorable", "PostgreSQL cannot store a value in the request.")


# Exceptions that this program knows -> their answers. All others are mistakes: the middleware's 500.
_PROBLEMS: dict[type[Exception], Callable[[Request, Any], Problem]] = {
    Problem: lambda request, error: error,
    HTTPException: _http,
    RequestValidationError: _invalid,
    UnknownFilesError: _unknown_files,
    KeyReusedError: _key_reused,
    # Nobody reads the answer, but the log does.
    ClientDisconnect: lambda request, error: Problem(400, "cut-off", "The connection ended before the request did."),
    **dict.fromkeys(CONNECTION_LOST, lambda request, error: away("PostgreSQL", error)),
    # Not migrated yet: a deploy's order, not a mistake.
    **dict.fromkeys((UndefinedTable, UndefinedColumn), lambda request, error: away("The migrated database", error)),
    # The checks in front of it should have refused such a value; a 500 would be the wrong answer all the same.
    psycopg.DataError: _unstorable,
    StorageError: _storage,
}


def install(app: FastAPI) -> None:
    async def handle(request: Request, error: Exception) -> Response:
        to_problem = next(_PROBLEMS[kind] for kind in type(error).__mro__ if kind in _PROBLEMS)
        return respond(request, to_problem(request, error))

    for kind in _PROBLEMS:
        app.add_exception_handler(kind, handle)


# --- OpenAPI -------------------------------------------------------------------------------------------------------

_CONTENT = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemDetails"}}}
_HEADERS = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}}},
    503: {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}},
}
_REQUEST_ID = {
    "description": "Yours (1 to 128 of A-Z a-z 0-9 . _ -), or else a new one; it is in the answer and in the logs.",
    "schema": {"type": "string"},
}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route adds to OpenAPI for its errors."""
    return {
        status: {"description": TITLES[status], "content": _CONTENT, "headers": _HEADERS.get(status, {})}
        for status in sorted(statuses)
    }


def describe(schema: dict[str, Any]) -> None:
    """Adds to an OpenAPI document what no route says by itself: the model of errors, and the id of each request."""
    schemas = schema["components"]["schemas"]
    problem = ProblemDetails.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= {**problem.pop("$defs"), "ProblemDetails": problem}
    # FastAPI's own, which no answer has.
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    for operation in (operation for path in schema["paths"].values() for operation in path.values()):
        parameters = operation.setdefault("parameters", [])
        for parameter in parameters:
            # "or null" is how Python says optional; in a URL or a header there is no null.
            parameter["schema"] |= parameter["schema"].pop("anyOf", [{}])[0]
        parameters.append({"name": "X-Request-ID", "in": "header", **_REQUEST_ID})
        for response in operation["responses"].values():
            response["headers"] = {**response.get("headers", {}), "X-Request-ID": _REQUEST_ID}
