"""The schema is made by Alembic, once, however many begin at the same time, and nobody who is at work notices."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from app import migrate
from app.database import SCHEMA_REVISION
from tests import processes
from tests.processes import ROOT, Process
from tests.servers import Postgres, Redis
from tests.waiting import until

WAITING = ("worker", "worker-maintenance", "beat")


def begin(url: str, *command: str) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = {**os.environ, "DATABASE_URL": url}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, text=True, **pipes)


def run(url: str, *command: str) -> str:
    process = begin(url, "-m", *command)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    return said


def test_up_and_down(postgres: Postgres, environment: object) -> None:
    url = postgres.another_database("migrations")
    together = [begin(url, "-m", "app.migrate") for _ in range(3)]
    said = [process.communicate(timeout=60)[0] for process in together]
    assert [process.returncode for process in together] == [0, 0, 0], said
    assert "".join(said).count(f"{SCHEMA_REVISION} ") == 1, said
    assert "agree" in run(url, "app.migrate", "--check")
    assert "secret" not in "".join(said)

    with psycopg.connect(url, autocommit=True) as db:
        db.execute("ALTER TABLE jobs ADD COLUMN surprise text")
    process = begin(url, "-m", "app.migrate", "--check")
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


def test_migrations_are_one_chain_without_gaps() -> None:
    """Code and databases compare numbers: one that came in beside or before others would never be applied."""
    newest_first = [script.revision for script in ScriptDirectory.from_config(Config(migrate.INI)).walk_revisions()]
    assert newest_first == [f"{number:04}" for number in range(int(SCHEMA_REVISION), 0, -1)]


def test_where_nothing_is_missing_nothing_is_loaded(environment: object) -> None:
    code = "import sys, app.migrate as m; m.main(); print({'alembic', 'sqlalchemy'} & {*sys.modules})"
    assert "set()" in begin(os.environ["DATABASE_URL"], "-c", code).communicate(timeout=60)[0]


def test_what_cannot_be_done_is_said_in_a_line(postgres: Postgres, environment: object) -> None:
    url = postgres.another_database("unknown")
    run(url, "app.migrate")
    for revision, said in {"0001b": "0001b", "0003": 'relation "job_stats" already exists'}.items():
        with psycopg.connect(url, autocommit=True) as db:
            db.execute("UPDATE alembic_version SET version_num = %s", [revision])
        process = begin(url, "-m", "app.migrate")
        [line] = process.communicate(timeout=60)[0].splitlines()
        assert (process.returncode, said in line) == (1, True), line


def test_a_table_in_use_stops_neither_the_migration_nor_the_users(postgres: Postgres, environment: object) -> None:
    url = postgres.another_database("busy")
    run(url, "alembic", "upgrade", "0002")
    with psycopg.connect(url) as reader, psycopg.connect(url, autocommit=True) as user:
        reader.execute("SELECT count(*) FROM jobs")  # and its transaction stays open
        user.execute("SET statement_timeout = '4s'")  # as the API has it; a query waits behind whoever waits for a lock
        tried = 0
        with begin(url, "-m", "app.migrate") as migration:
            for line in migration.stdout or ():
                tried += line.startswith("A table is in use")
                user.execute("SELECT count(*) FROM jobs")
                if tried == 2:
                    reader.commit()
        assert migration.returncode == 0
    assert tried >= 2
    assert "agree" in run(url, "app.migrate", "--check")


def test_an_index_whose_building_broke_off_is_built_again(postgres: Postgres, environment: object) -> None:
    url = postgres.another_database("broken")
    run(url, "alembic", "upgrade", "0002")
    with psycopg.connect(url, autocommit=True) as db:
        # As if the first try had been killed: its first statements are there, and half an index.
        db.execute("ALTER TABLE jobs ADD COLUMN short boolean NOT NULL DEFAULT false")
        db.execute("CREATE INDEX jobs_short_due ON jobs (queue)")
        db.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'jobs_short_due'::regclass")
        run(url, "app.migrate")
        [(invalid,)] = db.execute("SELECT count(*) FROM pg_index WHERE NOT indisvalid").fetchall()
    assert invalid == 0
    assert "agree" in run(url, "app.migrate", "--check")


def test_an_index_waits_for_others_and_nobody_for_it(postgres: Postgres, environment: object) -> None:
    url = postgres.another_database("writing")
    run(url, "alembic", "upgrade", "0002")
    # Longer than lock_timeout, which must not strike here.
    waiting = "SELECT FROM pg_locks WHERE locktype = 'virtualxid' AND waitstart < now() - interval '2.5 s'"
    with (
        psycopg.connect(url) as reader,
        psycopg.connect(url, autocommit=True) as user,
        begin(url, "-m", "app.migrate") as migration,
    ):
        reader.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        reader.execute("SELECT count(*) FROM files")
        until(lambda: user.execute(waiting).fetchall(), "the index waits for the end of the reader's transaction")
        user.execute("SET lock_timeout = '100ms'")
        user.execute("UPDATE jobs SET progress = NULL")
        second = begin(url, "-m", "app.migrate")
        assert "Another migration is at work" in (second.stdout.readline() if second.stdout else "")
        reader.commit()
        said = migration.communicate(timeout=60)[0]
        second.communicate(timeout=60)
    assert migration.returncode == 0
    assert "A table is in use" not in said


def test_who_waits_for_another_migration_holds_up_no_index(postgres: Postgres, environment: object) -> None:
    url = postgres.another_database("queueing")
    run(url, "alembic", "upgrade", "0002")
    looks = "SELECT query_start FROM pg_stat_activity WHERE datname = 'queueing' AND application_name ~ 'migrate'"
    seen = set[Any]()
    with (
        psycopg.connect(url) as other,
        psycopg.connect(url, autocommit=True) as user,
        begin(url, "-m", "app.migrate") as migration,
    ):

        def tried_again() -> bool:
            seen.update(user.execute(looks).fetchall())
            return len(seen) > 20

        try:
            other.execute("SELECT pg_advisory_xact_lock(7261544021)")
            # psycopg prepares what is asked for the sixth time.
            until(tried_again, "it tries for the lock again and again")
            user.execute("SET statement_timeout = '10s'")
            user.execute("CREATE INDEX CONCURRENTLY files_name ON files (name)")
            other.commit()
            # After all these tries it builds its own indexes, too.
            assert "0003" in migration.communicate(timeout=60)[0]
        finally:
            migration.kill()
    assert migration.returncode == 0


@pytest.fixture
def begun(tmp_path: Path, redis: Redis) -> Any:
    with ExitStack() as stack:
        yield lambda name, **env: stack.enter_context(processes.started(name, tmp_path, **env))


Start = Callable[..., Process]


@pytest.mark.parametrize("name", WAITING)
def test_a_process_that_waits_for_its_migration_ends_when_told_to(postgres: Postgres, begun: Start, name: str) -> None:
    process = begun(name, DATABASE_URL=postgres.another_database(f"ends_{uuid4().hex}"))
    until(lambda: "waiting_for_schema" in process.log, "it says that it waits")
    process.terminate()
    assert process.wait(10) == 0


def test_each_reason_to_wait_is_said_and_only_a_migration_counts_as_health(
    postgres: Postgres, redis: Redis, tmp_path: Path
) -> None:
    name = f"absent_{uuid4().hex}"
    server = postgres.url.partition("@")[2].partition("/")[0]
    url = f"postgresql://{name}:secret@{server}/{name}"
    process = Process([sys.executable, "-m", "beat"], tmp_path, DATABASE_URL=url)

    def said(times: int) -> None:
        until(lambda: process.log.count("waiting_for_schema") == times, f"it says {times} reasons")

    try:
        said(1)  # there is no such user
        with psycopg.connect(postgres.url, autocommit=True) as db:
            db.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'secret'")
        said(2)  # and no such database
        assert not list(tmp_path.glob("*.alive"))
        postgres.another_database(name)
        said(3)
        assert "run python -m app.migrate" in process.log
        until(lambda: list(tmp_path.glob("*.alive")), "a sign of life")
    finally:
        process.kill()


def test_processes_wait_for_their_migration_and_go_on(postgres: Postgres, begun: Start) -> None:
    url = postgres.another_database("later")
    waiting = {name: begun(name, DATABASE_URL=url) for name in WAITING}
    for name, process in waiting.items():
        until(lambda process=process: "waiting_for_schema" in process.log, f"{name} says that it waits")  # type: ignore[misc]
        module = "beat.health" if name == "beat" else "worker.health"
        queues = {"WORKER_QUEUES": "maintenance"} if name == "worker-maintenance" else {}
        environment = {**os.environ, **queues, "JOBSTACK_RUN_DIR": str(process.folder)}
        subprocess.run([sys.executable, "-m", module], cwd=ROOT, env=environment, check=True)
    run(url, "app.migrate")
    with psycopg.connect(url, autocommit=True) as db:
        db.execute(
            """INSERT INTO jobs (id, kind, priority, queue, payload, max_attempts)
            VALUES (gen_random_uuid(), 'sleep', 'default', 'default', '{"seconds": 0}', 4)"""
        )
        done = "SELECT FROM jobs WHERE status = 'succeeded'"
        until(lambda: db.execute(done).fetchall(), "beat, maintenance and worker do their part", seconds=60)
    assert [process.log.count("waiting_for_schema") for process in waiting.values()] == [1, 1, 1]
