"""Removes from Redis what Celery leaves there for ever: results without a TTL, replies and bindings of the dead.

A database of Redis may be shared. A key is touched only if its name, its type and its content are Celery's; all others
stay as they are. `unacked` is not touched: its messages come back after the visibility timeout.
"""

import json
import re
from collections import Counter
from datetime import UTC, datetime
from typing import Any, cast

import redis

from app.celery_app import celery_app
from app.database import Database
from app.jobs import messages
from app.settings import Settings
from worker.maintenance._slice import slice_over

SCAN_COUNT = 1000
# Where the next slice goes on: which Redis, and SCAN's cursor there.
POSITION_KEY = "jobstack:cleanup_celery_results:position"
POSITION_SECONDS = 3600

_ID = b"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
RESULT = re.compile(b"celery-task-meta-(.+)", re.DOTALL)
GROUP = re.compile(b"celery-taskset-meta-(" + _ID + b")")
CHORD = re.compile(GROUP.pattern + rb"\.([jst])")
REPLIES = re.compile(_ID + rb"\.reply\.celery\.pidbox")

# How to look at the (first) content of each type.
FIRST: dict[bytes, tuple[Any, ...]] = {b"string": ("GET",), b"list": ("LINDEX", 0), b"zset": ("ZRANGE", 0, 0)}

# A client reads its replies within seconds; the list of one that was killed stays (kombu 5.6 gives it no TTL).
REPLIES_SECONDS = 60

# Bindings are members of sets without a TTL, and whoever is killed leaves theirs there. One goes if it was there at an
# earlier look, at least so many seconds ago, and
# - celery.pidbox (commands to workers): there are more bindings than listeners, and its worker does not answer.
# - celeryev (events): there are more bindings than listeners. Whose one is, nothing says; a living client's may go too,
#   which costs nothing: both these exchanges send by PUBLISH, and never read their bindings.
# - reply.celery.pidbox: nothing more. These are read for each reply, but a living client's stands there only for the
#   seconds in which it waits, and comes back with its next question: at worst, one `inspect` gets no answer.
LOOK_SECONDS = 600
SEEN_SECONDS = 6 * 3600
# A worker that lives answers at once, unless its machine is very busy; without its binding it would hear no command.
PING_SECONDS = 3
LOOKED_KEY = "jobstack:cleanup_celery_results:looked"
SEEN_KEY = "jobstack:cleanup_celery_results:seen:"
# Exchange -> a channel that all its listeners hear.
EXCHANGES = {"celery.pidbox": "celery.pidbox", "celeryev": "celeryev/worker.nobody", "reply.celery.pidbox": None}


def run(database: Database, client: redis.Redis, settings: Settings) -> dict[str, Any]:
    """Returns {"deleted": 2, "expired": 3, "bindings": 1}: results past their time, keys that got a TTL, bindings."""
    over, done = slice_over(), Counter[str]()
    servers = [client]
    if settings.result_backend_url != settings.broker_url:
        backend = settings.model_copy(update={"celery_broker_url": settings.celery_result_backend})
        servers.append(messages.connect(backend))
    position = cast(bytes | None, client.get(POSITION_KEY)) or b"0:0"
    number, cursor = map(int, position.split(b":"))
    while number < len(servers):
        cursor, keys = cast(tuple[int, list[bytes]], servers[number].scan(cursor, "*celery*", SCAN_COUNT))
        done += _sweep(servers[number], keys, settings.result_expires)
        number += cursor == 0
        if over():
            client.set(POSITION_KEY, f"{number}:{cursor}", ex=POSITION_SECONDS)
            return {**done, "unfinished": True}
    client.delete(POSITION_KEY)
    done["bindings"] = _remove_bindings(client)
    return dict(+done)


def _sweep(client: redis.Redis, keys: list[bytes], result_expires: int) -> Counter[str]:
    """Deletes those of Celery's keys that are past their time, and gives the others a TTL."""
    keys = [key for key in keys if any(name.fullmatch(key) for name in (RESULT, GROUP, CHORD, REPLIES))]
    keys = [key for key, ttl in zip(keys, _ask(client, [("TTL", key) for key in keys]), strict=True) if ttl == -1]
    types = dict(zip(keys, _ask(client, [("TYPE", key) for key in keys]), strict=True))
    keys = [key for key in keys if types[key] in FIRST]
    firsts = _ask(client, [(FIRST[types[key]][0], key, *FIRST[types[key]][1:]) for key in keys])
    done, commands = Counter[str](), list[tuple[Any, ...]]()
    now = cast(tuple[int, int], client.time())[0] if keys else 0
    for key, first in zip(keys, firsts, strict=True):
        seconds = seconds_left(key, first, now, result_expires)
        if seconds is not None:
            commands.append(("EXPIRE", key, seconds) if seconds else ("UNLINK", key))
            done["expired" if seconds else "deleted"] += 1
    _ask(client, commands)
    return done


def seconds_left(key: bytes, first: Any, now: int, result_expires: int) -> int | None:
    """How long this key, with `first` as its (first) content, may stay. None: not Celery's, whatever its name says."""
    try:
        content = json.loads(first[0] if isinstance(first, list) else first)
        if name := RESULT.fullmatch(key):
            if content["task_id"].encode() != name[1] or "status" not in content:
                return None
            if not content.get("date_done"):  # it runs
                return result_expires
            ended = datetime.fromisoformat(content["date_done"])
            ended = ended if ended.tzinfo else ended.replace(tzinfo=UTC)
            return 0 if now - ended.timestamp() > result_expires else result_expires
        if name := GROUP.fullmatch(key):
            return result_expires if content["result"][0][0].encode() == name[1] else None
        if REPLIES.fullmatch(key):
            exchange = content["properties"]["delivery_info"]["exchange"]
            return REPLIES_SECONDS if exchange == "reply.celery.pidbox" else None
        # A chord: its results [1, id, state, result], or one of its two counters.
        ours = content[0] == 1 and len(content) == 4 if key.endswith(b".j") else isinstance(content, int)
        return result_expires if ours else None
    except (ValueError, TypeError, LookupError, AttributeError):
        return None


def _remove_bindings(client: redis.Redis) -> int:
    """Returns how many."""
    if not client.set(LOOKED_KEY, 1, nx=True, ex=LOOK_SECONDS):
        return 0
    removed = 0
    for exchange, topic in EXCHANGES.items():
        key, seen = f"_kombu.binding.{exchange}", SEEN_KEY + exchange
        if client.type(key) != b"set":
            continue
        # An empty message is none to kombu. The answer is how many heard it.
        database = client.connection_pool.connection_kwargs.get("db", 0)
        listeners = cast(int, client.publish(f"/{database}.{topic}", "")) if topic else 0
        if cast(int, client.scard(key)) > listeners and (dead := cast(set[bytes], client.sinter([key, seen]))):
            if exchange == "celery.pidbox":
                living = [name for answer in celery_app.control.ping(timeout=PING_SECONDS) or () for name in answer]
                dead = {member for member in dead if not member.endswith(tuple(_mailbox(name) for name in living))}
            removed += cast(int, client.srem(key, *dead)) if dead else 0
        client.sunionstore(seen, [key])
        client.expire(seen, SEEN_SECONDS)
    return removed


def _mailbox(worker: str) -> bytes:
    """How the binding of a worker's queue for commands ends: routing key, pattern and queue, with separators."""
    return f"\x06\x16{worker}.celery.pidbox".encode()


def _ask(client: redis.Redis, commands: list[tuple[Any, ...]]) -> list[Any]:
    """Their answers, in one round trip. An error is an answer: the type of a key may change between two looks."""
    pipeline = client.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
    return pipeline.execute(raise_on_error=False)
