"""`rediss://`: certificates are verified, and who says otherwise is warned."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.integration.conftest import Jobs
from tests.integration.scripts.conftest import Ran
from tests.servers import Redis

Script = Callable[..., Ran]
CERTIFICATE = Path(__file__).with_name("localhost.pem")


@pytest.fixture
def tls(redis: Redis) -> Iterator[int]:
    """A port where TLS ends, with Redis behind it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    behind = urlsplit(redis.url).port
    listener = socket.create_server(("127.0.0.1", 0))

    def copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve(raw: socket.socket) -> None:
        # A client that does not like the certificate goes away.
        with (
            suppress(OSError),
            raw,
            context.wrap_socket(raw, server_side=True) as near,
            socket.create_connection(("127.0.0.1", behind or 0)) as far,
        ):
            there = threading.Thread(target=copy, args=(near, far), daemon=True)
            there.start()
            copy(far, near)
            there.join()

    def accept() -> None:
        with suppress(OSError):  # closed
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def certificates(ran: Ran) -> dict[str, str]:
    return {one["level"]: one["message"] for one in ran.json["findings"] if one["check"] == "certificates"}


def test_scripts_speak_tls(script: Script, jobs: Jobs, tls: int) -> None:
    job_id = jobs.start()
    url = f"rediss://:secret@localhost:{tls}/0"
    ran = script("task_manager", "status", job_id, REDIS_URL=f"{url}?ssl_ca_certs={CERTIFICATE}")
    assert (ran.json["state"], ran.code) == ("waits in its queue", 1)
    assert "left" in certificates(script("doctor", REDIS_URL=f"{url}?ssl_ca_certs={CERTIFICATE}"))["ok"]
    # Not the authority that signed it.
    ran = script("task_manager", "status", job_id, REDIS_URL=url)
    assert ran.code == 2
    assert "certificate verify failed" in ran.json["error"]
    assert "certificate verify failed" in certificates(script("doctor", REDIS_URL=url))["problem"]
    ran = script("task_manager", "status", job_id, REDIS_URL=f"{url}?ssl_cert_reqs=CERT_NONE")
    assert ran.json["state"] == "waits in its queue"
    assert "CERT_NONE" in certificates(script("doctor", REDIS_URL=f"{url}?ssl_cert_reqs=CERT_NONE"))["warning"]
