"""What the first page shows, and much of what `/metrics` says: computed for all who ask at about the same time."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from psycopg.rows import DictRow
from pydantic import BaseModel

from app import workers
from app.api.shared import Shared
from app.api.within import within
from app.jobs import statements, stats
from app.jobs.messages import REDIS_ERRORS
from app.queues import ALL_QUEUES, MAINTENANCE
from app.schedule import SCHEDULE
from app.settings import Settings

HOUR_MINUTES = 60
HOUR_SECONDS = 5.0
FAILURES = 10

TICKS = """
SELECT wanted.entry, now() AS now, tick.due_at, tick.sent_at, tick.started_at, tick.finished_at, tick.error
FROM unnest(%(entries)s::text[]) WITH ORDINALITY AS wanted (entry, position)
LEFT JOIN LATERAL (
    SELECT * FROM schedule_ticks t WHERE t.entry = wanted.entry AND t.due_at <= now() ORDER BY t.due_at DESC LIMIT 1
) AS tick ON true
ORDER BY wanted.position
"""


class QueueOverview(BaseModel):
    """`queued` and `running` as in `/api/queues`; `per_minute`: jobs finished in each of the last 60 minutes, the
    present one last."""

    name: str
    queued: int
    running: int
    oldest_queued_seconds: int | None
    messages: int | None
    window: int | None
    consumers: int | None
    per_minute: list[int]


class WorkerOverview(BaseModel):
    """A worker that consumes, or that runs something. `queues` is null if only its jobs speak of it."""

    name: str
    queues: list[str] | None
    running: int
    last_seen_seconds: int


class BeatEntry(BaseModel):
    """An entry of the schedule and its newest tick. `late`: there should have been another since."""

    entry: str
    last_sent_at: datetime | None
    last_finished_at: datetime | None
    next_due_at: datetime
    late: bool
    error: str | None


class RedisMemory(BaseModel):
    """`maxmemory_bytes` is 0 where Redis has no limit."""

    memory_bytes: int
    maxmemory_bytes: int


class KindOverview(BaseModel):
    """Jobs that ended in the last hour."""

    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0


class Overview(BaseModel):
    """`redis` and what comes from it is null while it is away. `kinds` and `failures` are of the last hour, the latter
    attempts by type of error, the most frequent first. `jobs_version` changes whenever one of the newest jobs does."""

    queues: list[QueueOverview]
    workers: list[WorkerOverview]
    beat: list[BeatEntry]
    kinds: dict[str, KindOverview]
    failures: dict[str, int]
    redis: RedisMemory | None
    jobs_version: str


class Broker(NamedTuple):
    """What Redis says of itself: keys that never expire are few, see promise 6."""

    messages: dict[str, int]
    workers: dict[str, workers.Sign]
    memory_bytes: int
    maxmemory_bytes: int
    keys_without_ttl: int

    def consumers(self, queue: str) -> int:
        return sum(queue in sign.queues and sign.seconds_ago < workers.ALIVE_SECONDS for sign in self.workers.values())


async def look_at_redis(client: Any) -> Broker | None:
    """In one round trip; None while Redis is away, or where there is none."""
    if client is None:
        return None
    pipeline = client.pipeline(transaction=False)
    for queue in ALL_QUEUES:
        pipeline.llen(queue)
    pipeline.eval(workers.LOOK, 1, workers.KEY)
    pipeline.info("memory")
    pipeline.info("keyspace")
    try:
        *lengths, signs, memory, keyspace = await pipeline.execute()
    except REDIS_ERRORS:
        return None
    return Broker(
        dict(zip(ALL_QUEUES, lengths, strict=True)),
        workers.signs(signs),
        memory["used_memory"],
        memory["maxmemory"],
        sum(database["keys"] - database["expires"] for database in keyspace.values()),
    )


async def look_at_beat(state: Any) -> list[BeatEntry]:
    """Empty where the API keeps house itself."""
    settings: Settings = state.settings
    if settings.jobs_execution == "inline":
        return []
    zone = ZoneInfo(settings.schedule_timezone)
    rows = await within(state.query(TICKS, {"entries": [entry.task for entry in SCHEDULE]}))
    return [
        BeatEntry(
            entry=entry.task,
            last_sent_at=row["sent_at"],
            last_finished_at=row["finished_at"],
            next_due_at=entry.next(row["due_at"] or row["now"], zone),
            late=entry.is_late(row["now"], zone, row["due_at"], row["sent_at"]),
            error=row["error"],
        )
        for entry, row in zip(SCHEDULE, rows, strict=True)
    ]


def last_hour(query: Callable[..., Awaitable[list[DictRow]]]) -> Shared[list[DictRow]]:
    """For the API's state: what was counted in the last hour, by minute."""
    return Shared(lambda: within(query(stats.LAST_HOUR, {})), HOUR_SECONDS)


async def overview(state: Any) -> Overview:
    """Raises `psycopg.OperationalError` or `Problem`: PostgreSQL is away."""
    queues, running, [version], beat, hour, broker = await asyncio.gather(
        state.counts.now(),
        within(state.query(statements.RUNNING_BY_WORKER, {})),
        within(state.query(statements.NEWEST_VERSION, {})),
        look_at_beat(state),
        state.last_hour.now(),
        look_at_redis(state.redis),
    )
    per_minute: dict[str, list[int]] = defaultdict(lambda: [0] * HOUR_MINUTES)
    kinds: dict[str, KindOverview] = defaultdict(KindOverview)
    failures = Counter[str]()
    for row in hour:
        status = stats.JOB_ENDS.get(row["status"])
        if status:
            setattr(kinds[row["kind"]], status, getattr(kinds[row["kind"]], status) + row["jobs"])
            if 0 <= row["minutes_ago"] < HOUR_MINUTES:
                per_minute[row["queue"]][HOUR_MINUTES - 1 - row["minutes_ago"]] += row["jobs"]
        elif row["status"] == stats.ERROR:
            failures[row["error"]] += row["jobs"]
    return Overview(
        queues=[
            QueueOverview(
                **row | {"oldest_queued_seconds": _whole(row["oldest_queued_seconds"])},
                messages=broker and broker.messages[row["name"]],
                window=None if row["name"] == MAINTENANCE else state.settings.queue_window,
                consumers=broker and broker.consumers(row["name"]),
                per_minute=per_minute[row["name"]],
            )
            for row in queues
        ],
        workers=_workers(running, broker),
        beat=beat,
        kinds=dict(sorted(kinds.items())),
        failures=dict(failures.most_common(FAILURES)),
        redis=broker and RedisMemory(memory_bytes=broker.memory_bytes, maxmemory_bytes=broker.maxmemory_bytes),
        jobs_version=version["version"] or "",
    )


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)


def _workers(running: list[DictRow], broker: Broker | None) -> list[WorkerOverview]:
    signs = broker.workers if broker else {}
    busy = {row["worker"]: row for row in running}
    found = []
    for name in sorted({*signs, *busy}):
        row, sign = busy.get(name), signs.get(name)
        ages = [sign.seconds_ago] if sign else []
        if row:
            ages.append(max(0, int(row["heartbeat_age"])))
        found.append(
            WorkerOverview(
                name=name,
                queues=sign and list(sign.queues),
                running=row["jobs"] if row else 0,
                last_seen_seconds=min(ages),
            )
        )
    return found
