"""Sends messages for jobs that are due, and again for those whose message got lost."""

import redis

from app.database import Database
from app.jobs.dispatch import dispatch
from app.settings import Settings


def run(database: Database, client: redis.Redis, settings: Settings) -> dict[str, int]:
    return dispatch(database, client, settings)
