"""Rescues jobs whose worker sends no heartbeats any more: killed, out of memory, cut off, without power."""

import json
from collections import Counter

import redis
from psycopg.rows import DictRow

from app import logs
from app.database import Database
from app.jobs import dispatch, statements
from app.jobs.stats import Stats
from app.settings import Settings

log = logs.get(__name__)


def run(database: Database, client: redis.Redis, settings: Settings) -> dict[str, int]:
    """Returns how many jobs went where: {"queued": 2, "failed": 1}."""
    rows = rescue(database, settings, published=True)
    dispatch.send([row for row in rows if row["status"] == "queued"], client, settings, ahead=True)
    count_rescued(rows, database)
    return dict(Counter(row["status"] for row in rows))


def count_rescued(rows: list[DictRow], database: Database) -> None:
    """For the statistics. After the messages: these must not wait for it."""
    stats = Stats("rescue")
    stats.count_ends(rows, "LeaseLost")
    stats.flush(database)


def rescue(database: Database, settings: Settings, *, published: bool) -> list[DictRow]:
    """Moves jobs whose lease ran out. `published`: the caller sends a message for each one that is queued again."""
    lost = f"lease lost: its worker gave no sign of life for {settings.job_lease_seconds:g} s"
    rows = database.run(
        statements.RESCUE,
        {
            # After a restart of PostgreSQL, workers need a round to renew their leases.
            "settle": 2 * settings.job_heartbeat_seconds + 2,
            "error": json.dumps({"type": "LeaseLost", "message": lost}),
            "retry_in": 0,
            "published": published,
        },
    )
    for row in rows:
        named = {name: row[name] for name in ("kind", "attempt", "request_id", "worker")}
        log.warning("rescued", job_id=str(row["id"]), **named, error=lost, outcome=row["status"])
    return rows
