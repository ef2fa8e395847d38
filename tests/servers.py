"""A PostgreSQL and a Redis for one test process: in containers where an engine answers, embedded ones elsewhere.

Both can be frozen and stopped, which is what the tests are about.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import redis

from scripts.stack import servers
from tests.waiting import until

# The containers end with the tests' own `with`; the helper that would do it otherwise is one more image to pull.
os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def engine_answers() -> bool:
    """JOBSTACK_TESTS=embedded says no without asking."""
    if os.environ.get("JOBSTACK_TESTS") == "embedded" or not shutil.which("docker"):
        return False
    return subprocess.run(["docker", "info"], capture_output=True, timeout=10).returncode == 0


class Redis:
    """A Redis server with its own port and no persistence."""

    def __init__(self, url: str, *, freeze: Callable[[], Any], thaw: Callable[[], Any], stop: Any, start: Any) -> None:
        self.url = url
        self.client: redis.Redis = redis.Redis.from_url(url, socket_timeout=5)
        self.freeze, self.thaw = freeze, thaw
        self._stop, self._start = stop, start

    def stop(self) -> None:
        self._stop()
        self.client.close()

    def start(self) -> None:
        self._start()
        self.wait()

    def wait(self) -> None:
        def answers() -> bool:
            try:
                return bool(self.client.ping())
            except redis.RedisError:
                return False

        until(answers, "Redis answers", seconds=20)


@contextmanager
def redis_server() -> Iterator[Redis]:
    port = free_port()
    url = f"redis://:secret@127.0.0.1:{port}/0"
    options = ["--requirepass", "secret", "--save", "", "--appendonly", "no"]
    with ExitStack() as stack:
        if engine_answers():
            from testcontainers.core.container import DockerContainer

            # Not the ready-made class: its port changes with every restart.
            container = DockerContainer("redis:8").with_bind_ports(6379, port)
            container.with_command(["redis-server", *options])
            stack.enter_context(container)
            wrapped: Any = container.get_wrapped_container()
            server = Redis(
                url,
                freeze=wrapped.pause,
                thaw=wrapped.unpause,
                stop=lambda: wrapped.kill(),
                start=wrapped.start,
            )
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="jobstack-redis-"))
            command = [str(servers.redis_server()), "--port", str(port), "--bind", "127.0.0.1", "--dir", folder]
            running: list[subprocess.Popen[bytes]] = []

            def start() -> None:
                running.append(subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL))

            def stop() -> None:
                process = running.pop()
                process.kill()
                process.wait()

            start()
            stack.callback(lambda: [stop() for _ in list(running)])
            server = Redis(
                url,
                freeze=lambda: running[-1].send_signal(signal.SIGSTOP),
                thaw=lambda: running[-1].send_signal(signal.SIGCONT),
                stop=stop,
                start=start,
            )
        server.wait()
        yield server


@contextmanager
def postgres_server() -> Iterator[str]:
    """Yields the URL of an empty database."""
    if not engine_answers():
        with servers.temporary_postgres() as url:
            yield url
        return
    from testcontainers.core.container import DockerContainer

    port = free_port()
    container = (
        DockerContainer("postgres:18")
        .with_env("POSTGRES_PASSWORD", "secret")
        .with_bind_ports(5432, port)
        .with_command("postgres -c fsync=off")
    )
    url = f"postgresql://postgres:secret@127.0.0.1:{port}/postgres"

    def answers() -> bool:
        try:
            psycopg.connect(url, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    with container:
        # Its entry point starts it once without a network first, so logs and pg_isready tell too early.
        until(answers, "PostgreSQL answers", seconds=60)
        yield url


def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="jobstack-tests-"))
