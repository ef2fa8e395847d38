"""A PostgreSQL and a Redis for one test process: in containers where an engine answers, embedded ones elsewhere.

Both can be frozen and stopped, which is what the tests are about.
"""

import json
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import obstore
import obstore.exceptions
import psutil
import psycopg
import redis
from obstore.store import S3Store

from scripts.stack import servers
from tests.proxy import Proxy
from tests.waiting import until

# The containers end with the tests' own `with`; the helper that would do it otherwise is one more image to pull.
os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")


# Nothing is to survive a power cut here, and nobody else is to vacuum and count while a test looks.
POSTGRES_OPTIONS = ("-c", "fsync=off", "-c", "autovacuum=off")
_given = set[int]()


def free_port() -> int:
    """One that this process has not had before, below those that systems give away by themselves: nobody else comes
    upon it before it is bound, or while a test has its server stopped."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port


def engine_answers() -> bool:
    """JOBSTACK_TESTS=embedded says no without asking."""
    if os.environ.get("JOBSTACK_TESTS") == "embedded" or not shutil.which("docker"):
        return False
    return subprocess.run(["docker", "info"], check=False, capture_output=True, timeout=10).returncode == 0


class Redis:
    """A Redis server with its own port and no persistence."""

    def __init__(self, url: str, *, freeze: Callable[[], Any], thaw: Callable[[], Any], stop: Any, start: Any) -> None:
        self.url = url
        self.client: redis.Redis = redis.Redis.from_url(url, socket_timeout=5)
        self.freeze, self.thaw = freeze, thaw
        self._stop, self._start = stop, start

    def length(self, queue: str) -> int:
        length: int = self.client.llen(queue)  # type: ignore[assignment]
        return length

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
                stop=wrapped.kill,
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

            @stack.callback
            def end() -> None:
                if running:
                    stop()

            start()
            server = Redis(
                url,
                freeze=lambda: running[-1].send_signal(signal.SIGSTOP),
                thaw=lambda: running[-1].send_signal(signal.SIGCONT),
                stop=stop,
                start=start,
            )
        server.wait()
        yield server


class Postgres:
    """A PostgreSQL server that keeps its port and its data over a restart."""

    def __init__(self, url: str, *, freeze: Callable[[], Any], thaw: Callable[[], Any], stop: Any, start: Any) -> None:
        self.url = url
        self.freeze, self.thaw, self.stop = freeze, thaw, stop
        self._start = start

    def start(self) -> None:
        self._start()
        self.wait()

    def restart(self) -> None:
        self.stop()
        self.start()

    def wait(self) -> None:
        def answers() -> bool:
            try:
                psycopg.connect(self.url, connect_timeout=2).close()
            except psycopg.OperationalError:
                return False
            return True

        until(answers, "PostgreSQL answers", seconds=60)

    def another_database(self, name: str) -> str:
        """The URL of a new, empty database on the same server."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url.rpartition("/")[0] + f"/{name}"


@contextmanager
def postgres_server() -> Iterator[Postgres]:
    port = free_port()
    with ExitStack() as stack:
        if engine_answers():
            from testcontainers.core.container import DockerContainer

            container = DockerContainer("postgres:18").with_env("POSTGRES_PASSWORD", "secret")
            container.with_bind_ports(5432, port).with_command(f"postgres {' '.join(POSTGRES_OPTIONS)}")
            stack.enter_context(container)
            wrapped: Any = container.get_wrapped_container()
            url = f"postgresql://postgres:secret@127.0.0.1:{port}/postgres"
            server = Postgres(url, freeze=wrapped.pause, thaw=wrapped.unpause, stop=wrapped.stop, start=wrapped.start)
        else:
            server = stack.enter_context(_embedded_postgres(port))
        # The image's entry point starts it once without a network first, so logs and pg_isready tell too early.
        server.wait()
        yield server


@contextmanager
def _embedded_postgres(port: int) -> Iterator[Postgres]:
    with tempfile.TemporaryDirectory(prefix="jobstack-") as name:
        data = Path(name) / "postgres"
        user = servers.prepare_postgres(data, "secret")
        # The other user's groups as well: with root's, folders would count as root's group's.
        whose: Any = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}
        command = [*servers.postgres_command(data, port), *POSTGRES_OPTIONS]
        running: list[subprocess.Popen[bytes]] = []

        def start() -> None:
            running.append(subprocess.Popen(command, **whose, cwd="/", stdout=log, stderr=log))

        def signal_all(number: int) -> None:
            """A process for each connection: freezing the first alone would stop nothing."""
            first = psutil.Process(running[-1].pid)
            first.send_signal(number)  # and it begins no others
            for process in first.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

        def stop() -> None:
            # "Fast": ends the connections, writes everything down.
            running[-1].send_signal(signal.SIGINT)
            running.pop().wait()

        with (Path(name) / "log").open("wb") as log:
            start()
            try:
                yield Postgres(
                    f"postgresql://jobstack:secret@127.0.0.1:{port}/postgres",
                    freeze=lambda: signal_all(signal.SIGSTOP),
                    thaw=lambda: signal_all(signal.SIGCONT),
                    stop=stop,
                    start=start,
                )
            finally:
                if running:
                    stop()


class S3:
    """An S3 server that checks signatures. One bucket: `files`.

    `refuse()` and `accept()` stand for stopping and starting it, which takes half a minute.
    """

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self._proxy = Proxy(port)
        self.environment = {
            "STORAGE_URL": "s3://files/jobstack",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._proxy.port}",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "jobstack",
            "AWS_SECRET_ACCESS_KEY": "secret",
        }
        key = {"accessKey": "jobstack", "secretKey": "secret"}
        config = folder / "s3.json"
        config.write_text(json.dumps({"identities": [{"name": "it", "credentials": [key], "actions": ["Admin"]}]}))
        # Each part of it listens, and for each other part once more.
        ports = {
            f"-{part}.port{kind}": str(free_port())
            for part in ("master", "volume", "filer", "s3")
            for kind in ("", ".grpc")
        }
        options = {**ports, "-dir": folder, "-ip": "127.0.0.1", "-ip.bind": "127.0.0.1", "-s3.port": port}
        options |= {"-s3.config": config, "-master.volumeSizeLimitMB": 64, "-master.telemetry": "false"}
        # Two catalogs that nobody asks, at ports of their own: a second server would not begin.
        options |= {"-s3.port.iceberg": 0, "-s3.port.lance": 0}
        weed = Path(sys.executable).parent / "weed"
        command = [str(weed), "server", "-filer", "-s3", *(f"{name}={value}" for name, value in options.items())]
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def close(self) -> None:
        self._proxy.close()
        self._process.kill()
        self._process.wait()

    def refuse(self) -> None:
        self._proxy.close()

    def accept(self) -> None:
        self._proxy = Proxy(self._proxy.target, self._proxy.port)

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def wait(self) -> None:
        def has_bucket() -> bool:
            # The first file makes its bucket.
            try:
                obstore.put(self._store(), "hello", b"")
                obstore.delete(self._store(), "hello")
            except obstore.exceptions.BaseError:
                return False
            return True

        until(has_bucket, "the S3 server has its bucket", seconds=60)

    def paths(self) -> set[str]:
        """Of all that is in the bucket."""
        return {found["path"] for page in obstore.list(self._store()) for found in page}

    def _store(self) -> S3Store:
        names = {"AWS_ENDPOINT_URL": "endpoint", "AWS_REGION": "region", "AWS_ACCESS_KEY_ID": "access_key_id"}
        names["AWS_SECRET_ACCESS_KEY"] = "secret_access_key"
        config: Any = {names[name]: value for name, value in self.environment.items() if name in names}
        return S3Store.from_url("s3://files", client_options={"allow_http": True}, **config)


@contextmanager
def s3_server() -> Iterator[S3]:
    with tempfile.TemporaryDirectory(prefix="jobstack-s3-") as name:
        server = S3(Path(name))
        try:
            server.wait()
            yield server
        finally:
            server.close()


def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="jobstack-tests-"))
