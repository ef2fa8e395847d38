"""From rows to messages: the window, the order, and the repair of what got lost."""

import json
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.rows import DictRow

from app.database import Database
from app.jobs import dispatch, messages
from app.queues import JOB_QUEUES
from app.settings import Settings
from tests.integration.conftest import Jobs
from tests.servers import Redis
from tests.waiting import until
from worker.runner import Runner

Connection = psycopg.Connection[DictRow]


def waiting(redis: Redis, queue: str = "default") -> list[UUID | None]:
    """The jobs whose messages wait in Redis, the next one first."""
    found: list[bytes] = redis.client.lrange(queue, 0, -1)  # type: ignore[assignment]
    return [messages.job_id_of(message) for message in reversed(found)]


@pytest.fixture
def tick(database: Database, redis: Redis, settings: Settings) -> Callable[..., dict[str, int]]:
    """tick(queue_window=5) -> what one run of dispatch did."""
    # A worker that an earlier test killed may still stand in line for messages, until Redis hears of its end.
    redis.client.client_kill_filter(_type="normal")

    def run(**changes: Any) -> dict[str, int]:
        return dispatch.dispatch(database, redis.client, settings.model_copy(update=changes))

    return run


def settle(db: Connection) -> None:
    """As if the messages had been sent longer ago than one may be on its way."""
    db.execute("UPDATE jobs SET published_at = published_at - interval '11 seconds'")


def test_a_due_row_gets_one_message(jobs: Jobs, redis: Redis, tick: Callable[..., dict[str, int]]) -> None:
    job_id = jobs.insert()
    assert tick() == {"published": 1}
    assert tick() == {}
    assert waiting(redis) == [job_id]


def test_a_row_is_not_published_before_its_time(db: Connection, jobs: Jobs, redis: Redis, tick: Any) -> None:
    later = jobs.insert(run_at="2100-01-01")
    assert tick() == {}
    db.execute("UPDATE jobs SET run_at = now() WHERE id = %s", [later])
    assert tick() == {"published": 1}
    assert waiting(redis) == [later]


def test_a_window_bounds_each_queue_and_the_oldest_go_first(
    runner: Runner, jobs: Jobs, redis: Redis, tick: Any
) -> None:
    """Redis's memory does not depend on the backlog."""
    order = [jobs.insert(run_at=f"2020-01-01 00:00:{59 - number}+00") for number in range(12)][::-1]
    other = jobs.insert(queue="low_priority", priority="low")
    assert tick(queue_window=5) == {"published": 6}
    assert waiting(redis) == order[:5]
    assert waiting(redis, "low_priority") == [other]
    assert tick(queue_window=5) == {}
    # Two were taken by a worker.
    assert [messages.job_id_of(redis.client.rpop("default")) for _ in range(2)] == order[:2]  # type: ignore[arg-type]
    for taken in order[:2]:
        assert runner.claim(taken)
    assert tick(queue_window=5) == {"published": 2}
    assert waiting(redis) == order[2:7]


def test_lost_messages_are_sent_again_and_present_ones_are_not(
    db: Connection, jobs: Jobs, redis: Redis, tick: Any
) -> None:
    lost = [jobs.insert() for _ in range(20)]
    tick()
    redis.client.flushall()
    kept = [jobs.insert() for _ in range(10)]
    tick()
    settle(db)
    assert tick() == {"repaired": 20}
    assert Counter(waiting(redis)) == Counter(lost + kept)
    assert tick() == {}


def test_duplicates_do_not_hide_losses(db: Connection, jobs: Jobs, redis: Redis, tick: Any) -> None:
    """100 messages for 100 rows, but for the wrong ones: only the ids can tell."""
    kept, lost = jobs.insert(), [jobs.insert() for _ in range(99)]
    tick()
    redis.client.delete("default")
    jobs.send(*[kept] * 100)
    settle(db)
    redis.client.set(dispatch.CHECKED_KEY, 1)  # looked at lately: the counts agree, so nothing is noticed yet
    assert tick() == {}
    redis.client.delete(dispatch.CHECKED_KEY)  # a minute later
    assert tick() == {"repaired": 99}
    assert set(waiting(redis)) == {kept, *lost}


def test_a_publish_in_flight_is_no_loss(db: Connection, jobs: Jobs, redis: Redis, tick: Any) -> None:
    """Its message may be on the way from a publisher that is slow just now."""
    jobs.insert(published_at="now()")
    assert tick() == {}
    settle(db)
    assert tick() == {"repaired": 1}


def test_what_a_worker_holds_unacknowledged_does_not_count_as_present(
    db: Connection, jobs: Jobs, redis: Redis, tick: Any
) -> None:
    """The worker may be dead; if it isn't, the copy finds the row claimed."""
    jobs.insert()
    tick()
    message = redis.client.rpop("default")
    redis.client.hset("unacked", "tag", json.dumps([json.loads(message), "", "default"]))  # type: ignore[arg-type]
    settle(db)
    assert tick() == {"repaired": 1}


LEASE = {"lease_token": uuid4(), "lease_expires_at": "2100-01-01"}
OVER = {"finished_at": "now()", "result": "{}", "error": "{}"}


@pytest.mark.parametrize(
    ("status", "columns"), [("running", LEASE), ("succeeded", OVER), ("failed", OVER), ("cancelled", OVER)]
)
def test_only_queued_rows_are_published(
    status: str, columns: dict[str, Any], jobs: Jobs, redis: Redis, tick: Any
) -> None:
    jobs.insert(status=status, **columns)
    assert tick() == {}
    assert waiting(redis) == []


def test_redis_away_marks_nothing_as_published(db: Connection, jobs: Jobs, redis: Redis, tick: Any) -> None:
    job_id = jobs.insert()
    redis.stop()
    try:
        with pytest.raises(messages.REDIS_ERRORS):
            tick()
    finally:
        redis.start()
    assert jobs.get(job_id)["published_at"] is None
    assert tick() == {"published": 1}


def test_many_dispatchers_at_once_publish_each_row_once(jobs: Jobs, redis: Redis, settings: Settings) -> None:
    expected = {jobs.insert() for _ in range(300)}
    start = threading.Barrier(5, timeout=60)

    def run() -> None:
        database = Database(settings, "test")
        start.wait()
        dispatch.dispatch(database, redis.client, settings)
        database.close()

    threads = [threading.Thread(target=run) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(waiting(redis)) == 300
    assert set(waiting(redis)) == expected


def test_an_idle_tick_is_two_short_queries(settings: Settings, db: Connection, redis: Redis) -> None:
    seen: list[str] = []

    class Counting(Database):
        def run(self, statement: Any, params: Any = None, *, once: bool = False) -> list[DictRow]:
            seen.append(statement)
            return super().run(statement, params, once=once)

    database = Counting(settings, "test")
    assert dispatch.dispatch(database, redis.client, settings) == {}
    database.close()
    assert len(seen) == 2


def test_topping_up_waits_for_room_and_is_done_by_one(
    jobs: Jobs, redis: Redis, database: Database, settings: Settings, tick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = settings.model_copy(update={"queue_window": 4})
    for _ in range(6):
        jobs.insert()
    tick(queue_window=4)
    assert dispatch.top_up(database, redis.client, small) == 0  # the window is full, and nobody takes anything
    redis.client.set(dispatch.TOPPING_UP_KEY, 1)
    # Somebody else is at it: it looks no second time.
    monkeypatch.setattr(dispatch, "LOOK_SECONDS", "never")
    assert dispatch.top_up(database, redis.client, small) == 0


@pytest.mark.timeout(180)
def test_a_backlog_far_over_the_window_drains_without_waiting_for_ticks(
    db: Connection, jobs: Jobs, start: Callable[..., Any]
) -> None:
    """40 windows; by beat's ticks alone that would take 80 s."""
    db.execute(
        """INSERT INTO jobs (id, kind, priority, queue, payload, max_attempts)
        SELECT gen_random_uuid(), 'flaky', 'default', 'default', '{"failures": 0}', 4 FROM generate_series(1, 400)"""
    )
    for name in ("worker", "worker-maintenance", "beat"):
        start(name, QUEUE_WINDOW=10)

    def left() -> int:
        row = db.execute("SELECT count(*) AS jobs FROM jobs WHERE status <> 'succeeded'").fetchone()
        assert row is not None
        return int(row["jobs"])

    until(lambda: left() == 0, "the backlog is drained", seconds=60)


def test_all_is_lost_and_runs_again(db: Connection, redis: Redis, jobs: Jobs, start: Callable[..., Any]) -> None:
    """Redis comes back without data, under a worker that nobody restarts."""
    for name in ("worker", "worker-maintenance", "beat"):
        start(name)
    job_ids = [jobs.insert(queue=queue) for queue in JOB_QUEUES for _ in range(10)]
    running = jobs.insert("sleep", {"seconds": 4})
    jobs.running(running)
    redis.stop()
    redis.start()
    for job_id in [*job_ids, running]:
        row = jobs.finished(job_id, seconds=60)
        assert row["status"] == "succeeded"
        assert row["attempt"] == 1


def test_at_most_one_wake_up_waits(redis: Redis, settings: Settings) -> None:
    for _ in range(5):
        dispatch.wake(redis.client, settings, ["default"])
    [message] = redis.client.lrange("default", 0, -1)  # type: ignore[misc]
    assert json.loads(message)["headers"]["task"] == "run_short_jobs"
    redis.client.delete(messages.wake_key("default"))  # taken by a worker that found nothing to do with it
    dispatch.wake(redis.client, settings, ["default"])
    assert redis.client.llen("default") == 2
    # Nobody consumes: what has piled up is bounded, above the window so that a full one does not shut them out.
    redis.client.lpush("default", *["x"] * (settings.queue_window * messages.MOST_WINDOWS))
    redis.client.delete(messages.wake_key("default"))
    full = redis.client.llen("default")
    dispatch.wake(redis.client, settings, ["default"])
    assert redis.client.llen("default") == full
