"""Deletes finished jobs and old ticks after JOB_RETENTION_DAYS, and keeps the planner's statistics fresh."""

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import redis

from app.database import Database
from app.jobs import statements, stats
from app.settings import Settings
from worker.maintenance._slice import slice_over

# Some 100 ms a batch: a retry by a person, which is all that may want the same rows, doesn't notice.
BATCH = 1000

# The newest tick of each entry stays: from it beat knows when the entry is due next.
DELETE_TICKS = """
WITH old AS MATERIALIZED (
    SELECT entry, due_at FROM schedule_ticks t
    WHERE due_at < now() - %(days)s * interval '1 day'
      AND EXISTS (SELECT FROM schedule_ticks n WHERE n.entry = t.entry AND n.due_at > t.due_at)
    ORDER BY entry, due_at LIMIT %(batch)s FOR UPDATE SKIP LOCKED
)
DELETE FROM schedule_ticks t USING old WHERE t.entry = old.entry AND t.due_at = old.due_at RETURNING 1
"""

# Autovacuum looks at a quiet table late. One that somebody analyses just now is left out, not waited for.
ANALYZE = "ANALYZE (SKIP_LOCKED) jobs, job_steps, job_attempts, job_files, files, schedule_ticks"


def run(database: Database, client: redis.Redis | None, settings: Settings) -> dict[str, Any]:
    """Returns what was deleted: {"jobs": 1200, "ticks": 24}. Needs no Redis."""
    over, done = slice_over(), Counter[str]()
    for what, count in _batches(database, settings.job_retention_days):
        done[what] += count
        if over():
            return {**done, "unfinished": True}
    while rolled := database.run(stats.ROLL_UP)[0]["rows"]:
        done["stats"] += rolled
        if over():
            return {**done, "unfinished": True}
    database.run(ANALYZE)
    return dict(done)


def _batches(database: Database, days: int) -> Iterator[tuple[str, int]]:
    """Deletes, and says after each batch how many of what went."""
    if not days:
        return
    params = {"days": days, "batch": BATCH}
    for statement in statements.DELETE_FINISHED:
        last = {"after_time": datetime(1, 1, 1, tzinfo=UTC), "after_id": UUID(int=0)}
        while rows := database.run(statement, params | last):
            yield "jobs", len(rows)
            newest = max(rows, key=lambda row: (row["created_at"], row["id"]))
            last = {"after_time": newest["created_at"], "after_id": newest["id"]}
    while rows := database.run(DELETE_TICKS, params):
        yield "ticks", len(rows)
