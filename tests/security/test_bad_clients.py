"""Clients who send without end, or hardly at all: each is refused, costs little, and keeps nobody out."""

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import psutil
import pytest
from fastapi import FastAPI

from app.api import __main__ as api_main
from app.api import login, middleware, protocol
from tests.integration.api.conftest import NOOP, created, problem
from tests.processes import Process
from tests.waiting import until

Serve = Callable[..., httpx.Client]
HEAD = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n"
JSON_HEAD = b"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LOGIN_HEAD = b"POST /login HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def connect() -> Iterator[Callable[[httpx.Client], socket.socket]]:
    """connect(api) -> a socket to it."""
    with ExitStack() as stack:

        def begin(api: httpx.Client) -> socket.socket:
            address = (str(api.base_url.host), api.base_url.port or 0)
            return stack.enter_context(socket.create_connection(address, timeout=10))

        yield begin


def answer(connection: socket.socket) -> bytes:
    """Everything up to the end of the connection."""
    received = b""
    with suppress(ConnectionError):
        while piece := connection.recv(65536):
            received += piece
    return received


def is_alive(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False
    finally:
        connection.setblocking(True)


def takes(connection: socket.socket) -> bool:
    """Whether the server still keeps it; the kernel drops one that is not read without a word."""
    try:
        connection.sendall(b"\r")
    except ConnectionError:
        return False
    return True


ENDLESS = {
    "a header": (HEAD + b"X-A: ", b"a" * 65536),
    "headers": (HEAD, b"X-A: aaaaaaaaaaaaaaaaaaaaaaaaaa\r\n" * 2048),
    "a path": (b"GET /", b"a" * 65536),
    "a method": (b"GET", b"T" * 65536),
    "trailers": (CHUNKED + b"2\r\n{}\r\n0\r\n", b"X-A: aaaaaaaaaaaaaaaaaaaaaaaaaa\r\n" * 2048),
    "a trailer": (CHUNKED + b"2\r\n{}\r\n0\r\nX-A: ", b"a" * 65536),
    "a chunk's extension": (CHUNKED + b"2;", b"a" * 65536),
}


def test_what_is_endless_is_cut_off(
    serve_process: Callable[..., tuple[httpx.Client, Process]], connect: Callable[..., socket.socket]
) -> None:
    api, process = serve_process()
    memory = psutil.Process(process.process.pid).memory_info
    before = memory().rss
    for begin, more in ENDLESS.values():
        connection = connect(api)
        with pytest.raises(ConnectionError):
            connection.sendall(begin + more * 1600)  # 100 MB
    assert memory().rss - before < 20 * 1024**2
    assert api.get("/health/live").status_code == 200
    assert "Traceback" not in process.log
    # A line for each, and not one for each piece.
    assert process.log.count("too large") <= len(ENDLESS)


@pytest.mark.parametrize(
    "head",
    [HEAD + b"X-A: " + b"a" * 100_000, HEAD + b"X-A: aaaaaaaaa\r\n" * 8000, b"GET /?" + b"a" * 70_000 + HEAD[4:]],
)
def test_a_head_that_is_too_large(serve: Serve, connect: Callable[..., socket.socket], head: bytes) -> None:
    connection = connect(serve())
    connection.sendall(head + b"\r\n\r\n")
    received = answer(connection)
    assert received == b"" or b" 431 " in received[:20]


def test_a_large_head_that_is_none_too_large(serve: Serve) -> None:
    api = serve()
    for _ in range(3):
        assert api.get("/health/live", headers={"X-A": "a" * 60_000}).status_code == 200


def test_half_a_head_is_not_waited_for(
    serve: Serve, connect: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 1)
    api = serve()
    for begin in (b"", HEAD, HEAD + b"\r\n" + HEAD):
        connection = connect(api)
        connection.sendall(begin)
        received = answer(connection)
        assert received.count(b"HTTP/1.1 200") == begin.count(b"\r\n\r\n")


def test_thousands_that_say_nothing_keep_nobody_out(
    serve: Serve, connect: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MOST_IDLE", 50)
    api = serve()
    silent = []
    for i in range(300):
        silent.append(connect(api))
        silent[-1].sendall(HEAD)
        if i % 30 == 0:
            created(api.post("/api/jobs", json=NOOP))
    # Those that waited longest have gone, and whoever came last may still speak.
    until(lambda: sum(map(is_alive, silent)) <= 50, "the others are gone")
    silent[-1].sendall(b"Connection: close\r\n\r\n")
    assert b"200 OK" in answer(silent[-1])
    assert len(protocol.Protocol._unanswered) <= 50
    assert len(protocol.Protocol._answered) <= 50


def test_a_kept_connection_outlives_those_that_say_nothing(
    serve: Serve, connect: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MOST_IDLE", 5)
    api = serve()
    kept = connect(api)
    kept.sendall(HEAD + b"\r\n")
    assert b"200 OK" in kept.recv(65536)
    silent = [connect(api) for _ in range(30)]
    until(lambda: sum(map(is_alive, silent)) <= 5, "most of the silent are gone")
    kept.sendall(HEAD + b"Connection: close\r\n\r\n")
    assert b"200 OK" in answer(kept)
    # Among themselves the answered go as the silent do.
    answered = []
    for _ in range(6):
        answered.append(connect(api))
        answered[-1].sendall(HEAD + b"\r\n")
        assert b"200 OK" in answered[-1].recv(65536)
    until(lambda: not is_alive(answered[0]), "the one that has waited longest is gone")
    assert all(map(is_alive, answered[1:]))


def test_a_body_that_hardly_comes_is_given_up(
    serve: Serve, connect: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(protocol, "BODY_BYTES", 5)
    api = serve()
    connection = connect(api)
    connection.sendall(JSON_HEAD + b"Content-Length: 1000\r\n\r\n{")
    assert answer(connection) == b""
    # Slow is not too slow. The body takes 2.5 s, so that it is looked at on the way, and may be held up for a while.
    monkeypatch.setattr(protocol, "BODY_SECONDS", 2)
    connection = connect(api)
    body = b'{"kind": "sleep", "payload": {"seconds": 0}}'
    connection.sendall(JSON_HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body[:8])
    for i in range(8, len(body), 8):
        connection.settimeout(0.5)
        with suppress(TimeoutError):
            connection.recv(1)
        connection.sendall(body[i : i + 8])
    connection.settimeout(10)
    assert b" 202 " in answer(connection)


def test_a_body_without_a_length_is_read_up_to_the_limit(serve: Serve, connect: Callable[..., socket.socket]) -> None:
    connection = connect(serve(max_payload_bytes=1000))
    connection.sendall(CHUNKED)
    with suppress(ConnectionError):
        for _ in range(400):
            connection.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
    connection.sendall(b"0\r\n\r\n")
    connection.shutdown(socket.SHUT_WR)
    assert b" 413 " in answer(connection)


def held(connection: socket.socket, size: int = 0) -> socket.socket:
    """A request that waits for the rest of its body."""
    connection.sendall(JSON_HEAD + b"Content-Length: %d\r\n\r\n%s" % (size + 1, b" " * size))
    return connection


@pytest.mark.parametrize("limit", ["requests", "bytes"])
def test_more_than_it_can_take_is_said_at_once(
    serve: Serve, connect: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(middleware, "HELD_BYTES", 100_000)
    api = serve(max_requests=3 if limit == "requests" else 100)
    holders = [held(connect(api), 0 if limit == "requests" else 40_000) for _ in range(3)]

    def refused() -> httpx.Response | None:
        response = api.post("/api/jobs", json=NOOP)
        return response if response.status_code == 503 else None

    response: Any = until(refused, "it is full")
    problem(response, 503, "busy")
    assert int(response.headers["retry-after"]) > 0
    assert api.get("/health/ready").status_code == 200
    for holder in holders:
        holder.close()
    until(lambda: api.post("/api/jobs", json=NOOP).status_code == 202, "there is room again")


def test_half_sent_logins_take_no_place_from_a_caller_with_a_key(
    serve: Serve, connect: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "key-of-anna-1234"
    api = serve(max_requests=1, app_env="production", api_keys=[("anna", key)])
    begun = [connect(api) for _ in range(middleware.MOST_LOGINS)]
    for connection in begun:
        connection.sendall(LOGIN_HEAD + b"Content-Length: 100\r\n\r\nk")
    until(lambda: api.post("/login", data={"key": key}).status_code == 503, "no more logins are taken")
    assert api.get("/api/kinds", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    monkeypatch.setattr(login, "FORM_SECONDS", 0.1)
    for connection in begun[1:]:
        connection.close()
    until(lambda: api.post("/login", data={"key": key}).status_code == 303, "there is room again")
    slow = connect(api)
    slow.sendall(LOGIN_HEAD + b"Content-Length: 100\r\n\r\nk")
    assert b" 408 " in answer(slow)


def test_only_a_callers_download_may_pause(
    serve: Serve, connect: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "UNREAD_SECONDS", 0.5)
    key, data = {"Authorization": "Bearer key-of-anna-1234"}, b"a" * 20_000_000
    api = serve(app_env="production", api_keys=[("anna", "key-of-anna-1234")])
    file = api.post("/api/files", files={"file": ("a", data)}, headers=key).json()
    with api.stream("GET", f"/api/files/{file['id']}/content", headers=key) as download:
        pieces = download.iter_raw(1000)
        assert next(pieces)
        # Began later, and is given up.
        stranger = connect(api)
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stranger.sendall(b"".join(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" for _ in range(200)))
        until(lambda: not takes(stranger), "who reads nothing is given up")
        assert sum(map(len, pieces)) == len(data) - 1000


def test_idle_connections_outlive_those_of_proxies(monkeypatch: pytest.MonkeyPatch, environment: object) -> None:
    """Who closes first may do so while a request is on its way; nginx and load balancers do after 60 s."""
    kept = []
    monkeypatch.setattr(api_main.Server, "run", lambda server: kept.append(server.config.timeout_keep_alive))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    api_main.serve(FastAPI)
    assert kept[0] > 60
