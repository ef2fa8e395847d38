"""A load generator for one address: as little Python per request as possible, since it shares the machine's cores."""

import asyncio
import json
import sys
import time
from urllib.parse import urlsplit


async def _connection(host: str, port: int, request: bytes, end: float, times: list[float]) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    while time.perf_counter() < end:
        began = time.perf_counter()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 202"):
            raise RuntimeError(head.decode())
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        times.append(time.perf_counter() - began)
    writer.close()


async def main(url: str, body: str, connections: int, seconds: float) -> None:
    """Prints {"per_second", "p50", "p99"}; times in milliseconds."""
    parts = urlsplit(url)
    head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
    times: list[float] = []
    began = time.perf_counter()
    end = began + seconds
    port = parts.port or 80
    await asyncio.gather(*(_connection(str(parts.hostname), port, request, end, times) for _ in range(connections)))
    elapsed, times = time.perf_counter() - began, sorted(times)
    rank = [times[int(len(times) * share)] * 1000 for share in (0.5, 0.99)]
    print(json.dumps({"per_second": len(times) / elapsed, "p50": rank[0], "p99": rank[1]}))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
