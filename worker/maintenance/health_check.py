"""Answers with what this worker can reach, for scripts that test the way through broker and worker."""

import redis

from app.database import Database
from app.settings import Settings


def run(database: Database, client: redis.Redis, settings: Settings) -> dict[str, str]:
    database.run("SELECT 1")
    client.ping()
    return {"postgres": "ok", "redis": "ok"}
