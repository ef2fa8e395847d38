"""A deploy: the code of before the newest migration goes on working, on the schema of behind it."""

import os
import subprocess
import sys
import tarfile
import threading
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

import httpx
import psycopg
import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from app import migrate
from app.database import SCHEMA_REVISION
from tests.processes import ROOT, Process
from tests.servers import Postgres, Redis, free_port
from tests.waiting import until

EVERY_SECONDS = 0.05
MANY = 40
JOBS = (
    {"kind": "sleep", "payload": {"seconds": 0}},
    {"kind": "text_report", "payload": {"text": "old and new"}},
    {"kind": "flaky", "payload": {"failures": 0, "error": "transient"}},
)


def git(*arguments: str) -> bytes:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=False, capture_output=True)
    if done.returncode:
        pytest.skip(f"the history does not reach back to the newest migration: git {' '.join(arguments)}")
    return done.stdout


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The repository as it was before its newest migration; as it is committed, while that is being written."""
    newest = ScriptDirectory.from_config(Config(migrate.INI)).get_revision(SCHEMA_REVISION)
    added = git("log", "--diff-filter=A", "--format=%H", "-1", "--", newest.path).decode().strip()
    archive = git("archive", f"{added}^" if added else "HEAD")
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(tmp_path / "old", filter="data")
    return tmp_path / "old"


def test_old_code_works_on_the_new_schema(old: Path, tmp_path: Path, postgres: Postgres, redis: Redis) -> None:
    url, port = postgres.another_database("old_code"), free_port()
    migration = [sys.executable, "-m", "app.migrate"]
    begun: list[Path] = []
    with (
        ExitStack() as stack,
        psycopg.connect(url, autocommit=True) as db,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as api,
    ):

        def begin(module: str, **env: object) -> Process:
            begun.append(tmp_path / str(len(begun)))
            begun[-1].mkdir()
            command = [sys.executable, "-m", module]
            # A storage of its own: the first clean-up marks it as that of this database.
            own = {"DATABASE_URL": url, "STORAGE_URL": f"file://{tmp_path}/files", "PORT": port}
            process = Process(command, begun[-1], cwd=old, PYTHONPATH=old, **own, **env)
            stack.callback(process.kill)
            return process

        assert begin("app.migrate").wait(60) == 0
        running = [
            begin("app.api"),
            begin("worker"),
            begin("worker", WORKER_QUEUES="maintenance"),
            begin("beat"),
        ]

        def is_ready() -> bool:
            try:
                return bool(api.get("/health/ready").json()["status"] == "ok")
            except httpx.TransportError:
                return False

        until(is_ready, "the old API is there", seconds=60)
        accepted: list[str] = []
        refused: list[str] = []
        enough = threading.Event()

        def post() -> None:
            while not enough.wait(EVERY_SECONDS):
                answer = api.post("/api/jobs", json=JOBS[len(accepted) % len(JOBS)])
                (accepted if answer.status_code == 202 else refused).append(answer.json().get("id") or answer.text)

        def done() -> int:
            [row] = db.execute("SELECT count(*) FROM jobs WHERE status = 'succeeded' AND attempt = 1").fetchall()
            return int(row[0])

        load = threading.Thread(target=post)
        load.start()
        try:
            until(lambda: done() > MANY, "jobs are done on the old schema", seconds=60)
            subprocess.run(migration, cwd=ROOT, env={**os.environ, "DATABASE_URL": url}, check=True)
            before = done() + len(accepted)
            until(lambda: done() > before + MANY, "jobs are done on the new schema", seconds=60)
        finally:
            enough.set()
            load.join()
        until(lambda: done() >= len(accepted), "all jobs are done, at their first attempt", seconds=60)
        assert not refused
        assert done() == len(accepted)
        assert [process.process.poll() for process in running] == [None] * 4
        errors = [line for process in running for line in process.log.splitlines() if '"level": "error"' in line]
        assert not errors
