"""Errors to Sentry, traces to what speaks OpenTelemetry: off, and nothing imported, until their variables are set.

Their libraries are an extra, requirements/elsewhere.txt; docs/monitoring.md. Each is started in the process that uses
it, at its first error or span: threads and connections live through no fork.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import structlog
from structlog.typing import EventDict

from app.settings import Settings, get_settings

if TYPE_CHECKING:  # Starlette is not in the workers' image
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Fields of a line, which are a Sentry event's tags, and a span's attributes for them.
IDS = {
    "request_id": "request.id",
    "job_id": "job.id",
    "task_id": "task.id",
    "kind": "job.kind",
    "attempt": "job.attempt",
}
# An exception's text is a handler's own, and may say what was in the payload. Sentry is where errors go.
NO_TEXT: dict[str, Any] = {"record_exception": False, "set_status_on_exception": False}
# So long may a process's end wait for a server elsewhere.
PATIENCE_SECONDS = 2
# Asked all the time, or open for minutes.
UNTRACED = ("/health", "/metrics", "/static", "/events")

_flushes: list[Callable[[], Any]] = []


@cache
def _sentry(pid: int) -> Any:
    import sentry_sdk
    from sentry_sdk.integrations.atexit import AtexitIntegration
    from sentry_sdk.integrations.dedupe import DedupeIntegration

    settings = get_settings()
    sentry_sdk.init(
        settings.sentry_dsn.get_secret_value() if settings.sentry_dsn else None,
        environment=settings.app_env,
        # None of those that look for themselves: they would send what stands in requests, in messages and in argv.
        default_integrations=False,
        auto_enabling_integrations=False,
        integrations=[AtexitIntegration(lambda pending, timeout: None), DedupeIntegration()],
        send_default_pii=False,
        include_local_variables=False,
        max_request_body_size="never",
        max_breadcrumbs=0,
        shutdown_timeout=PATIENCE_SECONDS,
    )
    _flushes.append(lambda: sentry_sdk.flush(PATIENCE_SECONDS))
    return sentry_sdk


def to_sentry(logger: object, name: str, event: EventDict) -> EventDict:
    """A processor: sends lines of errors, and those with an exception. Of their fields only ids, kind and attempt."""
    error = event.get("exc_info")
    if error or event["level"] in ("error", "critical"):
        sentry = _sentry(os.getpid())
        about = {"level": event["level"], "tags": {name: str(event[name]) for name in IDS if event.get(name)}}
        error = sys.exc_info() if error is True else error
        if error and error != (None, None, None):
            about["tags"]["event"] = event["event"]
            sentry.capture_exception(error, **about)
        else:
            sentry.capture_message(event["event"], **about)
    return event


@cache
def _tracer(pid: int) -> Any:
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # The SDK reads OTEL_* itself.
    os.environ.setdefault("OTEL_SERVICE_NAME", "jobstack")
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(timeout=PATIENCE_SECONDS)))
    trace.set_tracer_provider(provider)  # for spans that a handler makes itself
    _flushes.append(provider.force_flush)
    return provider.get_tracer("jobstack")


@contextmanager
def job_span(settings: Settings) -> Iterator[Callable[[str], None]]:
    """A span around one run of the job that the log's context names. Yields what takes how it ended."""
    if not settings.otel_exporter_otlp_endpoint:
        yield lambda outcome: None
        return
    from opentelemetry.trace import StatusCode

    ids = structlog.contextvars.get_contextvars()
    attributes = {attribute: ids[name] for name, attribute in IDS.items() if ids.get(name)}
    with _tracer(os.getpid()).start_as_current_span(f"job {ids['kind']}", attributes=attributes, **NO_TEXT) as span:

        def ended(outcome: str) -> None:
            span.set_attribute("job.outcome", outcome)
            if outcome in ("failed", "retry"):
                span.set_status(StatusCode.ERROR)

        yield ended


class RequestSpans:
    """ASGI middleware, inside of the one that gives each request its id. It goes on with the caller's trace, if any."""

    def __init__(self, app: "ASGIApp") -> None:
        self.app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, StatusCode

        if scope["type"] != "http" or scope["path"].startswith(UNTRACED) or scope["path"].endswith(UNTRACED):
            await self.app(scope, receive, send)
            return
        caller = extract({name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]})
        attributes = {"request.id": scope["request_id"], "http.request.method": scope["method"]}
        with _tracer(os.getpid()).start_as_current_span(
            scope["method"], caller, SpanKind.SERVER, attributes, **NO_TEXT
        ) as span:

            async def noted_send(message: "Message") -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                await send(message)

            try:
                await self.app(scope, receive, noted_send)
            except Exception:
                span.set_status(StatusCode.ERROR)
                raise
            finally:
                # The template and not the path: ids would make a name each. Known when the routes have been asked.
                route = getattr(scope.get("route"), "path_format", "unmatched")
                span.update_name(f"{scope['method']} {route}")
                span.set_attribute("http.route", route)


def flush() -> None:
    """Before the end of a process that runs no exit handlers: a worker's child."""
    for send_all in _flushes:
        send_all()
