"""A deploy ends the API: what is in progress is answered, nothing new is taken, and it exits as one who is done."""

import socket
import sys
from pathlib import Path

import httpx
import psycopg
from psycopg.rows import DictRow

from tests.processes import Process
from tests.servers import Redis, free_port
from tests.waiting import until

HEAD = "--x\r\nContent-Disposition: form-data; name=file; filename=a.txt\r\n\r\n"
TAIL = "\r\n--x--\r\n"


def test_a_request_in_progress_is_answered(tmp_path: Path, redis: Redis, db: psycopg.Connection[DictRow]) -> None:
    port = free_port()
    process = Process([sys.executable, "-m", "app.api"], tmp_path, PORT=port)

    def connects() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except OSError:
            return False
        return True

    def is_ready() -> bool:
        return connects() and httpx.get(f"http://127.0.0.1:{port}/health/ready", timeout=10).status_code == 200

    try:
        until(is_ready, "the API is up")
        with socket.create_connection(("127.0.0.1", port), timeout=10) as request:
            body = HEAD + "half" + TAIL
            head = f"POST /api/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            head += "Content-Type: multipart/form-data; boundary=x\r\nConnection: keep-alive\r\n\r\n"
            request.sendall((head + HEAD + "ha").encode())
            # It is being read: the API has nothing else to do.
            httpx.get(f"http://127.0.0.1:{port}/health/live", timeout=10)
            process.terminate()
            until(lambda: not connects(), "no new connection is taken")
            request.sendall(("lf" + TAIL).encode())
            assert request.recv(1000).startswith(b"HTTP/1.1 201")
        assert process.wait(10) == 0, process.log
    finally:
        process.kill()
    [row] = db.execute("SELECT size FROM files").fetchall()
    assert row["size"] == 4
