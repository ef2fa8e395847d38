"""Answers leave in one piece where that is possible, and at once where somebody waits for the next one."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from app.api.server import SMALL_BYTES, HttpProtocol
from tests.servers import free_port
from tests.waiting import until


@contextmanager
def serving(answer: Callable[[Request], Any], http: type[HttpProtocol] = HttpProtocol) -> Iterator[httpx.Client]:
    port = free_port()
    app = Starlette(routes=[Route("/{number}", answer)])
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, http=http))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started, "it is up")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
        yield client
    server.should_exit = True
    thread.join(15)


def test_a_small_answer_is_one_write() -> None:
    written: list[bytes] = []

    class Noting(HttpProtocol):
        def connection_made(self, transport: Any) -> None:
            class Transport:
                def write(self, data: bytes) -> None:
                    written.append(data)
                    transport.write(data)

                def __getattr__(self, name: str) -> Any:
                    return getattr(transport, name)

            super().connection_made(Transport())  # type: ignore[arg-type]

    async def answer(request: Request) -> Response:
        return Response(request.path_params["number"])

    with serving(answer, Noting) as client:
        for number in range(3):
            assert client.get(f"/{number}").text == str(number)
            assert len(written) == number + 1


def test_parts_do_not_wait_for_the_rest() -> None:
    seen = threading.Event()

    async def answer(request: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            yield b"first"
            await asyncio.to_thread(seen.wait, 10)
            yield b"second"

        return StreamingResponse(parts())

    with serving(answer) as client, client.stream("GET", "/1") as response:
        parts = response.iter_bytes()
        assert next(parts) == b"first"
        seen.set()
        assert b"".join(parts) == b"second"


def test_large_and_small_parts_keep_their_order() -> None:
    wanted = [bytes([number]) * (SMALL_BYTES * 3 if number % 3 else 7) for number in range(200)]

    async def answer(request: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            for part in wanted:
                yield part

        return StreamingResponse(parts(), headers={"Connection": "close"})

    with serving(answer) as client:
        assert client.get("/1").content == b"".join(wanted)
