"""What happens around every request: its id, refusals of what no request should be, limits, headers that make browsers
careful, one log line, its numbers. Plain ASGI, for speed."""

import ipaddress
import math
import re
import time
from collections.abc import Callable
from functools import cache
from urllib.parse import urlsplit
from uuid import uuid4

import structlog
from prometheus_client import Counter, Histogram
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import logs
from app.api import errors
from app.settings import Settings
from app.tls import is_private

log = logs.get("api")

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
QUIET_PATHS = ("/health", "/metrics")
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# Health checks are asked when it matters; streams of events have a limit of their own.
UNCOUNTED = re.compile(r"/health(/live|/ready)?|(/api/jobs/[^/]+)?/events")
# The only body that is read of somebody unknown. He can keep others from logging in, and from nothing else.
LOGIN = "/login"
MOST_LOGINS = 20
# Bodies are read whole, but for uploads. While others hold so many bytes, no further one is begun.
HELD_BYTES = 64 * 1024**2

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
# Of every answer that does not say it otherwise.
BROWSER_HEADERS = {
    b"content-security-policy": CSP.encode(),
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
}

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


def _from_another_site(headers: dict[bytes, bytes]) -> bool:
    """Whether a page of another site asks. Only browsers send these headers, and no page can change them.

    Without a cookie too: a stack without keys must not be driven by a page that its owner happens to look at.
    """
    if site := headers.get(b"sec-fetch-site"):
        return site not in (b"same-origin", b"none")
    # Browsers send the one above to https and localhost only.
    if (origin := headers.get(b"origin")) is None:
        return False
    try:
        asking = urlsplit(origin.decode("latin-1"))
    except ValueError:
        return True
    port = {"http": ":80", "https": ":443"}.get(asking.scheme, "")
    host = headers.get(b"host", b"").decode("latin-1")
    return not asking.netloc or asking.netloc.removesuffix(port).lower() != host.removesuffix(port).lower()


class RequestMiddleware:
    """Outermost. `limit` tells how many bytes the body of a request to this path may have."""

    def __init__(self, app: ASGIApp, *, limit: Callable[[str], int], settings: Settings) -> None:
        self.app = app
        self.limit = limit
        self.settings = settings
        # Places taken and places there are, by sort of request.
        self.running = {"request": 0, "login": 0, "uncounted": 0}
        self.most = {"request": settings.max_requests, "login": MOST_LOGINS, "uncounted": math.inf}
        self.held = 0

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes], limit: int, sort: str) -> errors.Problem | None:
        """What is wrong with a request before anything of it is read."""
        if scope["method"] not in SAFE_METHODS and _from_another_site(headers):
            return errors.Problem(403, "cross-site", "A page of another site asks for this; nothing was done.")
        host = headers.get(b"host", b"").decode("latin-1")
        if self.settings.app_env == "local" and not self._is_ours(host):
            detail = "Where APP_ENV=local, only localhost, addresses and the names in ALLOWED_HOSTS are answered to."
            return errors.Problem(403, "unknown-host", detail)
        if int(headers.get(b"content-length", b"0")) > limit:
            # The server reads what still comes and forgets it, so that the client sees this answer.
            return errors.too_large("The body", limit)
        if self.running[sort] > self.most[sort] or (sort == "request" and self.held > HELD_BYTES):
            return errors.busy()
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether a name in the header Host can't belong to a stranger: an address, `localhost`, `api`, `api.internal`.

        A stranger's name may lead to 127.0.0.1 ("DNS rebinding"), and his page, in the eyes of a browser, to this API.
        """
        name = re.sub(r":\d*$", "", host).strip("[].").lower()
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return is_private(name) or name in self.settings.allowed_hosts
        return True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if REQUEST_ID.fullmatch(given) else uuid4().hex
        scope["request_id"] = request_id
        path = scope["path"]
        limit, streamed = self.limit(path), path == "/api/files"
        sort = "login" if path == LOGIN else "uncounted" if UNCOUNTED.fullmatch(path) else "request"
        began, status, received = time.monotonic(), 0, 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            size = len(message.get("body", b""))
            received += size
            self.held += 0 if streamed else size
            if received > limit:
                raise errors.too_large("The body", limit)
            return message

        async def noted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = message.setdefault("headers", [])
                said = {name for name, _ in own}
                own += [header for header in BROWSER_HEADERS.items() if header[0] not in said]
                own.append((b"x-request-id", request_id.encode()))
            await send(message)

        async def answer(problem: errors.Problem) -> None:
            await errors.respond(Request(scope), problem)(scope, receive, noted_send)

        # For all log lines of this request. The server gave it a task of its own, with which this ends.
        structlog.contextvars.bind_contextvars(request_id=request_id)
        self.running[sort] += 1
        try:
            if refusal := self._refusal(scope, headers, limit, sort):
                await answer(refusal)
            else:
                await self.app(scope, limited_receive, noted_send)
        except Exception:  # whatever it is, it is a mistake of this program
            log.exception("mistake")
            if status:
                raise  # in the middle of an answer: the client must see it break off
            await answer(errors.mistake())
        finally:
            self.running[sort] -= 1
            self.held -= 0 if streamed else received
            self._note(scope, status, time.monotonic() - began)

    @staticmethod
    def _note(scope: Scope, status: int, seconds: float) -> None:
        # The template and not the path: ids would make a time series each.
        route = getattr(scope.get("route"), "path_format", "unmatched")
        requests, duration = _metrics(scope["method"], route, status)
        requests.inc()
        if not route.endswith("/events"):  # how long somebody stayed says nothing of how fast we are
            duration.observe(seconds)
        if not scope["path"].startswith(QUIET_PATHS) or status >= 500:
            log.info("request", method=scope["method"], path=scope["path"], status=status, ms=round(seconds * 1000, 1))
