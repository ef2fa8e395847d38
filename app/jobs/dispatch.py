"""From rows to messages: keeps each queue in Redis filled from PostgreSQL, up to its window, and repairs what got lost.

Runs in the maintenance worker every two seconds, and whenever somebody asks; any number of these at once is safe.
"""

from operator import itemgetter

import redis

from app.database import Database
from app.jobs import messages, statements
from app.queues import JOB_QUEUES, MAINTENANCE
from app.settings import Settings

# A message younger than this may still be on its way from a publisher to the list, or from the list to a claim.
SETTLE_SECONDS = 10
# Even when the counts agree, duplicates may hide losses: look at the ids at least this often.
CHECK_SECONDS = 60
CHECKED_KEY = "jobstack:dispatch:checked"
# Set while rows wait outside a queue's window: workers then ask for more before their list runs dry.
BACKLOG_KEY = "jobstack:backlog:{queue}"


def dispatch(database: Database, client: redis.Redis, settings: Settings) -> dict[str, int]:
    """Publishes due rows, then repairs. Returns how many messages of each sort were sent, without zeros.

    Raises:
        psycopg.OperationalError, redis.RedisError: one of the two is away; the next run makes up for it.
    """
    # Redis first: while it is away no row must be marked as published.
    client.ping()
    rows = database.run(statements.DISPATCH, {"queues": list(JOB_QUEUES), "window": settings.queue_window})
    send(rows, client, settings)
    _mark_backlog(database, client)
    repaired = repair(database, client, settings)
    return {name: count for name, count in (("published", len(rows)), ("repaired", repaired)) if count}


def repair(database: Database, client: redis.Redis, settings: Settings, *, thorough: bool = False) -> int:
    """Publishes again what should be in a list and isn't. Counts are the cheap trigger, the ids decide.

    A message in `unacked` does not count as present: its worker may be dead, and a needless copy is harmless.
    """
    settled = database.run(statements.SETTLED, {"queues": list(JOB_QUEUES), "settle": SETTLE_SECONDS})
    if not settled:
        return 0
    thorough = thorough or bool(client.set(CHECKED_KEY, 1, nx=True, ex=CHECK_SECONDS))
    repaired = 0
    for row in settled:
        queue, expected = row["queue"], set(row["ids"])
        if not thorough and len(expected) <= int(client.llen(queue)):  # type: ignore[arg-type]
            continue
        present = {messages.job_id_of(message) for message in client.lrange(queue, 0, -1)}  # type: ignore[union-attr]
        lost = expected - present
        rows = database.run(statements.PUBLISH_AGAIN, {"ids": list(lost), "settle": SETTLE_SECONDS}) if lost else []
        send(rows, client, settings)
        repaired += len(rows)
    return repaired


def send(rows: list[dict[str, object]], client: redis.Redis, settings: Settings) -> None:
    """One command a queue, oldest first. Workers take from the right."""
    oldest_first = sorted(rows, key=itemgetter("run_at", "id"))
    addresses = [messages.Address(row["id"], row["kind"], row["queue"]) for row in oldest_first]  # type: ignore[arg-type]
    for queue, batch in messages.by_queue(addresses, settings).items():
        client.lpush(queue, *batch)


def _mark_backlog(database: Database, client: redis.Redis) -> None:
    waiting = {row["queue"] for row in database.run(statements.WAITING_OUTSIDE, {"queues": list(JOB_QUEUES)})}
    for queue in waiting:
        client.set(BACKLOG_KEY.format(queue=queue), 1, ex=10)


def ask_for_more(client: redis.Redis, queue: str, settings: Settings) -> None:
    """Called by workers now and then: wakes dispatch when this list runs low while rows wait outside its window."""
    pipeline = client.pipeline(transaction=False)
    pipeline.llen(queue)
    pipeline.exists(BACKLOG_KEY.format(queue=queue))
    length, backlog = pipeline.execute()
    if backlog and length < settings.queue_window / 2 and client.set("jobstack:dispatch:asked", 1, nx=True, px=200):
        client.lpush(MAINTENANCE, messages.maintenance_message("enqueue_pending_jobs"))
