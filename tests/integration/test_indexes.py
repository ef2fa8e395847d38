"""With a million rows, the queries that run all day read what they need and nothing else."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.rows import DictRow, dict_row
from psycopg.sql import SQL, Identifier

from app.jobs import statements
from app.queues import JOB_QUEUES
from tests.integration.conftest import Jobs
from tests.servers import Postgres, Redis
from worker.runner import Runner

ROWS = 1_000_000
# A page holds eight kilobytes; a scan of the table reads tens of thousands of them.
FEW_PAGES = 400

Connection = psycopg.Connection[DictRow]
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def million(environment: Redis, postgres: Postgres) -> Iterator[Connection]:
    """A database of its own, so that other tests don't wait. 100,000 rows wait, 100 run, the rest is over. At the old
    end, where lists look last, is what is rare: the kind `rare`, the queue `low_priority`, and all that waits."""
    url = postgres.another_database("million")
    subprocess.run([sys.executable, "-m", "app.migrate"], env={**os.environ, "DATABASE_URL": url}, check=True)
    with psycopg.connect(url, autocommit=True, row_factory=dict_row, prepare_threshold=None) as db:
        # Filled first and indexed then, which is four times faster.
        indexes = db.execute(
            """SELECT indexname AS name, indexdef AS definition FROM pg_indexes
            WHERE tablename = 'jobs' AND indexname <> 'jobs_pkey'"""
        ).fetchall()
        for index in indexes:
            db.execute(SQL("DROP INDEX {}").format(Identifier(index["name"])))
        db.execute(
            """
            INSERT INTO jobs (id, kind, status, priority, queue, payload, max_attempts, attempt, run_at, created_at,
                              published_at, short, lease_token, lease_expires_at, finished_at, result, error)
            SELECT uuidv7(), CASE WHEN n < 20 THEN 'rare' WHEN n %% 100 = 0 THEN 'webhook' ELSE 'sleep' END,
                   status, 'default',
                   CASE WHEN n < 50 THEN 'low_priority' WHEN n %% 2 = 0 THEN 'default' ELSE 'high_priority' END,
                   '{}', 4, 1, moment, moment,
                   CASE WHEN status = 'queued' AND n %% 310 = 1 THEN moment END,
                   status = 'queued' AND n %% 310 BETWEEN 2 AND 99,
                   CASE WHEN status <> 'queued' THEN gen_random_uuid() END,
                   CASE WHEN status = 'running' THEN now() + interval '1 hour' END,
                   CASE WHEN status IN ('succeeded', 'failed') THEN moment END,
                   CASE WHEN status = 'succeeded' THEN '{}'::jsonb END, CASE WHEN status = 'failed' THEN '{}'::jsonb END
            FROM (SELECT n, now() - (%(rows)s - n) * interval '1 second' AS moment,
                         CASE WHEN n %% 10000 = 7 THEN 'running' WHEN n < 100000 THEN 'queued'
                              WHEN n %% 1000 = 3 THEN 'failed' ELSE 'succeeded' END AS status
                  FROM generate_series(0, %(rows)s - 1) AS n) AS made
            """,
            {"rows": ROWS},
        )
        for index in indexes:
            db.execute(index["definition"])
        db.execute("VACUUM ANALYZE jobs")
        yield db
    with psycopg.connect(postgres.url, autocommit=True) as admin:
        admin.execute("DROP DATABASE million")


def explain(db: Connection, statement: str, params: dict[str, Any] | None = None) -> tuple[int, str]:
    """(pages read, the plan as text) of a statement that is really run and then undone."""
    with db.transaction(force_rollback=True):
        [row] = db.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", params).fetchall()
    top = row["QUERY PLAN"][0]["Plan"]
    return top["Shared Hit Blocks"] + top["Shared Read Blocks"], json.dumps(top)


def reads_only(indexes: str, pages: int, text: str, limit: float = FEW_PAGES) -> None:
    """`indexes`: one of them, separated by bars."""
    assert re.search(f'"Index Name": "({indexes})"', text), text
    assert not re.search('"Seq Scan"[^}]*"Relation Name": "jobs"', text), text
    assert pages < limit, text


CLAIM = {"token": uuid4(), "worker": "w", "node": "n", "pid": 1, "lease": 30}
QUEUES = {"queues": list(JOB_QUEUES)}
OF_RUNNING = "jobs_running|jobs_newest_of_status"


def test_claim(million: Connection) -> None:
    found = million.execute("SELECT id FROM jobs WHERE status = 'queued' LIMIT 1").fetchone()
    assert found is not None
    reads_only("jobs_pkey", *explain(million, statements.CLAIM, {**CLAIM, "id": found["id"]}))


def test_a_group(million: Connection) -> None:
    # It writes a hundred rows, each with its indexes.
    group = {**CLAIM, "queue": "default", "limit": 100}
    reads_only("jobs_short_due", *explain(million, statements.CLAIM_SHORT, group), 100 * 40)
    ids = [row["id"] for row in million.execute("SELECT id FROM jobs WHERE status = 'running' LIMIT 100")]
    done = {"ids": ids, "results": ["{}"] * len(ids), "progress": [None] * len(ids), "token": uuid4()}
    reads_only(f"jobs_pkey|{OF_RUNNING}", *explain(million, statements.FINISH_SHORT, done), 100 * 10)


@pytest.mark.parametrize(
    ("statement", "params", "index"),
    [
        (statements.SETTLED, {**QUEUES, "settle": 10}, "jobs_published"),
        (statements.WAITING, QUEUES, "jobs_due|jobs_short_due"),
        (statements.RESCUE, {"settle": 0, "error": "{}", "retry_in": 0, "published": True}, OF_RUNNING),
        (statements.HAND_BACK_NODE, {"node": "n", "retry_in": 0, "progress": None}, OF_RUNNING),
    ],
    ids=["lost messages", "rows outside the windows", "expired leases", "a node's claims"],
)
def test_the_house_keeping(statement: str, params: dict[str, Any], index: str, million: Connection) -> None:
    reads_only(index, *explain(million, statement, params))


def test_dispatch(million: Connection) -> None:
    # It writes about 600 rows, each with its indexes.
    reads_only("jobs_due", *explain(million, statements.DISPATCH, {**QUEUES, "window": 300}), 600 * 30)


@pytest.mark.parametrize("statement", statements.DELETE_FINISHED, ids=["succeeded", "failed", "cancelled"])
@pytest.mark.parametrize("days", [10, 30], ids=["1,000 of 36,000", "nothing"])
def test_deleting_old_jobs(days: int, statement: str, million: Connection) -> None:
    first = {"after_time": datetime(1, 1, 1, tzinfo=UTC), "after_id": UUID(int=0)}
    # Some eleven pages for each row that it deletes.
    limit = 1000 * 15 if days == 10 else FEW_PAGES
    reads_only("jobs_newest.*", *explain(million, statement, {**first, "days": days, "batch": 1000}), limit)


@pytest.mark.parametrize(("most", "pages"), [(100, 1.5 * FEW_PAGES), (None, 5 * FEW_PAGES)], ids=["some", "all"])
def test_counts(most: int | None, pages: float, million: Connection) -> None:
    # The entries of all 100,000 waiting rows, or of a few of them, but not the rows.
    params = {**QUEUES, "most": most}
    reads_only("jobs_due", *explain(million, statements.QUEUE_COUNTS, params), pages)


@pytest.fixture(scope="module")
def backlog(environment: Redis, postgres: Postgres) -> Iterator[Connection]:
    """Nothing but rows that wait, all in one queue: whatever a queue without any needs, the table has plenty of it."""
    url = postgres.another_database("backlog")
    subprocess.run([sys.executable, "-m", "app.migrate"], env={**os.environ, "DATABASE_URL": url}, check=True)
    with psycopg.connect(url, autocommit=True, row_factory=dict_row, prepare_threshold=None) as db:
        db.execute(
            """
            INSERT INTO jobs (id, kind, priority, queue, payload, max_attempts, run_at)
            SELECT uuidv7(), 'flaky', 'default', 'default', '{}', 4, now() - (100000 - n) * interval '1 second'
            FROM generate_series(1, 100000) AS n
            """
        )
        db.execute("VACUUM ANALYZE jobs")
        yield db
    with psycopg.connect(postgres.url, autocommit=True) as admin:
        admin.execute("DROP DATABASE backlog")


def test_what_asks_for_waiting_rows_while_another_queue_is_full(backlog: Connection) -> None:
    reads_only("jobs_due|jobs_short_due", *explain(backlog, statements.WAITING, QUEUES))
    reads_only("jobs_due", *explain(backlog, statements.DISPATCH, {**QUEUES, "window": 1}))
    for queue in JOB_QUEUES:
        columns = ("ids", "kinds", "priorities", "queues", "payloads", "max_attempts", "run_ats", "idempotency_keys")
        job = (uuid4(), "flaky", "low", queue, "{}", 4, None, None)
        params = {name: [value] for name, value in zip(columns, job, strict=True)} | {
            "request_hashes": [None], "api_keys": [""], "request_ids": [None], "short": [False],
            "file_jobs": [], "file_ids": [], "open_queues": list(JOB_QUEUES),
        }  # fmt: skip
        reads_only("jobs_due", *explain(backlog, statements.CREATE, params))


LISTS: list[tuple[dict[str, str], str]] = [
    ({}, "jobs_newest"),
    ({"kind": "sleep"}, "jobs_newest.*"),
    ({"kind": "rare"}, "jobs_newest_of_kind"),
    ({"kind": "none"}, "jobs_newest_of_kind"),
    ({"status": "queued"}, "jobs_newest_of_status"),
    ({"status": "running"}, OF_RUNNING),
    ({"status": "failed"}, "jobs_newest_of_status"),
    ({"status": "cancelled"}, "jobs_newest_of_status"),
    ({"queue": "low_priority"}, "jobs_newest_of_queue"),
    ({"queue": "default", "status": "succeeded"}, "jobs_newest.*"),
    ({"queue": "low_priority", "status": "failed"}, "jobs_newest_of_queue"),
    ({"kind": "rare", "status": "queued"}, "jobs_newest_of_kind"),
]


@pytest.mark.parametrize(("filters", "index"), LISTS, ids=str)
def test_lists(filters: dict[str, str], index: str, million: Connection) -> None:
    statement = statements.list_jobs(list(filters), after_cursor=False)
    reads_only(index, *explain(million, statement, {**filters, "limit": 51}))


def test_a_page_far_down(million: Connection) -> None:
    found = million.execute("SELECT now() - interval '7 days' AS moment").fetchone()
    assert found is not None
    params = {"limit": 51, "cursor_id": uuid4(), "cursor_time": found["moment"]}
    reads_only("jobs_newest", *explain(million, statements.list_jobs([], after_cursor=True), params))


def test_heartbeats_touch_no_index(runner: Runner, jobs: Jobs, db: Connection) -> None:
    """Rewritten on their own page (HOT), or a running job would leave a dead entry in each index every five seconds."""

    def counted() -> DictRow:
        db.execute("SELECT pg_stat_clear_snapshot()")
        runner.database.run("SELECT pg_stat_force_next_flush()")
        row = db.execute(
            "SELECT n_tup_upd AS all, n_tup_hot_upd AS hot FROM pg_stat_user_tables WHERE relname = 'jobs'"
        ).fetchone()
        assert row is not None
        return row

    claim = runner.claim(jobs.insert())
    assert claim is not None
    held: dict[str, list[UUID]] = {"ids": [claim.id], "tokens": [claim.lease_token]}
    before = counted()
    for number in range(50):
        progress = json.dumps({"current": number, "total": 50, "message": "x" * 100})
        assert runner.database.run(statements.HEARTBEAT, {**held, "progress": [progress], "lease": 30})
    after = counted()
    assert after["all"] - before["all"] == after["hot"] - before["hot"] == 50
