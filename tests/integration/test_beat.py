"""Beat's ticks, and how worker and beat tell that they are alive."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import DictRow

from app.jobs import messages
from app.queues import MAINTENANCE
from app.schedule import SCHEDULE
from tests.processes import ROOT, Process
from tests.servers import Postgres, Redis
from tests.waiting import until

Connection = psycopg.Connection[DictRow]
TASKS = {entry.task for entry in SCHEDULE}


def ticks(redis: Redis) -> list[str]:
    """The tasks that wait."""
    found: list[bytes] = redis.client.lrange(MAINTENANCE, 0, -1)  # type: ignore[assignment]
    return [json.loads(message)["headers"]["task"] for message in found]


def test_ticks_are_sent_and_run(db: Connection, redis: Redis, start: Callable[..., Any]) -> None:
    """Also what comes next, and with three beats."""
    for _ in range(3):
        start("beat")
    until(lambda: set(ticks(redis)) == TASKS, "every entry has a message")
    worker = start("worker-maintenance")

    def done() -> set[str]:
        return {row["entry"] for row in db.execute("SELECT entry FROM schedule_ticks WHERE finished_at IS NOT NULL")}

    until(lambda: done() == TASKS, "every task has run", seconds=60)
    newest = "SELECT max(due_at) AS due_at FROM schedule_ticks WHERE entry = 'enqueue_pending_jobs'"
    before = db.execute(newest).fetchone()
    until(lambda: db.execute(newest).fetchone() != before, "the next tick")
    assert "Traceback" not in worker.log


def test_nothing_piles_up_where_nobody_consumes(redis: Redis, start: Callable[..., Any]) -> None:
    redis.client.lpush(MAINTENANCE, *["{}"] * messages.MOST_MAINTENANCE)
    process = start("beat")
    until(lambda: "ticks_skipped" in process.log, "a tick is skipped")
    assert redis.client.llen(MAINTENANCE) == messages.MOST_MAINTENANCE


def gives_no_sign(process: Process, name: str) -> None:
    sign = process.folder / f"jobstack-{name}.alive"
    sign.unlink(missing_ok=True)
    # Longer than between two signs.
    with pytest.raises(AssertionError):
        until(sign.exists, "a sign of life", seconds=8)


def gives_a_sign(process: Process, name: str) -> None:
    until((process.folder / f"jobstack-{name}.alive").exists, "a sign of life", seconds=30)


@pytest.mark.parametrize("away", ["redis", "postgres"])
def test_beat_outlives_what_it_needs(away: str, postgres: Postgres, redis: Redis, start: Callable[..., Any]) -> None:
    process = start("beat")
    server: Any = {"redis": redis, "postgres": postgres}[away]
    server.stop()
    try:
        until(lambda: "round_failed" in process.log, "a round fails")
        gives_no_sign(process, "beat")
    finally:
        server.start()
    redis.client.delete(MAINTENANCE)
    until(lambda: ticks(redis), "ticks come again")
    gives_a_sign(process, "beat")
    assert process.process.poll() is None
    assert "Traceback" not in process.log


@pytest.mark.parametrize("frozen", ["nothing", "redis", "postgres"])
def test_sigterm_ends_it_at_once(frozen: str, postgres: Postgres, redis: Redis, start: Callable[..., Any]) -> None:
    process = start("beat")
    server: Any = {"redis": redis, "postgres": postgres}.get(frozen)
    if server:
        server.freeze()
    try:
        if server:
            sign = process.folder / "jobstack-beat.alive"
            until(lambda: time.time() - sign.stat().st_mtime > 3, "beat waits for an answer")
        process.terminate()
        assert process.wait(8) == 0
    finally:
        if server:
            server.thaw()
    assert "Traceback" not in process.log


def test_a_stuck_beat_ends_itself(tmp_path: Path, environment: object) -> None:
    """Its restart policy does the rest."""
    stuck = """
import time, beat.__main__ as main
main.STUCK_SECONDS = 0.5
main.Beat.round = lambda self: time.sleep(600)
main.main()
"""
    process = Process([sys.executable, "-c", stuck], tmp_path)
    assert process.wait(30) == 1
    assert "most recent call first" in process.log  # where it was stuck


def health(module: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"{module}.health"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "JOBSTACK_RUN_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


@pytest.mark.parametrize("name", ["worker", "beat"])
def test_health_is_that_of_the_process(name: str, tmp_path: Path, start: Callable[..., Any]) -> None:
    """The check needs no setting and no connection, only the file that the process touches while it works."""
    before = health(name, tmp_path)
    assert (before.returncode, before.stderr) == (1, f"{name} has not given a sign of life yet\n")
    process = start(name)
    assert health(name, process.folder).returncode == 0
    process.kill()
    os.utime(process.folder / f"jobstack-{name}.alive", (time.time() - 60,) * 2)
    after = health(name, process.folder)
    assert after.returncode == 1
    assert "gave its last sign of life 6" in after.stderr


def test_a_worker_cut_off_from_redis_gives_no_sign_of_life(redis: Redis, start: Callable[..., Any]) -> None:
    sign = start("worker").folder / "jobstack-worker.alive"
    redis.stop()
    try:
        sign.unlink()
        # Longer than between two signs.
        with pytest.raises(AssertionError):
            until(sign.exists, "a sign of life", seconds=8)
    finally:
        redis.start()
    until(sign.exists, "a sign of life after Redis is back", seconds=30)
