"""How a house-keeping task runs: once for each tick, and the long ones one at a time."""

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import psycopg
import redis

from app import ticks
from app.database import Database
from app.jobs import messages
from app.settings import Settings
from worker import maintenance

# With a clock that jumped ahead by a month, everything would be past its time.
CLOCKS_SECONDS = 3600
SLOW_KEY = "jobstack:maintenance:slow"
# Above the hard limit: it outlives no run, and a killed one does not keep the others waiting for long.
SLOW_SECONDS = ticks.TIME_LIMIT_SECONDS + 10
# Deletes the key only while it is ours: after a hard stop of Redis it may be somebody else's.
RELEASE = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end"


def run(
    module: ModuleType, database: Database, client: redis.Redis, settings: Settings, due_at: str | None
) -> dict[str, Any]:
    """Runs a task and returns what it did; {} too if its tick is somebody else's, or replaced.

    Args:
        due_at: the tick's time; None for a run by hand, which needs no tick.

    Raises:
        Exception: whatever the task raises. The tick is then sent again.
    """
    tick = {"entry": module.__name__.rpartition(".")[2], "due_at": due_at}
    with _alone(client) if module in maintenance.SLOW else _together() as free:
        if not free:
            if due_at is None:
                return {"skipped": "another long task is running"}
            database.run(ticks.SEND_AGAIN, tick)
            return {}
        if due_at is None:
            return _done(module, database, client, settings)
        claimed = database.run(ticks.CLAIM, tick | {"lost": ticks.LOST_SECONDS})
        if not claimed:
            return {}
        claim = claimed[0]
        try:
            done = _done(module, database, client, settings)
        except Exception as error:
            # If this cannot be written either, the tick is claimed again when it counts as lost.
            with suppress(psycopg.Error):
                database.run(ticks.FAIL, claim | {"error": f"{type(error).__name__}: {error}".strip()})
            raise
        end = ticks.GO_ON if done.get("unfinished") else ticks.FINISH
        database.run(end, claim | {"result": json.dumps(done)})
        return done


def _done(module: ModuleType, database: Database, client: redis.Redis, settings: Settings) -> dict[str, Any]:
    if module in maintenance.SLOW:  # those that delete what is old
        [row] = database.run(
            "SELECT abs(EXTRACT(EPOCH FROM clock_timestamp())::float - %(here)s) AS apart", {"here": time.time()}
        )
        if row["apart"] > CLOCKS_SECONDS:
            return {"skipped": f"the clocks of PostgreSQL and this worker are {row['apart']:.0f} s apart"}
    done: dict[str, Any] = module.run(database, client, settings)
    return done


@contextmanager
def _together() -> Iterator[bool]:
    yield True


@contextmanager
def _alone(client: redis.Redis) -> Iterator[bool]:
    """Whether no other long task runs. Of two children one is always free for dispatch and rescue."""
    token = secrets.token_hex(8)
    if not client.set(SLOW_KEY, token, nx=True, ex=SLOW_SECONDS):
        yield False
        return
    try:
        yield True
    finally:
        with suppress(*messages.REDIS_ERRORS):  # the key expires
            client.eval(RELEASE, 1, SLOW_KEY, token)
