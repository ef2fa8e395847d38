"""Ticks as rows: each fires once and runs once, whatever happens to beat, Redis, the worker and the clocks.

Hours pass in milliseconds here: beat and the tasks ask the database for the time, and these tests own its `now()`.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from zoneinfo import ZoneInfo

import psycopg
import pytest
from psycopg.rows import DictRow

from app import ticks
from app.celery_app import celery_app
from app.database import Database
from app.jobs import messages
from app.queues import ALL_QUEUES, MAINTENANCE
from app.schedule import SCHEDULE, Entry
from app.settings import Settings, SettingsError
from beat.rounds import Beat
from tests.processes import ROOT
from tests.servers import Redis
from tests.waiting import until
from worker import housekeeping, maintenance

Connection = psycopg.Connection[DictRow]
START = datetime(2030, 1, 1, tzinfo=UTC)
OFTEN = Entry("often", timedelta(seconds=2), expires=timedelta(seconds=6))
HOURLY = Entry("hourly", "0 * * * *", expires=timedelta(seconds=60))


class Clock:
    """The database's time, for whoever connects while this exists."""

    def __init__(self, db: Connection) -> None:
        self._db = db
        self.set(START)

    def set(self, now: datetime) -> None:
        self.now = now
        self._db.execute("UPDATE clock.time SET now = %s", [now])

    def forward(self, seconds: float) -> None:
        self.set(self.now + timedelta(seconds=seconds))


@pytest.fixture
def clock(db: Connection, settings: Settings) -> Iterator[Clock]:
    name = psycopg.conninfo.conninfo_to_dict(settings.database_conninfo)["dbname"]
    db.execute(
        f"""CREATE SCHEMA clock; CREATE TABLE clock.time (now timestamptz); INSERT INTO clock.time VALUES (now());
        CREATE FUNCTION clock.now() RETURNS timestamptz LANGUAGE sql STABLE AS 'SELECT now FROM clock.time';
        ALTER DATABASE {name} SET search_path = clock, pg_catalog, public"""
    )
    yield Clock(db)
    db.execute(f"DROP SCHEMA clock CASCADE; ALTER DATABASE {name} RESET search_path")


@pytest.fixture
def beat(clock: Clock, settings: Settings, redis: Redis) -> Iterator[Callable[..., Beat]]:
    """beat(entry, ...) -> another beat with this schedule."""
    made: list[Beat] = []

    def make(*schedule: Entry) -> Beat:
        made.append(Beat(settings, schedule))
        return made[-1]

    yield make
    for each in made:
        each._database.close()


Run = Callable[..., Any]


@pytest.fixture
def run(clock: Clock, database: Database, redis: Redis, settings: Settings) -> Run:
    """run("often", due_at, function) -> what the worker's task returns; `function` stands in for the task's work."""

    def run(name: str, due_at: datetime | None, work: Callable[[], dict[str, Any]] = dict) -> dict[str, Any]:
        when = due_at.isoformat() if due_at else None
        return housekeeping.run(task(name, work), database, redis.client, settings, when)

    return run


def task(name: str, work: Callable[[], dict[str, Any]] = dict) -> Any:
    return SimpleNamespace(__name__=f"worker.maintenance.{name}", run=lambda *_: work())


def sent(redis: Redis) -> list[tuple[str, datetime]]:
    """(entry, due_at) of the messages that wait, the oldest first."""
    found: list[bytes] = redis.client.lrange(MAINTENANCE, 0, -1)  # type: ignore[assignment]
    return [told(message) for message in reversed(found)]


def told(message: bytes) -> tuple[str, datetime]:
    content = json.loads(message)
    [[due_at], _, _] = json.loads(b64decode(content["body"]))
    return content["headers"]["task"], datetime.fromisoformat(due_at)


def rows(db: Connection) -> list[DictRow]:
    return db.execute("SELECT * FROM schedule_ticks ORDER BY entry, due_at").fetchall()


def raises(error: Exception) -> Callable[[], dict[str, Any]]:
    def work() -> dict[str, Any]:
        raise error

    return work


# --- the schedule itself -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("environment")
def test_every_entry_has_a_task_a_queue_and_an_expiry() -> None:
    importlib.import_module("worker.tasks")
    known = {module.__name__.rpartition(".")[2] for module in maintenance.ALL}
    assert len({entry.task for entry in SCHEDULE}) == len(SCHEDULE)
    slow = {module.__name__.rpartition(".")[2] for module in maintenance.SLOW}
    assert slow <= {entry.task for entry in SCHEDULE} <= known <= set(celery_app.tasks)
    assert MAINTENANCE in ALL_QUEUES
    for entry in SCHEDULE:
        message = json.loads(messages.maintenance_message(entry.task))
        assert message["properties"]["delivery_info"]["routing_key"] == MAINTENANCE
        assert timedelta(seconds=5) <= entry.expires <= timedelta(minutes=10)
        assert isinstance(entry.when, timedelta) or len(entry.when.split()) == 5
        assert entry.latest(START, UTC) <= START


BERLIN = ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    ("cron", "day", "expected"),
    [
        # 29 March 2026: from 02:00 straight to 03:00, which is 01:00 UTC.
        ("30 2 * * *", datetime(2026, 3, 28, 23, tzinfo=UTC), ["03-28 01:30", "03-29 01:00", "03-30 00:30"]),
        ("30 3 * * *", datetime(2026, 3, 28, 23, tzinfo=UTC), ["03-28 02:30", "03-29 01:30", "03-30 01:30"]),
        # 25 October 2026: at 03:00, which is 01:00 UTC, the hour since 02:00 begins again.
        ("30 2 * * *", datetime(2026, 10, 24, 22, tzinfo=UTC), ["10-24 00:30", "10-25 00:30", "10-26 01:30"]),
    ],
)
def test_a_days_times_over_a_change_of_clocks(cron: str, day: datetime, expected: list[str]) -> None:
    """Once a day, and never back: a time that was seen must not be followed by an earlier one."""
    entry = Entry("x", cron, expires=timedelta(minutes=1))
    seen = [entry.latest(day + timedelta(minutes=minute), BERLIN) for minute in range(0, 28 * 60, 5)]
    assert seen == sorted(seen)
    assert list(dict.fromkeys(f"{time:%m-%d %H:%M}" for time in seen)) == expected


def test_hours_go_on_over_a_change_of_clocks() -> None:
    entry = Entry("x", "17 * * * *", expires=timedelta(minutes=1))
    for day in (datetime(2026, 3, 28, 20, 17, tzinfo=UTC), datetime(2026, 10, 24, 20, 17, tzinfo=UTC)):
        for hour in range(12):
            assert entry.latest(day + timedelta(hours=hour, minutes=59), BERLIN) == day + timedelta(hours=hour)


def test_rare_times_and_intervals() -> None:
    leap = Entry("x", "0 0 29 2 *", expires=timedelta(minutes=1))
    assert leap.latest(datetime(2027, 6, 1, tzinfo=UTC), UTC) == datetime(2024, 2, 29, tzinfo=UTC)
    assert OFTEN.latest(START + timedelta(seconds=3.9), UTC) == START + timedelta(seconds=2)
    assert OFTEN.latest(START, UTC) == START


def test_an_unknown_time_zone_is_refused(settings: Settings) -> None:
    for name in ("Europe/Nowhere", "../etc/passwd", "Europe"):
        with pytest.raises(SettingsError, match="SCHEDULE_TIMEZONE"):
            Beat(settings.model_copy(update={"schedule_timezone": name}))


# --- beat ----------------------------------------------------------------------------------------------------------


def test_three_beats_fire_each_tick_once(beat: Any, run: Run, clock: Clock, redis: Redis, db: Connection) -> None:
    beats = [beat(OFTEN, HOURLY) for _ in range(3)]
    fired = Counter[tuple[str, datetime]]()
    clock.forward(3599 - 40)
    for _ in range(40):
        together = [threading.Thread(target=each.round) for each in beats]
        for thread in together:
            thread.start()
        for thread in together:
            thread.join()
        for tick in sent(redis):
            fired[tick] += 1
            run(*tick)
        redis.client.delete(MAINTENANCE)
        clock.forward(2)
    assert set(fired.values()) == {1}
    assert Counter(entry for entry, _ in fired) == {"often": 40, "hourly": 2}
    # A frequent entry keeps one row, and every other its history, with results.
    assert Counter(row["entry"] for row in rows(db)) == {"often": 1, "hourly": 2}
    assert all(row["finished_at"] and row["result"] == {} for row in rows(db))


def test_a_beat_that_was_stopped_between_look_and_send_sends_nothing_old(
    beat: Any, run: Run, clock: Clock, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, other = beat(OFTEN), beat(OFTEN)

    def meanwhile(self: Beat) -> bool:
        monkeypatch.undo()
        for _ in range(2):
            other.round()
            run(*sent(redis)[-1])
            clock.forward(2)
        return True

    monkeypatch.setattr(Beat, "_is_room", meanwhile)
    stopped.round()
    assert sent(redis) == [("often", START), ("often", START + timedelta(seconds=2))]


KILLED = """
import os, signal, beat.rounds as rounds
from app.settings import get_settings
from tests.integration.test_schedule import HOURLY
rounds.messages.maintenance_message = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
rounds.Beat(get_settings(), [HOURLY]).round()
"""


def test_a_beat_killed_between_row_and_message(beat: Any, clock: Clock, redis: Redis, db: Connection) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED], cwd=ROOT, env=os.environ, check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert [row["sent_at"] for row in rows(db)] == [START]
    another = beat(HOURLY)
    clock.forward(59)
    another.round()
    assert sent(redis) == []
    clock.forward(2)
    for _ in range(3):
        another.round()
    assert sent(redis) == [("hourly", START)]


def test_redis_goes_at_the_moment_of_sending(
    beat: Any, redis: Redis, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = messages.maintenance_message

    def then_it_goes(*args: str) -> str:
        redis.stop()
        return message(*args)

    monkeypatch.setattr(messages, "maintenance_message", then_it_goes)
    sender = beat(HOURLY)
    try:
        with pytest.raises(messages.REDIS_ERRORS):
            sender.round()
        monkeypatch.undo()
        assert [row["sent_at"] for row in rows(db)] == [None]
        with pytest.raises(messages.REDIS_ERRORS):
            sender.round()
    finally:
        redis.start()
    sender.round()
    sender.round()
    assert sent(redis) == [("hourly", START)]


def test_redis_away_writes_no_tick(beat: Any, redis: Redis, db: Connection) -> None:
    sender = beat(OFTEN, HOURLY)
    redis.stop()
    try:
        with pytest.raises(messages.REDIS_ERRORS):
            sender.round()
        assert rows(db) == []
    finally:
        redis.start()


def test_what_an_empty_redis_lost_is_sent_again(beat: Any, clock: Clock, redis: Redis) -> None:
    """Within the patience, with which everything runs again 15 s after a FLUSHALL; not before, it may be on its way."""
    sender = beat(*SCHEDULE)
    sender.round()
    assert {entry for entry, _ in sent(redis)} == {entry.task for entry in SCHEDULE}
    redis.client.flushall()
    clock.forward(5)
    sender.round()
    assert sent(redis) == []
    clock.forward(2)
    sender.round()
    assert sent(redis) == [("enqueue_pending_jobs", START)]
    clock.forward(6)
    sender.round()
    assert ("cleanup_orphaned_jobs", START) in sent(redis)
    clock.forward(50)
    sender.round()
    assert {entry for entry, _ in sent(redis)} == {entry.task for entry in SCHEDULE}


def test_missed_ticks_fire_once(beat: Any, run: Run, clock: Clock, redis: Redis) -> None:
    for entry in (HOURLY, OFTEN):
        beat(entry).round()
        run(*sent(redis)[-1])
    redis.client.delete(MAINTENANCE)
    clock.forward(5 * 3600 + 7)
    for _ in range(5):
        beat(HOURLY, OFTEN).round()
    expected = {("hourly", START + timedelta(hours=5)), ("often", START + timedelta(hours=5, seconds=6))}
    assert set(sent(redis)) == expected
    assert len(sent(redis)) == 2


def test_restarts_neither_lose_nor_double(beat: Any, run: Run, clock: Clock, redis: Redis, db: Connection) -> None:
    """A deploy every hour for two days, each time in another minute."""
    fired: list[tuple[str, datetime]] = []
    sender = beat(HOURLY)
    for minute in range(48 * 60):
        if minute % 61 == 60:
            sender._database.close()
            sender = beat(HOURLY)
        sender.round()
        for tick in sent(redis):
            fired.append(tick)
            run(*tick)
        redis.client.delete(MAINTENANCE)
        clock.forward(60)
    assert fired == [("hourly", START + timedelta(hours=hour)) for hour in range(48)]


def test_a_slow_worker_does_not_starve_a_frequent_entry(beat: Any, run: Run, clock: Clock, redis: Redis) -> None:
    """Each message waits for 20 s, longer than its tick's patience: were ticks replaced, none would ever run."""
    sender, runs = beat(OFTEN), 0
    waiting: list[tuple[datetime, tuple[str, datetime]]] = []

    def work() -> dict[str, Any]:
        nonlocal runs
        runs += 1
        return {}

    for _ in range(150):
        sender.round()
        waiting += [(clock.now, tick) for tick in sent(redis)]
        redis.client.delete(MAINTENANCE)
        while waiting and waiting[0][0] <= clock.now - timedelta(seconds=20):
            run(*waiting.pop(0)[1], work)
        clock.forward(2)
    assert runs >= 300 / 26


def test_a_frequent_run_that_takes_longer_is_not_doubled(beat: Any, run: Run, clock: Clock, redis: Redis) -> None:
    sender = beat(OFTEN)
    assert sender.round() == 2

    def work() -> dict[str, Any]:
        clock.forward(5)
        assert sender.round() == 0.5  # the next one is due already: looked at sooner
        return {}

    run("often", START, work)
    assert sent(redis) == [("often", START)]
    assert sender.round() == 1
    assert sent(redis)[1:] == [("often", START + timedelta(seconds=4))]


def test_nobody_consumes_for_an_hour(beat: Any, clock: Clock, redis: Redis) -> None:
    senders = [beat(*SCHEDULE) for _ in range(2)]
    for _ in range(1800):
        for sender in senders:
            sender.round()
        clock.forward(2)
    # One message an entry and patience, and none beyond the limit.
    assert redis.length(MAINTENANCE) <= messages.MOST_MAINTENANCE + len(SCHEDULE)
    assert redis.client.memory_usage(MAINTENANCE) < 200_000  # type: ignore[operator]


def test_a_tick_does_not_depend_on_a_machines_clock(beat: Any, redis: Redis) -> None:
    """A worker whose clock is off by ten minutes would drop messages that expire, or hold back those with an ETA."""
    beat(OFTEN, HOURLY).round()
    found: list[bytes] = redis.client.lrange(MAINTENANCE, 0, -1)  # type: ignore[assignment]
    assert len(found) == 2
    for message in map(json.loads, found):
        assert (message["headers"]["expires"], message["headers"]["eta"]) == (None, None)


def test_the_databases_clock_is_set_back(beat: Any, run: Run, clock: Clock, redis: Redis, db: Connection) -> None:
    """As after a move to a standby: what is ahead of its time must not stop the schedule until then."""
    sender = beat(OFTEN)
    clock.forward(600)
    sender.round()
    run(*sent(redis)[-1])
    clock.set(START)
    for seconds in (0, 2, 4):
        sender.round()
        tick = sent(redis)[-1]
        assert tick == ("often", START + timedelta(seconds=seconds))
        assert run(*tick, lambda: {"ran": 1}) == {"ran": 1}
        clock.forward(2)
    assert len(rows(db)) == 1


# --- worker --------------------------------------------------------------------------------------------------------


def test_copies_of_a_message_run_once(beat: Any, run: Run, clock: Clock, settings: Settings, redis: Redis) -> None:
    """Those that come while it runs, and those that come later."""
    beat(HOURLY).round()
    [(entry, due_at)] = sent(redis)
    refused: list[dict[str, Any]] = []

    def work() -> dict[str, Any]:
        until(lambda: len(refused) == 7, "the others were refused", seconds=10)
        return {"ran": 1}

    def consume() -> None:
        database = Database(settings, "test")
        done = housekeeping.run(task(entry, work), database, redis.client, settings, due_at.isoformat())
        (ran if done else refused).append(done)
        database.close()

    ran: list[dict[str, Any]] = []
    threads = [threading.Thread(target=consume) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ran == [{"ran": 1}]
    clock.forward(ticks.LOST_SECONDS + 1)
    assert run(entry, due_at, lambda: {"ran": 2}) == {}


def test_a_replaced_or_unknown_tick_does_not_run(beat: Any, run: Run, clock: Clock, redis: Redis) -> None:
    sender = beat(HOURLY)
    sender.round()
    clock.forward(3600)
    sender.round()
    [(_, old), (_, new)] = sent(redis)
    assert run("hourly", old, lambda: {"ran": 1}) == {}
    assert run("hourly", new, lambda: {"ran": 1}) == {"ran": 1}
    assert run("nothing", new, lambda: {"ran": 1}) == {}


def test_a_failed_run_is_tried_again(beat: Any, run: Run, clock: Clock, redis: Redis, db: Connection) -> None:
    sender = beat(HOURLY)
    sender.round()
    with pytest.raises(ConnectionError):
        run("hourly", START, raises(ConnectionError("no Redis")))
    [row] = rows(db)
    assert (row["error"], row["finished_at"]) == ("ConnectionError: no Redis", None)
    clock.forward(59)
    sender.round()
    assert len(sent(redis)) == 1
    clock.forward(2)
    sender.round()
    assert sent(redis) == [("hourly", START)] * 2
    assert run("hourly", START, lambda: {"ran": 1}) == {"ran": 1}
    [row] = rows(db)
    assert (row["error"], row["result"]) == (None, {"ran": 1})


def test_a_child_that_died_while_it_ran(beat: Any, run: Run, clock: Clock, redis: Redis, db: Connection) -> None:
    """A rare entry's same tick runs again, a frequent one's next."""
    sender = beat(HOURLY, OFTEN)
    sender.round()
    db.execute("UPDATE schedule_ticks SET started_at = %s", [clock.now])
    redis.client.delete(MAINTENANCE)
    clock.forward(7)
    sender.round()
    [(entry, due_at)] = sent(redis)
    assert (entry, due_at) == ("often", START + timedelta(seconds=6))
    assert run(entry, due_at, lambda: {"ran": 1}) == {"ran": 1}
    # Not before its hard limit is over for sure: it may only be slow.
    clock.forward(60)
    sender.round()
    assert run("hourly", START, lambda: {"ran": 1}) == {}
    clock.forward(ticks.LOST_SECONDS)
    sender.round()
    assert sent(redis)[-1] == ("hourly", START) or sent(redis)[-2] == ("hourly", START)
    assert run("hourly", START, lambda: {"ran": 1}) == {"ran": 1}


def test_a_run_that_was_taken_over_writes_nothing(beat: Any, run: Run, clock: Clock, db: Connection) -> None:
    beat(HOURLY).round()

    def too_long() -> dict[str, Any]:
        clock.forward(ticks.LOST_SECONDS + 1)
        assert run("hourly", START, lambda: {"run": 2}) == {"run": 2}
        return {"run": 1}

    run("hourly", START, too_long)
    assert [row["result"] for row in rows(db)] == [{"run": 2}]


def test_an_unfinished_slice_goes_on_at_once(beat: Any, run: Run, clock: Clock, redis: Redis, db: Connection) -> None:
    sender = beat(HOURLY)
    for slices in range(1, 4):
        sender.round()
        assert len(sent(redis)) == slices
        clock.forward(2)
        run("hourly", START, lambda: {"deleted": 5, "unfinished": True})
    sender.round()
    run("hourly", START, lambda: {"deleted": 1})
    [row] = rows(db)
    assert row["finished_at"] == clock.now
    clock.forward(120)
    sender.round()
    assert len(sent(redis)) == 4


def test_by_hand_it_needs_no_tick(run: Run, db: Connection) -> None:
    assert run("hourly", None, lambda: {"ran": 1}) == {"ran": 1}
    assert rows(db) == []


def test_long_tasks_run_one_at_a_time(
    beat: Any, run: Run, clock: Clock, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Both:
        def __contains__(self, module: Any) -> bool:
            return bool(module.__name__.endswith(("hourly", "daily")))

    monkeypatch.setattr(maintenance, "SLOW", Both())
    daily = Entry("daily", "0 0 * * *", expires=timedelta(seconds=60))
    sender = beat(HOURLY, daily)
    sender.round()
    seen: list[Any] = []

    def work() -> dict[str, Any]:
        assert 0 < redis.client.ttl(housekeeping.SLOW_KEY) <= housekeeping.SLOW_SECONDS  # type: ignore[operator]
        seen.append(run("daily", START, lambda: {"ran": "too early"}))
        seen.append(run("daily", None, lambda: {"ran": "too early"}))
        seen.append(run("quick", None, lambda: {"ran": "beside it"}))
        return {"ran": 1}

    assert run("hourly", START, work) == {"ran": 1}
    assert seen == [{}, {"skipped": "another long task is running"}, {"ran": "beside it"}]
    # Its turn comes with the next round.
    clock.forward(2)
    sender.round()
    assert sent(redis)[2:] == [("daily", START)]
    assert run("daily", START, lambda: {"ran": 1}) == {"ran": 1}
    assert not redis.client.exists(housekeeping.SLOW_KEY)


def test_what_deletes_waits_until_the_clocks_agree(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    module = task("hourly", lambda: {"ran": 1})
    monkeypatch.setattr(maintenance, "SLOW", (module,))
    monkeypatch.setattr(sys.modules[__name__], "task", lambda *_: module)
    assert run("hourly", None) == {"ran": 1}
    monkeypatch.setattr(housekeeping, "time", SimpleNamespace(time=lambda: time.time() + 7200))
    assert "clocks" in run("hourly", None)["skipped"]


def test_a_long_task_gives_back_only_what_is_its_own(run: Run, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    module = task("hourly", lambda: {"was": redis.client.set(housekeeping.SLOW_KEY, "another's")})
    monkeypatch.setattr(maintenance, "SLOW", (module,))
    monkeypatch.setattr(sys.modules[__name__], "task", lambda *_: module)
    run("hourly", None)
    assert redis.client.get(housekeeping.SLOW_KEY) == b"another's"
    # And after an error it is free all the same.
    redis.client.delete(housekeeping.SLOW_KEY)
    module.run = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run("hourly", None)
    assert not redis.client.exists(housekeeping.SLOW_KEY)
