"""A load generator for one address: as little Python per request as possible, since it shares the machine's cores."""

import asyncio
import json
import resource
import sys
import time
from urllib.parse import urlsplit

import uvloop


class _Connection(asyncio.Protocol):
    """Sends the request, waits for its answer, and sends it again, until `end`."""

    def __init__(self, request: bytes, end: float, times: list[float]) -> None:
        self._request, self._end, self._times = request, end, times
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._head = b""
        self._missing: int | None = None  # bytes of the answer that are still to come

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._send()

    def _send(self) -> None:
        self._began = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if self._missing is None:
            self._head += data
            head, found, content = self._head.partition(b"\r\n\r\n")
            if not found:
                return
            if not head.startswith(b"HTTP/1.1 202"):
                self.over.set_exception(RuntimeError(self._head.decode()))
                self._transport.close()
                return
            self._missing = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            data = content
        self._missing -= len(data)
        if not self._missing:
            self._answered()

    def _answered(self) -> None:
        self._head, self._missing = b"", None
        now = time.perf_counter()
        self._times.append(now - self._began)
        if now < self._end:
            self._send()
        else:
            self._transport.close()
            self.over.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():
            self.over.set_exception(exc or RuntimeError("the server closed the connection"))


async def main(url: str, body: bytes, connections: int, seconds: float) -> None:
    """Prints what came of it: times in milliseconds; `generator` is the share of a core that this process took. Where
    that is near 1, it is the generator that was measured."""
    parts = urlsplit(url)
    head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    times: list[float] = []
    host, port = str(parts.hostname), parts.port or 80
    loop, began = asyncio.get_running_loop(), time.perf_counter()

    def connection() -> _Connection:
        return _Connection(request, began + seconds, times)

    made = [await loop.create_connection(connection, host, port) for _ in range(connections)]
    await asyncio.gather(*(protocol.over for _, protocol in made))
    elapsed, usage = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    times.sort()
    print(
        json.dumps(
            {
                "requests/s": len(times) / elapsed,
                **{f"p{share * 100:g} ms": times[int(len(times) * share)] * 1000 for share in (0.5, 0.99, 0.999)},
                "generator": (usage.ru_utime + usage.ru_stime) / elapsed,
                "answers": len(times),
            }
        )
    )


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.stdin.buffer.read(), int(sys.argv[2]), float(sys.argv[3])))
