"""Errors to Sentry and traces to OpenTelemetry: the real libraries, and a server that takes what they send."""

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from app.settings import SettingsError, get_settings
from tests.integration.conftest import Jobs
from tests.processes import ROOT, Process
from tests.servers import Redis, free_port
from tests.waiting import until

SECRET = "what-only-the-payload-says"
# Sent at a process's end, and not before: so it is the end that is tested.
LATE = {"OTEL_BSP_SCHEDULE_DELAY": "600000"}
WITH_A_BUG = """
import sys
from fastapi import Request
from app.api.__main__ import serve
from app.api.app import create_app

def create():
    app = create_app()

    @app.post("/bug/{number}")
    async def bug(request: Request):
        body = await request.json()
        raise ValueError("a bug")

    return app

serve(create)
"""


class Elsewhere:
    """Sentry and a collector in one."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.events: list[dict[str, Any]] = []
        self.spans: list[Any] = []
        elsewhere = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                elsewhere.take(self.path, body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{self.server.server_port}"
        self.variables = {
            "SENTRY_DSN": f"http://key@{host}/1",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{host}",
            **LATE,
        }

    def take(self, path: str, body: bytes) -> None:
        self.bodies.append(body)
        if path == "/v1/traces":
            sent = ExportTraceServiceRequest.FromString(body)
            self.spans += [span for r in sent.resource_spans for s in r.scope_spans for span in s.spans]
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            self.events += [line for line in lines if "event_id" in line and "level" in line]

    def span(self, name: str) -> dict[str, Any]:
        """The attributes of the only span of that name, once it is there."""
        until(lambda: any(span.name == name for span in self.spans), f"the span {name!r} arrives")
        [span] = [span for span in self.spans if span.name == name]
        assert not span.events  # an exception's text is in none
        values = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}
        return values | {"trace": span.trace_id.hex(), "error": span.status.code == 2}

    def event(self) -> dict[str, Any]:
        """The only one, once it is there."""
        until(lambda: self.events, "an event arrives")
        [event] = self.events
        return event


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    there = Elsewhere()
    yield there
    there.server.shutdown()
    there.server.server_close()


def test_a_mistake_of_the_api(elsewhere: Elsewhere, redis: Redis, db: object, tmp_path: Path) -> None:
    port = free_port()
    process = Process([sys.executable, "-c", WITH_A_BUG], tmp_path, PORT=port, **elsewhere.variables)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:

            def answers() -> bool:
                try:
                    return client.get("/health/live").is_success
                except httpx.TransportError:
                    return False

            until(answers, "the API is up")
            trace = "0af7651916cd43dd8448eb211c80319c"
            headers = {"X-Request-ID": "r-7", "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
            assert client.post("/bug/1?q=" + SECRET, json={"secret": SECRET}, headers=headers).status_code == 500
            assert client.get("/api/jobs").is_success
        process.terminate()
        assert process.wait(20) == 0, process.log
    finally:
        process.kill()
    event = elsewhere.event()
    assert event["exception"]["values"][-1]["value"] == "a bug"
    assert event["tags"] == {"request_id": "r-7", "event": "mistake"}
    span = elsewhere.span("POST /bug/{number}")
    assert span == {
        "request.id": "r-7",
        "http.request.method": "POST",
        "http.route": "/bug/{number}",
        "trace": trace,
        "error": True,
    }
    # No health check, and none twice.
    assert [span.name for span in elsewhere.spans] == ["POST /bug/{number}", "GET /api/jobs"]
    assert SECRET.encode() not in b"".join(elsewhere.bodies)


def test_a_failing_job(elsewhere: Elsewhere, jobs: Jobs, start: Callable[..., Process]) -> None:
    # A child ends after one task, by a way on which no exit handler runs.
    start("odd", WORKER_MAX_TASKS_PER_CHILD=1, **elsewhere.variables)
    job_id = jobs.start("odd", {"do": "ValueError", "path": f"/{SECRET}"}, request_id="r-8")
    span = elsewhere.span("job odd")
    task_id = span.pop("task.id")
    assert task_id.startswith(str(job_id))
    assert span.pop("trace")
    assert span == {
        "request.id": "r-8",
        "job.id": str(job_id),
        "job.kind": "odd",
        "job.attempt": 1,
        "job.outcome": "failed",
        "error": True,
    }
    event = elsewhere.event()
    assert event["exception"]["values"][-1]["value"] == "a bug"
    assert event["tags"] == {
        "event": "attempt_failed",
        "request_id": "r-8",
        "job_id": str(job_id),
        "task_id": task_id,
        "kind": "odd",
        "attempt": "1",
    }
    assert SECRET.encode() not in b"".join(elsewhere.bodies)


@pytest.mark.parametrize("switched_on", [False, True])
def test_nothing_is_imported_before_it_is_wanted(settings: object, elsewhere: Elsewhere, switched_on: bool) -> None:
    code = (
        "import sys; from app import logs; from app.api.app import create_app; import worker.tasks; "
        "logs.configure(); create_app(); logs.get('x').info('well'); "
        "assert not {'sentry_sdk', 'opentelemetry.sdk'} & sys.modules.keys()"
    )
    variables = elsewhere.variables if switched_on else {}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | variables, check=True)


def test_lines_that_are_no_errors_stay_here(settings: object, elsewhere: Elsewhere) -> None:
    code = (
        "import logging; from app import logs; logs.configure(); log = logs.get('x'); "
        f"log.warning('foreseen', reason='{SECRET}'); log.error('ours', reason='{SECRET}', job_id='j-1'); "
        "logging.getLogger('theirs').error('of a library')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | elsewhere.variables, check=True)
    until(lambda: len(elsewhere.events) == 2, "both arrive")
    assert [(event["message"], event.get("tags")) for event in elsewhere.events] == [
        ("ours", {"job_id": "j-1"}),
        ("of a library", None),
    ]
    assert SECRET.encode() not in b"".join(elsewhere.bodies)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("SENTRY_DSN", "https://key@sentry.example/1"), ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")],
)
def test_without_the_extra_a_process_says_what_to_do(
    settings: object, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    get_settings.cache_clear()
    get_settings()
    monkeypatch.setitem(sys.modules, "sentry_sdk", None)  # as if it were not there
    get_settings.cache_clear()
    with pytest.raises(SettingsError, match=f"{variable} .*EXTRA=elsewhere"):
        get_settings()


def test_a_dsn_that_is_none_is_not_repeated(settings: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SENTRY_DSN", SECRET)
    get_settings.cache_clear()
    with pytest.raises(SettingsError, match="SENTRY_DSN is not") as refused:
        get_settings()
    assert SECRET not in str(refused.value)
