"""With a million rows, the queries that run all day read what they need and nothing else."""

import importlib
import json
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.rows import DictRow, dict_row

from app.jobs import statements
from app.queues import JOB_QUEUES
from app.settings import Settings, get_settings

ROWS = 1_000_000
# The table has 40,000 pages of eight kilobytes, its indexes as many.
FEW_PAGES = 400
# Counting walks the index entries of 100,000 waiting rows. Dispatch writes 75 rows, each with an entry in every index;
# what a message should stand for is looked up row by row: 3,000 of them, three windows; so is the oldest of these.
MORE_PAGES = {"counts": 6000, "due": 4000, "lost messages": 4000}

Connection = psycopg.Connection[DictRow]


@pytest.fixture(scope="module")
def million(environment: object) -> Iterator[Connection]:
    """A database of its own, so that other tests don't wait: nine in ten jobs are over, 100,000 wait, 100 run."""
    migration: Any = importlib.import_module("migrations.versions.0001_jobs_and_files")
    url = get_settings().database_conninfo
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute("DROP DATABASE IF EXISTS million WITH (FORCE)")
        admin.execute("CREATE DATABASE million TEMPLATE template0")
    with psycopg.connect(url, dbname="million", autocommit=True, row_factory=dict_row) as db:
        db.execute(migration.TABLES + migration.STATE_MACHINE)
        db.execute(
            """
            INSERT INTO jobs (id, kind, status, priority, queue, payload, max_attempts, attempt, run_at, created_at,
                              published_at, lease_token, lease_expires_at, finished_at, result, error)
            SELECT gen_random_uuid(), CASE WHEN n %% 100 = 0 THEN 'webhook' ELSE 'sleep' END, status, 'default',
                   (ARRAY['high_priority', 'default', 'low_priority'])[1 + n / 10 %% 3], '{}', 4, 1,
                   moment, moment, CASE WHEN status = 'queued' AND n %% 310 = 1 THEN moment END,
                   CASE WHEN status <> 'queued' THEN gen_random_uuid() END,
                   CASE WHEN status = 'running' THEN now() + interval '1 day' END,
                   CASE WHEN status IN ('succeeded', 'failed') THEN moment END,
                   CASE WHEN status = 'succeeded' THEN '{}'::jsonb END, CASE WHEN status = 'failed' THEN '{}'::jsonb END
            FROM (SELECT n, now() - n * interval '1 second' AS moment,
                         CASE WHEN n %% 10000 = 7 THEN 'running' WHEN n %% 10 = 1 THEN 'queued'
                              WHEN n %% 1000 = 3 THEN 'failed' ELSE 'succeeded' END AS status
                  FROM generate_series(1, %s) AS n) AS made
            """,
            [ROWS],
        )
        db.execute("VACUUM ANALYZE jobs")
        yield db
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute("DROP DATABASE million WITH (FORCE)")


def plan(db: Connection, statement: str, params: dict[str, Any]) -> tuple[int, str]:
    """(pages read, the plan as text) of a statement that is really run and then undone."""
    with db.transaction(force_rollback=True):
        [row] = db.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", params).fetchall()
    top = row["QUERY PLAN"][0]["Plan"]
    return top["Shared Hit Blocks"] + top["Shared Read Blocks"], json.dumps(top)


CLAIM = {"token": uuid4(), "worker": "w", "node": "n", "pid": 1, "lease": 30}
QUERIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "claim": (statements.CLAIM, {**CLAIM, "id": "A QUEUED ONE"}, "jobs_pkey"),
    "due": (statements.DISPATCH, {"queues": list(JOB_QUEUES), "window": 1100}, "jobs_due"),
    "lost messages": (statements.SETTLED, {"queues": list(JOB_QUEUES), "settle": 10}, "jobs_published"),
    "rows outside the windows": (statements.WAITING_OUTSIDE, {"queues": list(JOB_QUEUES)}, "jobs_due"),
    "expired leases": (
        statements.RESCUE,
        {"settle": 0, "error": "{}", "retry_in": 0, "published": True, "progress": None},
        "jobs_running",
    ),
    "newest": (statements.list_jobs([], after_cursor=False), {"limit": 51}, "jobs_newest"),
    "newest of a kind": (
        statements.list_jobs(["kind"], after_cursor=False),
        {"limit": 51, "kind": "webhook"},
        "jobs_newest_of_kind",
    ),
    "newest failed": (
        statements.list_jobs(["status"], after_cursor=False),
        {"limit": 51, "status": "failed"},
        "jobs_newest_unsuccessful",
    ),
    "newest in a queue": (
        statements.list_jobs(["queue", "status"], after_cursor=False),
        {"limit": 51, "queue": "low_priority", "status": "succeeded"},
        "jobs_newest",
    ),
    "a page far down": (
        statements.list_jobs([], after_cursor=True),
        {"limit": 51, "cursor_id": uuid4(), "cursor_time": "A WEEK AGO"},
        "jobs_newest",
    ),
    "counts": (statements.QUEUE_COUNTS, {"queues": list(JOB_QUEUES)}, "jobs_running"),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", QUERIES)
def test_a_query_reads_its_index(name: str, million: Connection, settings: Settings) -> None:
    statement, params, index = QUERIES[name]
    if params.get("id"):
        found = million.execute("SELECT id FROM jobs WHERE status = 'queued' LIMIT 1").fetchone()
        assert found is not None
        params = {**params, "id": found["id"]}
    if params.get("cursor_time"):
        found = million.execute("SELECT now() - interval '7 days' AS moment").fetchone()
        assert found is not None
        params = {**params, "cursor_time": found["moment"]}
    pages, text = plan(million, statement, params)
    assert f'"Index Name": "{index}"' in text
    assert (
        '"Node Type": "Seq Scan", "Parallel Aware": false, "Async Capable": false, "Relation Name": "jobs"' not in text
    )
    assert '"Relation Name": "jobs"' in text
    assert pages < MORE_PAGES.get(name, FEW_PAGES), text
