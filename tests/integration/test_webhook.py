"""The kind `webhook` against real HTTP servers, through the real runner and a real database."""

import gzip
import json
import re
import socket
import ssl
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from app.jobs import statements
from app.jobs.kinds.webhook import Result
from app.settings import Settings
from tests.servers import Redis, free_port
from worker.handlers import webhook
from worker.runner import Runner

CERTIFICATE = Path(__file__).with_name("hook.test.pem")
LIMIT = 64 * 1024

RunKind = Callable[..., dict[str, Any]]
Reply = Callable[["Handler"], None]


class Server(ThreadingHTTPServer):
    """Keeps what it is asked and answers with `replies` in turn; the last one goes for all that follow."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, family: socket.AddressFamily = socket.AF_INET) -> None:
        self.address_family = family
        super().__init__(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), Handler)
        self.replies: list[Reply] = [answer(200)]
        self.requests: list[Handler] = []
        self.connections = 0
        self.names: list[str | None] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook?a=1"

    @property
    def keys(self) -> list[str | None]:
        return [request.headers["Idempotency-Key"] for request in self.requests]

    def get_request(self) -> tuple[Any, Any]:
        self.connections += 1
        return super().get_request()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the client hung up, which is what most of these tests are about


class Handler(BaseHTTPRequestHandler):
    server: Server
    body: bytes = b""

    def do_POST(self) -> None:
        self.server.requests.append(self)
        reply = self.server.replies[min(len(self.server.requests), len(self.server.replies)) - 1]
        if not getattr(reply, "ignores_body", False):
            self.body = self.rfile.read(int(self.headers["Content-Length"]))
        self.close_connection = True
        reply(self)

    do_GET = do_POST  # noqa: N815  what following a 303 would send

    def log_message(self, format: str, *args: object) -> None:
        pass


def answer(status: int, body: bytes = b"", **headers: str) -> Reply:
    def reply(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def endless(piece: bytes, pause: float, before: bytes) -> Reply:
    """`before`, then `piece` again and again until the client hangs up."""

    def reply(handler: Handler) -> None:
        handler.wfile.write(before)
        while not handler.server.closing.wait(pause):
            handler.wfile.write(piece)

    return reply


HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.fixture
def settings(environment: Redis) -> Settings:
    """The servers of these tests are at home."""
    return Settings(webhook_allow_private=True)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield from serve(server)


def serve(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join(10)


def test_what_is_sent(run_kind: RunKind, server: Server) -> None:
    server.replies = [answer(201, b'{"ok": "\xc3\xa4"}', Content_Type="application/json")]
    body = {"text": "ä\u2028", "n": [1.5, None, True, 10**30]}
    headers = {"Authorization": "Bearer s3cret", "X-Team": "blue", "USER-AGENT": "ours/1"}
    job = run_kind("webhook", {"url": server.url, "body": body, "headers": headers})
    assert job["status"] == "succeeded"
    assert job["result"] == {"status": 201, "body": '{"ok": "ä"}'}
    [request] = server.requests
    assert (request.command, request.path) == ("POST", "/hook?a=1")
    assert json.loads(request.body) == body
    received = {name.lower(): value for name, value in request.headers.items()}
    assert len(received) == len(request.headers), "a header was sent twice"
    assert received == {
        "host": f"127.0.0.1:{server.server_port}",
        "content-type": "application/json",
        "content-length": str(len(request.body)),
        "idempotency-key": job["id"],
        "accept-encoding": "identity",
        "user-agent": "ours/1",
        "authorization": "Bearer s3cret",
        "x-team": "blue",
    }
    assert job["payload"]["headers"] == headers | {"Authorization": "***"}


def test_the_idempotency_key_is_the_same_on_every_attempt(run_kind: RunKind, server: Server) -> None:
    server.replies = [answer(503), answer(429), answer(200, b"done")]
    job = run_kind("webhook", {"url": server.url, "body": None})
    for _ in range(2):
        assert job["status"] == "queued"
        job = run_kind("webhook", {}, job_id=job["id"])
    assert (job["status"], job["attempt"], job["result"]["body"]) == ("succeeded", 3, "done")
    assert server.keys == [job["id"]] * 3


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 599])
def test_transient_answers(run_kind: RunKind, server: Server, status: int) -> None:
    server.replies = [answer(status)]
    job = run_kind("webhook", {"url": server.url, "body": {}})
    assert job["status"] == "queued"
    assert job["error"] == {"type": "TransientError", "message": f"127.0.0.1 answered {status}"}


@pytest.mark.parametrize("status", [304, 400, 401, 403, 404, 409, 410, 422, 428, 499])
def test_permanent_answers(run_kind: RunKind, server: Server, status: int) -> None:
    server.replies = [answer(status)]
    job = run_kind("webhook", {"url": server.url, "body": {}})
    assert job["status"] == "failed"
    assert job["error"]["type"] == "PermanentError"
    assert job["error"]["message"].startswith(f"127.0.0.1 answered {status}")


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308])
def test_redirects_are_not_followed(run_kind: RunKind, server: Server, status: int) -> None:
    server.replies = [answer(status, Location="/elsewhere"), answer(200)]
    job = run_kind("webhook", {"url": server.url, "body": {}})
    assert job["status"] == "failed"
    assert re.search(f"answered {status}; redirects are not followed", job["error"]["message"])
    assert server.connections == 1


@pytest.mark.parametrize(
    ("after", "least", "most"),
    # The upper bounds leave half a minute for the way from the claim to the answer.
    [("100", 98, 131), ("9" * 5000, 590, 631), ("Wed, 21 Oct 2037 07:28:00 GMT", 0, 33), ("-5", 0, 33), ("x", 0, 33)],
)
def test_retry_after(run_kind: RunKind, server: Server, after: str, least: float, most: float) -> None:
    server.replies = [answer(429, Retry_After=after)]
    job = run_kind("webhook", {"url": server.url, "body": {}})
    assert job["status"] == "queued"
    ended = datetime.fromisoformat(job["heartbeat_at"] or job["started_at"])
    assert least <= (datetime.fromisoformat(job["run_at"]) - ended).total_seconds() <= most


def fail(runner: Runner, error: Exception) -> Result:
    raise error


def lose_the_lease(runner: Runner, result: Result) -> Result:
    """Another worker thought this one dead and has rescued the job."""
    late = "UPDATE jobs SET lease_expires_at = now() - interval '1 second' RETURNING id"
    runner.database.run(late)
    rescue = {"settle": 0, "error": json.dumps({"type": "LeaseLost", "message": ""}), "retry_in": 0}
    runner.database.run(statements.RESCUE, {**rescue, "published": False})
    return result


AFTERWARDS: dict[str, Callable[[Runner, Result], Result]] = {
    "a transient error": lambda runner, result: fail(runner, OSError("disk full")),
    "a permanent error": lambda runner, result: fail(runner, ValueError("bug")),
    "a result that can't be stored": lambda runner, result: result.model_copy(update={"body": "\ud800"}),
    "a lost lease": lose_the_lease,
}


@pytest.mark.parametrize("trouble", AFTERWARDS)
def test_a_recorded_answer_is_not_sent_again(run_kind: RunKind, server: Server, runner: Runner, trouble: str) -> None:
    server.replies = [answer(200, b"first"), answer(200, b"second")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(webhook, "Result", lambda **fields: AFTERWARDS[trouble](runner, Result(**fields)))
        job = run_kind("webhook", {"url": server.url, "body": {}})
    assert job["status"] != "succeeded"
    assert len(server.requests) == 1
    if job["status"] == "failed":  # by a person, then
        runner.database.run(statements.RETRY, {"id": job["id"]})
    job = run_kind("webhook", {}, job_id=job["id"])
    assert job["status"] == "succeeded"
    assert job["result"] == {"status": 200, "body": "first"}
    assert server.connections == 1


def test_a_2xx_whose_body_breaks_off_is_not_sent_again(run_kind: RunKind, server: Server) -> None:
    server.replies = [answer(200, b"par", Content_Length="7")]
    job = run_kind("webhook", {"url": server.url, "body": {}})
    assert job["status"] == "succeeded"
    assert job["result"] == {"status": 200, "body": "par"}
    assert server.connections == 1


def hang_up(handler: Handler) -> None:
    pass


def garbage(handler: Handler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.9\r\n")


@pytest.mark.parametrize("reply", [hang_up, garbage])
def test_no_proper_answer_is_transient(run_kind: RunKind, server: Server, reply: Reply) -> None:
    server.replies = [reply]
    job = run_kind("webhook", {"url": server.url, "body": {}})
    assert job["status"] == "queued"
    assert job["error"] == {"type": "TransientError", "message": "the connection to 127.0.0.1 failed"}
    assert server.connections == 1, "httpcore must not repeat a POST by itself"


def test_a_refused_connection_is_transient(run_kind: RunKind, server: Server) -> None:
    job = run_kind("webhook", {"url": f"http://127.0.0.1:{free_port()}/", "body": {}})
    assert job["status"] == "queued"
    assert job["error"]["message"] == "the connection to 127.0.0.1 failed"


def test_an_early_refusal_is_read(run_kind: RunKind, server: Server) -> None:
    """A server that takes no large bodies answers and hangs up, in the middle of our sending."""
    reply = answer(413)
    reply.ignores_body = True  # type: ignore[attr-defined]
    server.replies = [reply]
    job = run_kind("webhook", {"url": server.url, "body": "x" * 20_000_000})
    assert job["status"] == "failed"
    assert job["error"]["message"] == "127.0.0.1 answered 413"


@pytest.mark.parametrize("size", [LIMIT - 1, LIMIT, LIMIT + 1, 3_000_000])
def test_bodies_are_kept_up_to_64_kb(run_kind: RunKind, server: Server, size: int) -> None:
    server.replies = [answer(200, b"x" * size)]
    job = run_kind("webhook", {"url": server.url, "body": {}})
    assert job["result"]["body"] == "x" * min(size, LIMIT)


def test_an_endless_body_is_not_downloaded(run_kind: RunKind, server: Server) -> None:
    server.replies = [endless(b"x" * 100_000, 0, HEAD)]
    began = time.monotonic()
    job = run_kind("webhook", {"url": server.url, "body": {}})
    assert job["result"] == {"status": 200, "body": "x" * LIMIT}
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "deflate", "GZIP"])
def test_a_compressed_bomb_stays_small(run_kind: RunKind, server: Server, encoding: str) -> None:
    bomb = (zlib.compress if encoding == "deflate" else gzip.compress)(b"x" * 200_000_000)
    server.replies = [answer(200, bomb, Content_Encoding=encoding)]
    tracemalloc.start()
    try:
        job = run_kind("webhook", {"url": server.url, "body": {}})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert job["result"]["body"] == "x" * LIMIT
    assert peak < 5_000_000


@pytest.mark.parametrize(
    ("raw", "headers", "text"),
    [
        (b"", {}, ""),
        ("ä€😀".encode(), {}, "ä€😀"),
        (b"a\0b", {}, "a\ufffdb"),
        (b"a\xffb", {}, "a\ufffdb"),
        (b"\xed\xa0\x80", {}, "\ufffd\ufffd\ufffd"),
        ("ä".encode("latin-1"), {"Content_Type": "text/plain; charset=ISO-8859-1"}, "ä"),
        ("ä".encode("utf-16"), {"Content_Type": 'text/plain; charset="UTF-16"'}, "ä"),
        (b"\\ud800-\\udfff\\0", {"Content_Type": "text/plain; charset=unicode_escape"}, "\ufffd-\ufffd\ufffd"),
        (b"+2AA-", {"Content_Type": "text/plain; charset=utf-7"}, "\ufffd"),
        ("ä".encode(), {"Content_Type": "text/plain; charset=nonsense"}, "ä"),
        ("ä".encode(), {"Content_Type": "text/plain; charset=zlib"}, "ä"),
        ("ä".encode(), {"Content_Type": "text/plain; charset=idna"}, "ä"),
        ("€".encode() * 30_000, {}, "€" * (LIMIT // 3)),
        (b"\xff" * 60_000, {}, "\ufffd" * (LIMIT // 3)),
        (gzip.compress("ä".encode(), mtime=0), {"Content_Encoding": "gzip"}, "ä"),
        (b"plain after all", {"Content_Encoding": "gzip"}, "plain after all"),
    ],
)
def test_the_body_is_text_that_can_be_stored(
    run_kind: RunKind, server: Server, raw: bytes, headers: dict[str, str], text: str
) -> None:
    server.replies = [answer(200, raw, **headers)]
    job = run_kind("webhook", {"url": server.url, "body": {}})
    assert job["result"]["body"] == text


def test_an_answer_without_a_body(run_kind: RunKind, server: Server) -> None:
    server.replies = [answer(204)]
    job = run_kind("webhook", {"url": server.url, "body": {}})
    assert job["result"] == {"status": 204, "body": ""}


DRIPS = {
    "a status line": endless(b"x", 0.1, b"HTTP/1.1 200 "),
    "headers": endless(b"X: y\r\n", 0.1, b"HTTP/1.1 200 OK\r\n"),
    "interim answers": endless(b"HTTP/1.1 100 Continue\r\n\r\n", 0.1, b""),
    "nothing": endless(b"", 0.1, b""),
}


@pytest.mark.parametrize("drip", DRIPS)
def test_the_time_limit_covers_the_whole_call(
    run_kind: RunKind, server: Server, monkeypatch: pytest.MonkeyPatch, drip: str
) -> None:
    """Each byte comes well within any limit per read."""
    monkeypatch.setattr(webhook, "CALL_SECONDS", 0.7)
    server.replies = [DRIPS[drip]]
    began = time.monotonic()
    job = run_kind("webhook", {"url": server.url, "body": {}})
    assert time.monotonic() - began < 10
    assert job["status"] == "queued"
    assert job["error"]["message"] == "127.0.0.1 did not answer in time (0.7 s for everything)"


def test_a_dripping_body_is_cut_at_the_time_limit(
    run_kind: RunKind, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "CALL_SECONDS", 3)
    server.replies = [endless(b"x", 0.1, HEAD)]
    began = time.monotonic()
    job = run_kind("webhook", {"url": server.url, "body": {}})
    assert time.monotonic() - began < 10
    assert job["status"] == "succeeded"
    assert re.fullmatch("x{1,30}", job["result"]["body"])


def test_a_server_that_does_not_read_is_left(
    run_kind: RunKind, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "CALL_SECONDS", 0.7)

    def reply(handler: Handler) -> None:
        while not handler.server.closing.wait(0.1):
            handler.connection.recv(1000)

    reply.ignores_body = True  # type: ignore[attr-defined]
    server.replies = [reply]
    began = time.monotonic()
    job = run_kind("webhook", {"url": server.url, "body": "x" * 20_000_000})
    assert time.monotonic() - began < 20
    assert job["status"] == "queued"
    assert "did not answer in time" in job["error"]["message"]


@pytest.mark.parametrize(
    "reply", [answer(403, b"you sent s3cret"), answer(500), hang_up, answer(302, Location="/?s3cret")]
)
def test_errors_tell_no_secrets(run_kind: RunKind, server: Server, reply: Reply) -> None:
    server.replies = [reply]
    url = f"{server.url}&token=s3cret"
    job = run_kind("webhook", {"url": url, "body": "s3cret", "headers": {"Authorization": "s3cret"}})
    assert "s3cret" not in json.dumps(job["error"])
    assert "s3cret" not in json.dumps(job["payload"]["headers"])


def test_a_private_address_is_refused_for_good(run_kind: RunKind, server: Server, runner: Runner) -> None:
    runner.settings = runner.settings.model_copy(update={"webhook_allow_private": False})
    job = run_kind("webhook", {"url": server.url, "body": {}})
    assert job["status"] == "failed"
    assert job["error"]["type"] == "PermanentError"
    assert "127.0.0.1 is not on the public internet" in job["error"]["message"]
    assert "WEBHOOK_ALLOW_PRIVATE" in job["error"]["message"]
    assert server.connections == 0


def test_an_ipv6_address(run_kind: RunKind) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with Server(socket.AF_INET6) as server:
        for running in serve(server):
            host = f"[::1]:{running.server_port}"
            assert run_kind("webhook", {"url": f"http://{host}/", "body": {}})["status"] == "succeeded"
            assert running.requests[0].headers["Host"] == host


@pytest.fixture
def secure(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server speaks TLS as hook.test; every name resolves to it, and its certificate is trusted."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    context.sni_callback = lambda _, name, __: server.names.append(name)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    resolve = socket.getaddrinfo

    def getaddrinfo(host: str, *args: Any, **kwargs: Any) -> Any:
        return resolve("127.0.0.1", *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    return server


def test_tls_sees_the_name_and_not_the_address(run_kind: RunKind, secure: Server) -> None:
    job = run_kind("webhook", {"url": f"https://hook.test:{secure.server_port}/", "body": {}})
    assert job["status"] == "succeeded", job["error"]
    assert secure.names == ["hook.test"]
    assert secure.requests[0].headers["Host"] == f"hook.test:{secure.server_port}"


@pytest.mark.parametrize("host", ["other.test", "127.0.0.1"])
def test_a_certificate_for_another_name_is_refused(run_kind: RunKind, secure: Server, host: str) -> None:
    job = run_kind("webhook", {"url": f"https://{host}:{secure.server_port}/", "body": {}})
    assert job["status"] == "queued"
    assert job["error"]["message"] == f"no secure connection to {host}: CERTIFICATE_VERIFY_FAILED"
    assert secure.requests == []


def test_an_untrusted_certificate_is_refused(
    run_kind: RunKind, secure: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    job = run_kind("webhook", {"url": f"https://hook.test:{secure.server_port}/", "body": {}})
    assert "CERTIFICATE_VERIFY_FAILED" in job["error"]["message"]
    assert secure.requests == []


def test_plain_http_where_tls_was_asked_for(run_kind: RunKind, server: Server) -> None:
    job = run_kind("webhook", {"url": f"https://127.0.0.1:{server.server_port}/", "body": {}})
    assert job["status"] == "queued"
    assert job["error"]["message"].startswith("no secure connection to 127.0.0.1: ")
