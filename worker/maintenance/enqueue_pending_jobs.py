"""Sends messages for jobs that are due, and again for those whose message got lost."""

import redis

from app.database import Database
from app.jobs.dispatch import dispatch, top_up
from app.settings import Settings


def run(database: Database, client: redis.Redis, settings: Settings) -> dict[str, int]:
    done = dispatch(database, client, settings)
    # Two seconds are a long time for workers that finish a window of short jobs in one.
    more = top_up(database, client, settings)
    return done | ({"published": done.get("published", 0) + more} if more else {})
