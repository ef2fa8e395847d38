"""Each service is right from its image's CMD and the variables of .railway/railway.py alone; here without the image."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import servers
from tests.integration.test_s3 import send
from tests.processes import ROOT
from tests.railway import config
from tests.servers import S3, Postgres, Redis, free_port
from tests.waiting import until

RAILWAYS_OWN = {
    "RAILWAY_PRIVATE_DOMAIN": "it.railway.internal",
    "RAILWAY_PROJECT_NAME": "jobstack",
    "RAILWAY_ENVIRONMENT_NAME": "production",
    "RAILWAY_SERVICE_NAME": "it",
    "RAILWAY_REPLICA_ID": "c6a5ce1f",
}


class Service:
    """A process of a service, as its container would start it."""

    def __init__(self, variables: dict[str, str], folder: Path, command: list[str] | None = None) -> None:
        dockerfile = (ROOT / variables["RAILWAY_DOCKERFILE_PATH"]).read_text()
        image = dict(re.findall(r"(?:^ENV|^   ) (\w+)=(\S+?)(?: \\)?$", dockerfile, re.MULTILINE))
        [cmd] = re.findall(r"^CMD (.+)$", dockerfile, re.MULTILINE)
        self.port = free_port()
        # The port alone differs from what Railway's container has: others may have it here.
        given = {"PORT": str(self.port)} if "PORT" in variables else {}
        home = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        # Files in /tmp are a container's own.
        # Said where tests run as root, which containers don't.
        home["PYTHONWARNINGS"] = "ignore:You're running the worker with superuser"
        home["TMPDIR"] = tempfile.mkdtemp(dir=folder)
        self.out, self.err = (Path(home["TMPDIR"]) / name for name in ("out", "err"))
        with self.out.open("wb") as out, self.err.open("wb") as err:
            environment = image | RAILWAYS_OWN | variables | given | home
            self.process = subprocess.Popen(
                command or json.loads(cmd), cwd=ROOT, env=environment, stdout=out, stderr=err
            )

    def ask(self, path: str, address: str = "127.0.0.1", **options: Any) -> int:
        try:
            return httpx.get(f"http://{address}:{self.port}{path}", timeout=5, **options).status_code
        except httpx.TransportError:
            return 0

    def is_up(self, path: str, address: str) -> None:
        asked_as = {"Host": "healthcheck.railway.app"}
        until(lambda: self.ask(path, address, headers=asked_as) == 200, f"{path} says 200", seconds=60)

    def lines(self) -> list[dict[str, Any]]:
        written = self.out.read_text().splitlines()
        assert all(line.startswith("{") for line in written), [line for line in written if not line.startswith("{")]
        return [json.loads(line) for line in written]

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(75)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with servers.s3_server() as server:
        yield server


@pytest.fixture
def start(
    environment: Redis, postgres: Postgres, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, db: object
) -> Iterator[Callable[..., Service]]:
    """start("worker") -> the running service, all references resolved to the servers of the tests."""
    here = {
        "${{Postgres.DATABASE_URL}}": postgres.url,
        "${{Redis.REDIS_URL}}": environment.url,
        "${{files.BUCKET}}": "files",
        "${{files.ENDPOINT}}": s3.environment["AWS_ENDPOINT_URL"],
        "${{files.REGION}}": s3.environment["AWS_REGION"],
        "${{files.ACCESS_KEY_ID}}": s3.environment["AWS_ACCESS_KEY_ID"],
        "${{files.SECRET_ACCESS_KEY}}": s3.environment["AWS_SECRET_ACCESS_KEY"],
    }
    environment.client.flushall()
    graph = config.evaluate(monkeypatch)
    monkeypatch.setattr(config, "VALUES", here)
    with ExitStack() as stack:

        def begin(name: str, command: list[str] | None = None, **changed: str) -> Service:
            variables = config.environment(graph[name])
            # There is no files.127.0.0.1: tests/unit/test_file_store.py has that part.
            style = {"AWS_VIRTUAL_HOSTED_STYLE_REQUEST"} & variables.keys()
            service = Service(variables | dict.fromkeys(style, "false") | changed, tmp_path, command)
            stack.callback(service.process.wait)
            stack.callback(service.process.kill)
            return service

        yield begin


def test_a_job_end_to_end_across_all_services(start: Callable[..., Service], postgres: Postgres) -> None:
    new = postgres.another_database("railway")
    # A release deploys all at once, and only the API waits for the migration.
    services = {name: start(name, DATABASE_URL=new) for name in config.OURS if name != "api"}
    until(lambda: "waiting_for_schema" in services["beat"].out.read_text(), "beat misses its tables", seconds=60)
    migration = start("api", ["python", "-m", "app.migrate"], DATABASE_URL=new)
    assert migration.process.wait(60) == 0, migration.err.read_text()
    api, flower = start("api", DATABASE_URL=new), services["flower"]
    services["api"] = api
    for address in ("127.0.0.1", "[::1]"):
        api.is_up("/health/ready", address)
        flower.is_up("/healthcheck", address)
    assert flower.ask("/api/workers") == 401
    assert flower.ask("/api/workers", auth=("admin", config.SECRET)) == 200
    assert api.ask("/api/jobs") == 401

    with httpx.Client(
        base_url=f"http://127.0.0.1:{api.port}", headers={"Authorization": f"Bearer {config.SECRET}"}, timeout=10
    ) as client:
        file = send(client, b"one two three", "a.txt", "text/plain")
        # In a moment: dispatch has to bring it, for which it takes beat and the house-keeping's worker.
        soon = (datetime.now(UTC) + timedelta(seconds=3)).isoformat()
        job = {"kind": "text_report", "payload": {"file_id": file["id"]}, "run_at": soon}
        job = client.post("/api/jobs", json=job).json()

        def over() -> Any:
            now = client.get(f"/api/jobs/{job['id']}").json()
            return now if now["finished_at"] else None

        assert until(over, "the job is over", seconds=60)["result"]["words"] == 3

    codes = {name: service.end() for name, service in services.items()}
    assert codes == dict.fromkeys(config.OURS, 0), services["worker"].err.read_text()[-3000:]
    for name, service in services.items():
        # stderr is red on Railway, and a line that is not JSON has no level.
        assert service.err.read_text() == "", name
        for line in service.lines():
            assert {"level", "message"} <= line.keys(), line
            assert line["level"] in ("debug", "info", "warning"), line


def test_a_migration_waits_for_a_name_that_is_not_there_yet(start: Callable[..., Service]) -> None:
    migration = start(
        "api", ["python", "-m", "app.migrate"], DATABASE_URL="postgresql://u:p@postgres.railway.invalid:5432/railway"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        migration.process.wait(6)
