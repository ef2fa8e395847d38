"""A worker consumes again after every fault of Redis and of the network, says so truthfully, or ends itself."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psutil
import pytest

from app.database import Database
from app.jobs import messages
from app.jobs.dispatch import dispatch
from app.settings import Settings
from tests import processes
from tests.integration.conftest import QUICK, Jobs, events, log_lines
from tests.processes import ROOT, Process
from tests.proxy import proxy
from tests.servers import Postgres, Redis
from tests.waiting import until

pytestmark = pytest.mark.slow

Start = Callable[..., Process]
LONG: dict[str, Any] = {"seconds": 120, "steps": 1000}


def healthy(worker: Process) -> bool:
    """What `python -m worker.health` says."""
    env = {**os.environ, "JOBSTACK_RUN_DIR": str(worker.folder)}
    check = subprocess.run([sys.executable, "-m", "worker.health"], cwd=ROOT, env=env, capture_output=True, check=False)
    assert check.returncode in (0, 1), check.stderr
    return check.returncode == 0


def touched(worker: Process) -> float:
    return (worker.folder / "jobstack-worker.alive").stat().st_mtime


def port_of(redis: Redis) -> int:
    return int(redis.url.rpartition(":")[2].partition("/")[0])


@pytest.fixture
def consumes(jobs: Jobs, redis: Redis, database: Database, settings: Settings) -> Callable[..., None]:
    """consumes(): a job that comes now is run, or this one, by whatever worker there is."""

    def check(seconds: float = 60, job_id: UUID | None = None) -> None:
        job_id = job_id or jobs.insert()

        def done() -> bool:
            # A message may go with the connection that asked for it; dispatch then sends another.
            dispatch(database, redis.client, settings)
            return bool(jobs.get(job_id)["status"] == "succeeded")

        until(done, "a new job is done", seconds=seconds)
        assert jobs.get(job_id)["attempt"] == 1

    return check


@pytest.mark.parametrize("busy", [0, 1, 2])
def test_a_connection_that_dies_in_silence(
    busy: int, start: Start, jobs: Jobs, redis: Redis, consumes: Callable[..., None]
) -> None:
    """Idle, with a child to spare, and with none. Celery 5.6.3 would wait for 100 s and longer."""
    with proxy(port_of(redis)) as network:
        worker = start("worker", REDIS_URL=redis.url.replace(str(port_of(redis)), str(network.port)), **QUICK)
        running = [jobs.start("sleep", {"seconds": 8, "steps": 80}) for _ in range(busy)]
        for job_id in running:
            jobs.running(job_id)
        network.cut()
        # In the last case it heals after Redis could be told nothing about the messages that were done.
        noticed = "redis_away" if busy == 2 else "redis_lost"
        until(lambda: events(worker, noticed), "the worker has noticed", seconds=60)
        network.heal()
        consumes(40)
        for job_id in running:
            job = jobs.finished(job_id)
            assert (job["status"], job["attempt"]) == ("succeeded", 1)
        assert worker.process.poll() is None
        assert not [line for line in log_lines(worker) if "exception" in line], worker.log


def test_connections_that_are_closed_again_and_again(
    start: Start, jobs: Jobs, redis: Redis, consumes: Callable[..., None]
) -> None:
    worker = start("worker", **QUICK)
    long = jobs.start("sleep", LONG)
    jobs.running(long)
    for _ in range(10):
        redis.client.client_kill_filter(_type="normal", skipme=True)
        redis.client.client_kill_filter(_type="pubsub")
        time.sleep(2)  # the fault itself
    consumes()
    assert jobs.get(long)["attempt"] == 1
    assert worker.process.poll() is None
    assert healthy(worker)


def test_redis_is_away_for_long(start: Start, jobs: Jobs, redis: Redis, consumes: Callable[..., None]) -> None:
    """Unhealthy then, but alive: nobody could do better, and its jobs run on."""
    worker = start("worker", **QUICK)
    long = jobs.start("sleep", LONG)
    jobs.running(long)
    assert healthy(worker)
    redis.stop()
    try:
        until(lambda: not healthy(worker), "the worker is unhealthy", seconds=60)
    finally:
        redis.start()
    consumes(15)
    until(lambda: healthy(worker), "the worker is healthy")
    job = jobs.get(long)
    assert (job["status"], job["attempt"]) == ("running", 1)
    assert worker.process.poll() is None


def test_redis_is_full(start: Start, jobs: Jobs, redis: Redis, consumes: Callable[..., None]) -> None:
    """It still gives messages away but takes no note of them, which ends a worker of Celery's."""
    worker = start("worker", **QUICK)
    long = jobs.start("sleep", LONG)
    jobs.running(long)
    waiting = [jobs.insert(published_at="now()") for _ in range(4)]
    redis.client.lpush("bulk", *["x" * 1000] * 3000)
    redis.client.config_set("maxmemory-policy", "noeviction")
    jobs.send(*waiting)
    redis.client.config_set("maxmemory", "2mb")
    try:
        redis.client.client_kill_filter(_type="normal", skipme=True)
        until(lambda: events(worker, "redis_refuses"), "the worker has noticed")
        time.sleep(3)  # it goes on like this for a while
        assert worker.process.poll() is None
    finally:
        redis.client.config_set("maxmemory", 0)
        redis.client.delete("bulk")
    consumes()
    for job_id in waiting:
        consumes(40, job_id)
    job = jobs.get(long)
    assert (job["status"], job["attempt"]) == ("running", 1)
    assert worker.process.poll() is None


def test_a_busy_worker_is_alive(start: Start, jobs: Jobs) -> None:
    worker = start("worker", **QUICK)
    for job_id in [jobs.start("sleep", LONG) for _ in range(2)]:
        jobs.running(job_id)
    since = time.time() + 10
    until(lambda: touched(worker) > since, "it says that it is alive")
    assert healthy(worker)


def test_without_postgresql_a_worker_is_alive(
    start: Start, jobs: Jobs, postgres: Postgres, consumes: Callable[..., None]
) -> None:
    worker = start("worker", **QUICK)
    job_id = jobs.insert()
    row = jobs.get(job_id)
    postgres.stop()
    try:
        jobs.send_rows(row)
        since = time.time() + 10
        until(lambda: touched(worker) > since, "it says that it is alive")
    finally:
        postgres.start()
    consumes(job_id=job_id)


@pytest.fixture
def faulty(tmp_path: Path, redis: Redis, db: object) -> Any:
    def begin(fault: str) -> Any:
        return processes.running("tests.integration.faulty", tmp_path, "worker", FAULT=fault, **QUICK)

    return begin


@pytest.mark.parametrize("busy", [0, 1, 2])
def test_redis_freezes(busy: int, faulty: Any, jobs: Jobs, redis: Redis, consumes: Callable[..., None]) -> None:
    """For longer than this worker allows itself to do nothing."""
    with faulty("stuck") as worker:
        running = [jobs.start("sleep", {"seconds": 40, "steps": 400}) for _ in range(busy)]
        for job_id in running:
            jobs.running(job_id)
        redis.freeze()
        try:
            time.sleep(50)  # the fault itself
            assert worker.process.poll() is None, worker.log
        finally:
            redis.thaw()
        if busy < 2:
            assert events(worker, "redis_lost")
        consumes()
        for job_id in running:
            assert jobs.finished(job_id)["attempt"] == 1
        assert worker.process.poll() is None


def test_a_worker_that_forgets_to_ask_is_put_right(faulty: Any, consumes: Callable[..., None]) -> None:
    with faulty("forgets to ask") as worker:
        worker.process.send_signal(signal.SIGUSR2)
        until(lambda: events(worker, "redis_lost"), "it reconnects")
        consumes()
        assert worker.process.poll() is None


@pytest.mark.parametrize("fault", ["stuck", "never asks"])
def test_a_worker_past_help_ends_itself(fault: str, faulty: Any, jobs: Jobs) -> None:
    """Its jobs go back uncounted, its children go with it."""
    with faulty(fault) as worker:
        job_id = jobs.start("odd", {"do": "never look", "seconds": 120})
        jobs.running(job_id)
        children = worker.children()
        worker.process.send_signal(signal.SIGUSR2)
        struck = time.time()
        assert worker.wait(90) == 1
        assert touched(worker) < struck + 10, "it said that it was alive"
        until(lambda: not any(alive(child) for child in children), "its children are gone", seconds=5)
        job = jobs.get(job_id)
        assert (job["status"], job["attempt"]) == ("queued", 0)
        [line] = events(worker, "stuck")
        assert ("time.sleep(1000)" in line["stack"]) == (fault == "stuck")


def alive(process: psutil.Process) -> bool:
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)


def test_children_go_with_a_killed_parent(start: Start, jobs: Jobs) -> None:
    worker = start("odd", **QUICK)
    jobs.running(jobs.start("odd", {"do": "never look", "seconds": 120}))
    children = worker.children()
    assert len(children) >= 2
    worker.process.kill()
    until(lambda: not any(alive(child) for child in children), "its children are gone", seconds=5)


def test_a_task_out_of_memory_ends_no_worker(faulty: Any, redis: Redis, consumes: Callable[..., None]) -> None:
    with faulty("stuck") as worker:
        redis.client.lpush("default", messages.envelope("greedy", "default", "greedy", []))
        until(lambda: "MemoryError" in worker.log, "the task has failed")
        consumes()
        assert worker.process.poll() is None


def test_only_what_has_no_row_is_written_down(start: Start, jobs: Jobs, redis: Redis) -> None:
    """A job's message needs no second set of books: PostgreSQL knows of it. Another task's would be lost."""
    worker = start("worker", **QUICK)
    long = jobs.start("sleep", LONG)
    jobs.running(long)
    assert not redis.client.exists("unacked", "unacked_index")
    later = messages.envelope("health_check", "default", "later", [], eta="2100-01-01T00:00:00+00:00")
    redis.client.lpush("default", later)
    until(lambda: redis.client.hlen("unacked") == 1, "it waits in the worker, and is written down")
    worker.kill()
    [held] = redis.client.hvals("unacked")  # type: ignore[misc]
    assert json.loads(held)[0]["headers"]["id"] == "later"


def malformed(job_id: UUID, settings: Settings) -> dict[str, bytes]:
    good = messages.envelope("run_job", "default", f"{job_id}:1", [str(job_id)])
    parts: dict[str, Any] = json.loads(good)
    args = base64.b64encode(json.dumps([["secret"], {"secret": "secret"}, {}]).encode()).decode()

    def changed(**changes: Any) -> bytes:
        own = parts["properties"] | {"delivery_tag": uuid4().hex}
        return json.dumps(parts | {"properties": own} | changes).encode()

    return {
        "not JSON": b"secret{",
        "not text": b"\xff\xfesecret",
        "a list": b'["secret"]',
        "no envelope": b'{"secret": 1}',
        "no properties": changed(properties={}),
        "no headers": changed(headers={}),
        "headers that are none": changed(headers=["secret"]),
        "a header is missing": changed(headers={"task": "run_job", "secret": 1}),
        "not base64": changed(body="secret!"),
        "not JSON inside": changed(body=base64.b64encode(b"secret").decode()),
        "pickle": changed(**{"content-type": "application/x-python-serialize"}),
        "an unknown task": changed(headers={**parts["headers"], "task": "secret"}),
        "wrong arguments": changed(body=args),
        "50 MB": changed(body=base64.b64encode(b'[["' + b"secret" * 8_000_000 + b'"], {}, {}]').decode()),
    }


def test_malformed_messages(
    start: Start, jobs: Jobs, redis: Redis, settings: Settings, consumes: Callable[..., None]
) -> None:
    """Each with a good one behind it."""
    worker = start("worker", **QUICK)
    bad = malformed(jobs.insert(status="cancelled", finished_at="now()"), settings)
    good = [jobs.insert(published_at="now()") for _ in bad]
    for message, job_id in zip(bad.values(), good, strict=True):
        redis.client.lpush("default", message)
        jobs.send(job_id)
    for job_id in good:
        job = jobs.finished(job_id, seconds=60)
        assert (job["status"], job["attempt"]) == ("succeeded", 1)
    assert not redis.length("default")
    assert worker.process.poll() is None

    def complaints() -> int:
        return sum(line["level"] in ("error", "critical", "warning") for line in log_lines(worker))

    until(lambda: complaints() >= len(bad), "each is complained of", seconds=20)
    assert complaints() == len(bad), worker.log
    assert len(worker.log) < 30_000
    assert "secretsecret" not in worker.log
