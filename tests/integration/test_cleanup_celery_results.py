"""What Celery leaves in Redis goes, what is somebody else's stays byte for byte."""

import json
import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
import redis as redis_library

from app.celery_app import celery_app
from app.database import Database
from app.settings import Settings
from tests.processes import Process
from tests.servers import Redis, redis_server
from tests.waiting import until
from worker.maintenance import _slice, cleanup_celery_results

Run = Callable[..., dict[str, Any]]
HOUR = timedelta(hours=1)


@pytest.fixture
def run(database: Database, redis: Redis, settings: Settings) -> Run:
    """run(result_expires=3600) -> what one run did."""

    def run(**changes: Any) -> dict[str, Any]:
        return cleanup_celery_results.run(database, redis.client, settings.model_copy(update=changes))

    return run


def next_hour(redis: Redis) -> None:
    redis.client.delete(cleanup_celery_results.LOOKED_KEY)


def result(client: Any, ago: timedelta | None, *, zone: bool = True) -> str:
    """A result without a TTL, as a Celery with another configuration leaves it. `ago`: when its task ended."""
    task_id = str(uuid4())
    done = datetime.now(UTC) - ago if ago else None
    meta = {"status": "SUCCESS", "result": 1, "traceback": None, "children": [], "task_id": task_id}
    meta["date_done"] = done and (done if zone else done.replace(tzinfo=None)).isoformat()
    client.set(f"celery-task-meta-{task_id}", json.dumps(meta))
    return f"celery-task-meta-{task_id}"


def snapshot(client: Any) -> dict[bytes, tuple[bytes, bool]]:
    """Every key that is not our own: its content, byte for byte, and whether it ends."""
    keys = [key for key in client.scan_iter(count=1000) if not key.startswith(b"jobstack:")]
    return {key: (client.dump(key), client.ttl(key) == -1) for key in keys}


def test_results_without_a_ttl_end(run: Run, redis: Redis) -> None:
    old, old_without_zone = result(redis.client, 2 * HOUR), result(redis.client, 2 * HOUR, zone=False)
    young, unfinished = result(redis.client, HOUR / 2), result(redis.client, None)
    assert run(result_expires=3600) == {"deleted": 2, "expired": 2}
    assert not redis.client.exists(old, old_without_zone)
    for key in (young, unfinished):
        assert 3590 <= redis.client.ttl(key) <= 3600  # type: ignore[operator]
    before = snapshot(redis.client)
    assert run(result_expires=1000) == {}
    assert snapshot(redis.client) == before


def test_celerys_own_results_are_known_by_their_looks(run: Run, redis: Redis) -> None:
    """Written by the library itself, so that a new version that writes them otherwise is noticed."""
    backend: Any = celery_app.backend
    task_id, group_id = str(uuid4()), str(uuid4())
    backend.store_result(task_id, {"done": 1}, "SUCCESS")
    backend.save_group(group_id, celery_app.GroupResult(group_id, [celery_app.AsyncResult(task_id)]))
    chord = f"celery-taskset-meta-{uuid4()}"
    backend.set_chord_size(chord.removeprefix("celery-taskset-meta-"), 2)
    redis.client.incr(f"{chord}.t")
    redis.client.zadd(f"{chord}.j", {backend.encode([1, task_id, "SUCCESS", 5]): 0})
    keys = list(redis.client.scan_iter())
    assert len(keys) == 5
    for key in keys:
        redis.client.persist(key)
    assert run() == {"expired": 5}
    assert all(redis.client.ttl(key) > 3000 for key in keys)  # type: ignore[operator]


def test_other_peoples_keys_stay_byte_for_byte(run: Run, redis: Redis) -> None:
    client, some = redis.client, random.Random(1)
    id_ = str(uuid4())
    alike = [
        f"celery-task-meta-{id_}",
        f"celery-task-meta-{id_}.j",
        "celery-task-meta-",
        f"my:celery-task-meta-{id_}",
        f"celery-taskset-meta-{id_}",
        f"celery-taskset-meta-{id_}.j",
        f"celery-taskset-meta-{id_}.s",
        f"celery-taskset-meta-{id_}.backup",
        f"{id_}.reply.celery.pidbox",
        "customers.reply.celery.pidbox",
        "_kombu.binding.celery",
        "_kombu.binding.orders",
        "celery",
        "celeryev",
        "orders.j",
        "orders.s",
        "unacked",
        "unacked_index",
        "jobstack-of-somebody",
    ]
    writers: list[Callable[[str], Any]] = [
        lambda key: client.set(key, json.dumps({"status": "SUCCESS", "task_id": "another"})),
        lambda key: client.set(key, some.randbytes(50)),
        lambda key: client.set(key, 7) if not key.endswith(".s") else client.set(key, "7 apples"),
        lambda key: client.rpush(key, "a", some.randbytes(20), "{}"),
        lambda key: client.hset(key, mapping={"task_id": id_, "status": "SUCCESS"}),
        lambda key: client.sadd(key, "a", some.randbytes(20)),
        lambda key: client.zadd(key, {"a": 1, "b": 2}),
        lambda key: client.xadd(key, {"field": "value"}),
        lambda key: client.setbit(key, 7, 1),
    ]
    for number in range(300 - len(alike)):
        some.choice(writers)(f"{some.choice(['app', 'celery', 'session', 'kombu'])}:{number}")
    client.set(b"celery-task-meta-\xff\xfe", "not text")
    for key in alike:
        for write in some.sample(writers, 1):
            write(key)
    # Each look-alike with each type and content.
    for write in writers:
        for key in alike:
            client.delete(key)
            write(key)
        before = snapshot(client)
        for _ in range(2):
            assert run() == {}
            next_hour(redis)
        assert len(before) >= 300
        assert snapshot(client) == before


def test_what_is_unacknowledged_and_queued_stays(run: Run, redis: Redis) -> None:
    redis.client.hset("unacked", "tag", '[{"body": ""}, "", "default"]')
    redis.client.zadd("unacked_index", {"tag": 1})
    redis.client.lpush("default", "{}")
    before = snapshot(redis.client)
    run()
    next_hour(redis)
    run()
    left = snapshot(redis.client)
    assert {key: left[key] for key in before} == before


def hearing(redis: Redis) -> int:
    """How many workers hear commands: a moment after they are bound and alive. An empty message is none to them."""
    heard: int = redis.client.publish("/0.celery.pidbox", "")  # type: ignore[assignment]
    return heard


def test_replies_that_nobody_reads_end(run: Run, redis: Redis, start: Callable[..., Process]) -> None:
    """A worker answers a client that was killed while it waited."""
    start("worker")
    until(lambda: hearing(redis) == 1, "it listens")
    control: Any = celery_app.control
    with celery_app.connection_for_write() as connection:
        asking = control.mailbox(connection)
        asking._publish("ping", {}, reply_ticket=str(uuid4()), channel=connection.default_channel)
    [key] = until(lambda: list(redis.client.scan_iter("*.reply.celery.pidbox", _type="list")), "the worker has replied")
    assert redis.client.ttl(key) == -1
    assert run() == {"expired": 1}
    assert 50 <= redis.client.ttl(key) <= 60  # type: ignore[operator]
    next_hour(redis)
    assert run() == {"bindings": 1}
    assert not redis.client.exists("_kombu.binding.reply.celery.pidbox")


def test_bindings_of_dead_workers_go_and_the_living_answer(
    run: Run, redis: Redis, start: Callable[..., Process]
) -> None:
    key, separator = "_kombu.binding.celery.pidbox", "\x06\x16"
    living = start("worker")
    until(lambda: hearing(redis) == 1, "it listens")
    bound = redis.client.smembers(key)
    dead = start("worker-maintenance")
    until(lambda: hearing(redis) == 2, "both listen")
    redis.client.sadd("_kombu.binding.celeryev", f"#{separator}{separator}celeryev.of-a-flower-that-was-killed")
    assert run() == {}
    next_hour(redis)
    assert run() == {"bindings": 1}  # of the events; both workers live
    dead.kill()
    until(lambda: hearing(redis) == 1, "Redis has noticed")
    assert run() == {}  # one look in some minutes
    next_hour(redis)
    assert run() == {"bindings": 1}
    assert redis.client.smembers(key) == bound
    [answer] = celery_app.control.ping(timeout=10, limit=1) or []
    assert "pong" in str(answer), living.log
    next_hour(redis)
    assert run() == {}


def test_a_binding_is_looked_at_twice_before_it_goes(run: Run, redis: Redis) -> None:
    """A client that is just waiting for its replies."""
    key = "_kombu.binding.reply.celery.pidbox"
    redis.client.sadd(key, "first")
    assert run() == {}
    redis.client.sadd(key, "second")
    next_hour(redis)
    assert run() == {"bindings": 1}
    assert redis.client.smembers(key) == {b"second"}


def test_a_slice_goes_on_where_the_last_one_stopped(run: Run, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_slice, "SLICE_SECONDS", 0)
    monkeypatch.setattr(cleanup_celery_results, "SCAN_COUNT", 20)
    for _ in range(200):
        result(redis.client, 2 * HOUR)
    slices, deleted = 1, 0
    while "unfinished" in (done := run()):
        slices, deleted = slices + 1, deleted + done.get("deleted", 0)
    assert deleted == 200
    assert 5 < slices < 100


@pytest.fixture
def another_redis() -> Iterator[redis_library.Redis]:
    with redis_server() as server:
        yield server.client


def test_results_kept_elsewhere(
    run: Run,
    redis: Redis,
    another_redis: redis_library.Redis,
    settings: Settings,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CELERY_RESULT_BACKEND names another Redis: both are swept, in slices too."""
    connection = another_redis.connection_pool.connection_kwargs
    monkeypatch.setenv("CELERY_RESULT_BACKEND", f"redis://:secret@127.0.0.1:{connection['port']}/0")
    elsewhere = Settings()
    keys = [result(redis.client, 2 * HOUR), result(another_redis, 2 * HOUR)]
    done = cleanup_celery_results.run(database, redis.client, elsewhere)
    assert done == {"deleted": 2}
    assert not redis.client.exists(*keys)
    assert not another_redis.exists(*keys)
    monkeypatch.setattr(_slice, "SLICE_SECONDS", 0)
    keys = [result(redis.client, 2 * HOUR), result(another_redis, 2 * HOUR)]
    for _ in range(20):
        if "unfinished" not in cleanup_celery_results.run(database, redis.client, elsewhere):
            break
    else:
        pytest.fail("it never ends")
    assert not another_redis.exists(*keys)


def test_everything_it_writes_itself_expires(run: Run, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    redis.client.sadd("_kombu.binding.reply.celery.pidbox", "a")
    monkeypatch.setattr(_slice, "SLICE_SECONDS", 0)
    while "unfinished" in run():
        assert redis.client.ttl(cleanup_celery_results.POSITION_KEY) > 0  # type: ignore[operator]
    ours = list(redis.client.scan_iter("jobstack:*"))
    assert ours
    assert all(redis.client.ttl(key) > 0 for key in ours)  # type: ignore[operator]
