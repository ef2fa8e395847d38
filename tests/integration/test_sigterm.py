"""A worker that is told to stop: short jobs end, long ones are handed back, nothing is lost, no attempt is counted."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.database import Database
from app.jobs.dispatch import dispatch
from app.settings import Settings
from tests import processes
from tests.integration.conftest import QUICK, Jobs, log_lines
from tests.processes import Process
from tests.servers import Postgres, Redis
from tests.waiting import until

Start = Callable[..., Process]
GRACE = 12  # long jobs are handed back after 6 s, stubborn ones put back after 9
LATE = 4.5  # seconds that a busy machine may add


def to_the_parent(worker: Process) -> None:
    worker.terminate()


def twice(worker: Process) -> None:
    worker.terminate()
    time.sleep(LATE + 0.5)  # a clock that began again would now be late
    worker.terminate()


def to_the_whole_service(worker: Process) -> None:
    for child in worker.children():
        child.terminate()
    worker.terminate()


def ctrl_c(worker: Process) -> None:
    for process in (*worker.children(), worker.process):
        process.send_signal(signal.SIGINT)


@pytest.mark.parametrize("stop", [to_the_parent, twice, to_the_whole_service, ctrl_c])
def test_a_busy_worker(
    stop: Callable[[Process], None],
    start: Start,
    jobs: Jobs,
    redis: Redis,
    database: Database,
    settings: Settings,
) -> None:
    worker = start("odd", WORKER_CONCURRENCY=3, SHUTDOWN_GRACE_SECONDS=GRACE, **QUICK)
    short = jobs.start("sleep", {"seconds": 4, "steps": 100})
    long = jobs.start("sleep", {"seconds": 120, "steps": 1000})
    stubborn = jobs.start("odd", {"do": "never look", "seconds": 60})
    for job_id in (short, long, stubborn):
        jobs.running(job_id)
    late = [jobs.start() for _ in range(5)]  # all children are busy
    begin = time.monotonic()
    stop(worker)

    job = jobs.until(long, lambda row: row["status"] == "queued", "it is handed back", seconds=GRACE)
    assert GRACE / 2 - 0.5 < time.monotonic() - begin < GRACE / 2 + LATE
    assert (job["attempt"], job["published_at"]) == (0, None)
    assert job["progress"]["current"] > 1
    job = jobs.get(short)
    assert (job["status"], job["attempt"]) == ("succeeded", 1)
    assert worker.wait(GRACE) == 0
    assert GRACE * 3 / 4 - 0.5 < time.monotonic() - begin < GRACE * 3 / 4 + LATE
    job = jobs.get(stubborn)
    assert (job["status"], job["attempt"], job["error"]) == ("queued", 0, None)

    for job_id in late:
        job = jobs.get(job_id)
        assert (job["status"], job["attempt"]) == ("queued", 0)
    assert redis.length("default") >= len(late)
    assert [jobs.attempts(job_id) for job_id in (short, long, stubborn, *late)] == [[]] * 8

    start("odd", WORKER_CONCURRENCY=3, **QUICK)
    assert dispatch(database, redis.client, settings)["published"] == 2
    for job_id in (long, stubborn):
        jobs.running(job_id)
    for job_id in late:
        assert jobs.finished(job_id)["attempt"] == 1
    lines = log_lines(worker)
    assert not [line for line in lines if "exception" in line], worker.log
    assert [line["handed_back"] for line in lines if line["message"] == "grace_is_over"] == [1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_idle_worker_ends_at_once(number: signal.Signals, start: Start, redis: Redis) -> None:
    worker = start("worker", SHUTDOWN_GRACE_SECONDS=60)
    begin = time.monotonic()
    worker.process.send_signal(number)
    assert worker.wait(20) == 0
    assert time.monotonic() - begin < 15  # of 60
    assert not [line for line in log_lines(worker) if line["level"] != "info"], worker.log


@pytest.mark.parametrize("signals", [[signal.SIGINT, signal.SIGINT], [signal.SIGQUIT]], ids=["Ctrl-C twice", "SIGQUIT"])
def test_an_impatient_person(signals: list[int], start: Start, jobs: Jobs) -> None:
    """Running jobs are put back at once, uncounted."""
    worker = start("odd", SHUTDOWN_GRACE_SECONDS=60, **QUICK)
    running = [jobs.start("odd", {"do": do, "seconds": 60}) for do in ("never look", "wait")]
    for job_id in running:
        jobs.running(job_id)
    for number in signals:
        worker.process.send_signal(number)
        time.sleep(0.5)
    worker.wait(20)
    for job_id in running:
        job = jobs.get(job_id)
        assert (job["status"], job["attempt"], job["error"]) == ("queued", 0, None), worker.log
        assert jobs.attempts(job_id) == []


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("away", ["Redis stopped", "Redis frozen", "PostgreSQL stopped"])
def test_while_something_is_away(
    away: str, busy: bool, start: Start, jobs: Jobs, redis: Redis, postgres: Postgres
) -> None:
    worker = start("worker", SHUTDOWN_GRACE_SECONDS=GRACE, **QUICK)
    sleeps = [{"seconds": 5, "steps": 10}, {"seconds": 120, "steps": 1000}] if busy else []
    running = [jobs.start("sleep", payload) for payload in sleeps]
    for job_id in running:
        jobs.running(job_id)
    go, come = {
        "Redis stopped": (redis.stop, redis.start),
        "Redis frozen": (redis.freeze, redis.thaw),
        "PostgreSQL stopped": (postgres.stop, postgres.start),
    }[away]
    go()
    try:
        time.sleep(1)  # in the middle of the trouble
        worker.terminate()
        assert worker.wait(GRACE + LATE) == 0, worker.log
    finally:
        come()
    short, long = map(jobs.get, running) if busy else (None, None)
    if short and long and "Redis" in away:
        assert (short["status"], short["attempt"]) == ("succeeded", 1)
        assert (long["status"], long["attempt"]) == ("queued", 0)
    elif short and long:
        # What could not be written is left to the leases.
        assert (short["status"], long["status"]) == ("running", "running")
    assert [jobs.attempts(job_id) for job_id in running] == [[] for _ in running]


def test_before_redis_answered(start: Start, redis: Redis, tmp_path: Path) -> None:
    redis.stop()
    try:
        with processes.running("worker", tmp_path) as worker:
            until(lambda: "Connection refused" in worker.log, "the worker waits for Redis")
            worker.terminate()
            assert worker.wait(20) == 0, worker.log
    finally:
        redis.start()
