"""What happens around every request: its id, a limit on its body, one log line, its numbers. Plain ASGI, for speed."""

import re
import time
from collections.abc import Callable
from functools import cache
from uuid import uuid4

import structlog
from prometheus_client import Counter, Histogram
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import logs
from app.api import errors

log = logs.get("api")

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
QUIET_PATHS = ("/health", "/metrics")

REQUESTS = Counter("jobstack_http_requests", "Requests answered", ["method", "route", "status"])
DURATION = Histogram(
    "jobstack_http_request_duration_seconds",
    "From the request's head to the answer's end",
    ["method", "route"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)


@cache  # `labels` takes longer than counting
def _metrics(method: str, route: str, status: int) -> tuple[Counter, Histogram]:
    return REQUESTS.labels(method, route, status), DURATION.labels(method, route)


class RequestMiddleware:
    """Outermost. `limit` tells how many bytes the body of a request to this path may have."""

    def __init__(self, app: ASGIApp, *, limit: Callable[[str], int]) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if REQUEST_ID.fullmatch(given) else uuid4().hex
        scope["request_id"] = request_id
        limit = self.limit(scope["path"])
        began, status, received = time.monotonic(), 0, 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise errors.too_large("The body", limit)
            return message

        async def noted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", request_id.encode()))
            await send(message)

        async def answer(problem: errors.Problem) -> None:
            await errors.respond(Request(scope), problem)(scope, receive, noted_send)

        # For all log lines of this request. The server gave it a task of its own, with which this ends.
        structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            if int(headers.get(b"content-length", b"0")) > limit:
                # The server reads what still comes and forgets it, so that the client sees this answer.
                await answer(errors.too_large("The body", limit))
            else:
                await self.app(scope, limited_receive, noted_send)
        except Exception:  # whatever it is, it is a mistake of this program
            log.exception("mistake")
            if status:
                raise  # in the middle of an answer: the client must see it break off
            await answer(errors.mistake())
        finally:
            self._note(scope, status, time.monotonic() - began)

    @staticmethod
    def _note(scope: Scope, status: int, seconds: float) -> None:
        # The template and not the path: ids would make a time series each.
        route = getattr(scope.get("route"), "path_format", "unmatched")
        requests, duration = _metrics(scope["method"], route, status)
        requests.inc()
        duration.observe(seconds)
        if not scope["path"].startswith(QUIET_PATHS) or status >= 500:
            log.info("request", method=scope["method"], path=scope["path"], status=status, ms=round(seconds * 1000, 1))
