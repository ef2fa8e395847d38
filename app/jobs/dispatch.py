"""From rows to messages: keeps each queue in Redis filled from PostgreSQL, up to its window, and repairs what got lost.

Runs in the maintenance worker every two seconds, and whenever somebody asks; any number of these at once is safe.
"""

import time
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import cast

import redis

from app.database import Database
from app.jobs import messages, statements
from app.queues import JOB_QUEUES
from app.settings import Settings

# A message younger than this may still be on its way from a publisher to the list, or from the list to a claim.
SETTLE_SECONDS = 10
# Even when the counts agree, duplicates and wake-ups may hide losses: look at the ids at least this often. A message
# that a dead worker held is one, and its job is to run again within 45 s.
CHECK_SECONDS = 20
CHECKED_KEY = "jobstack:dispatch:checked"
# A run of dispatch that stays for a backlog ends before the next one comes.
TOP_UP_SECONDS = 1.8
LOOK_SECONDS = 0.05
TOPPING_UP_KEY = "jobstack:dispatch:topping-up"


def dispatch(database: Database, client: redis.Redis, settings: Settings) -> dict[str, int]:
    """Publishes due rows, then repairs. Returns how many messages of each sort were sent, without zeros.

    Raises:
        psycopg.OperationalError, redis.RedisError: one of the two is away; the next run makes up for it.
    """
    # Redis first: while it is away no row must be marked as published.
    client.ping()
    published = _publish(database, client, settings)
    repaired = repair(database, client, settings)
    return {name: count for name, count in (("published", published), ("repaired", repaired)) if count}


def wake(client: redis.Redis, settings: Settings, queues: Iterable[str]) -> None:
    """Sends a wake-up for short jobs to each queue that has none waiting."""
    for queue in queues:
        client.eval(*messages.wake_up(queue, settings))  # type: ignore[arg-type]


def top_up(database: Database, client: redis.Redis, settings: Settings) -> int:
    """Looks after those without a message: wakes workers up for short jobs and, while rows wait outside a window,
    refills it as it empties, for TOP_UP_SECONDS. Returns how many messages it sent for these.

    One dispatcher at a time refills. Without a backlog it returns at once.
    """
    end, sent = time.monotonic() + TOP_UP_SECONDS, 0
    outside, short = _waiting(database)
    wake(client, settings, short)
    if not outside or not client.set(TOPPING_UP_KEY, 1, nx=True, px=int(TOP_UP_SECONDS * 1000)):
        return 0
    while outside and time.monotonic() < end:
        time.sleep(LOOK_SECONDS)
        if min(cast(int, client.llen(queue)) for queue in outside) < settings.queue_window / 2:
            sent += _publish(database, client, settings)
            outside, _ = _waiting(database)
    return sent


def rebuild(database: Database, client: redis.Redis, settings: Settings, queues: Sequence[str]) -> dict[str, int]:
    """For people: `dispatch` for some queues, by the ids and without patience. Copies of messages that are under way
    come with it, which do no harm."""
    client.ping()
    published = _publish(database, client, settings, queues)
    repaired = repair(database, client, settings, thorough=True, queues=queues, settle=0)
    wake(client, settings, _waiting(database, queues)[1])
    return {"published": published, "repaired": repaired}


def _publish(database: Database, client: redis.Redis, settings: Settings, queues: Sequence[str] = JOB_QUEUES) -> int:
    rows = database.run(statements.DISPATCH, {"queues": list(queues), "window": settings.queue_window})
    send(rows, client, settings)
    return len(rows)


def _waiting(database: Database, queues: Sequence[str] = JOB_QUEUES) -> tuple[list[str], list[str]]:
    """The queues with rows outside their window, and those with short jobs that are due."""
    rows = database.run(statements.WAITING, {"queues": list(queues)})
    return [row["queue"] for row in rows if row["outside"]], [row["queue"] for row in rows if row["short"]]


def repair(
    database: Database,
    client: redis.Redis,
    settings: Settings,
    *,
    thorough: bool = False,
    queues: Sequence[str] = JOB_QUEUES,
    settle: float = SETTLE_SECONDS,
) -> int:
    """Publishes again what should be in a list and isn't. Counts are the cheap trigger, the ids decide.

    A message in `unacked` does not count as present: its worker may be dead, and a needless copy is harmless.
    """
    settled = database.run(statements.SETTLED, {"queues": list(queues), "settle": settle})
    if not settled:
        return 0
    thorough = thorough or bool(client.set(CHECKED_KEY, 1, nx=True, ex=CHECK_SECONDS))
    repaired = 0
    for row in settled:
        queue, expected = row["queue"], set(row["ids"])
        if not thorough and len(expected) <= cast(int, client.llen(queue)):
            continue
        present = {messages.job_id_of(message) for message in client.lrange(queue, 0, -1)}  # type: ignore[union-attr]
        lost = expected - present
        rows = database.run(statements.PUBLISH_AGAIN, {"ids": list(lost), "settle": settle}) if lost else []
        send(rows, client, settings)
        repaired += len(rows)
    return repaired


def send(rows: list[dict[str, object]], client: redis.Redis, settings: Settings, *, ahead: bool = False) -> None:
    """One command a queue, oldest first. Workers take from the right.

    `ahead` of all that waits, for jobs that were under way already: how soon they go on must not depend on a backlog.
    """
    oldest_first = sorted(rows, key=itemgetter("run_at", "id"))
    addresses = [messages.Address(row["id"], row["kind"], row["queue"]) for row in oldest_first]  # type: ignore[arg-type]
    for queue, batch in messages.by_queue(addresses, settings).items():
        if ahead:
            client.rpush(queue, *reversed(batch))
        else:
            client.lpush(queue, *batch)
