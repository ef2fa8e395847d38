"""The schema is made by Alembic, once, however many begin at the same time."""

import os
import subprocess
import sys
from typing import Any

import psycopg

from tests.processes import ROOT
from tests.servers import Postgres


def begin(url: str, *command: str) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = {**os.environ, "DATABASE_URL": url}
    return subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, env=environment, text=True, **pipes)


def run(url: str, *command: str) -> str:
    process = begin(url, *command)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    return said


def test_up_and_down(postgres: Postgres, environment: object) -> None:
    url = postgres.another_database("migrations")
    together = [begin(url, "app.migrate") for _ in range(3)]
    said = [process.communicate(timeout=60)[0] for process in together]
    assert [process.returncode for process in together] == [0, 0, 0], said
    assert "agree" in run(url, "app.migrate", "--check")
    assert "secret" not in "".join(said)

    with psycopg.connect(url, autocommit=True) as db:
        db.execute("ALTER TABLE jobs ADD COLUMN surprise text")
    process = begin(url, "app.migrate", "--check")
    assert "surprise" in process.communicate(timeout=60)[0]
    assert process.returncode == 1

    run(url, "alembic", "downgrade", "base")
    with psycopg.connect(url, autocommit=True) as db:
        left = db.execute(
            """SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace
            UNION SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace"""
        ).fetchall()
    assert {name for (name,) in left} <= {"alembic_version", "alembic_version_pkc"}
    run(url, "app.migrate")


def test_older_code_leaves_a_newer_schema_alone(postgres: Postgres, environment: object) -> None:
    url = postgres.another_database("newer")
    run(url, "app.migrate")
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("UPDATE alembic_version SET version_num = '9999'")
    assert "is at 9999, which is newer than this code's" in run(url, "app.migrate")
