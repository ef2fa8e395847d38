"""Beat's ticks, and how worker and beat tell that they are alive."""

import importlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.celery_app import celery_app
from app.queues import MAINTENANCE
from beat import scheduler
from beat.schedule import SCHEDULE
from tests.processes import ROOT
from tests.servers import Redis
from tests.waiting import until

TASKS = {entry.task for entry in SCHEDULE}


def ticks(redis: Redis) -> list[dict[str, Any]]:
    found: list[bytes] = redis.client.lrange(MAINTENANCE, 0, -1)  # type: ignore[assignment]
    return [json.loads(message)["headers"] for message in found]


def test_ticks_come_on_time_and_expire(redis: Redis, start: Callable[..., Any]) -> None:
    start("beat")
    until(lambda: len(ticks(redis)) >= 4, "ticks come")
    counted = Counter(tick["task"] for tick in ticks(redis))
    assert set(counted) == TASKS
    # Everything is due at the start; then one comes every two seconds and the other every ten.
    assert counted["enqueue_pending_jobs"] >= 3
    assert counted["cleanup_orphaned_jobs"] == 1
    assert all(tick["expires"] and tick["ignore_result"] for tick in ticks(redis))


@pytest.mark.usefixtures("environment")
def test_every_tick_has_a_task() -> None:
    importlib.import_module("worker.tasks")
    assert set(celery_app.tasks) >= TASKS


def test_nothing_piles_up_where_nobody_consumes(redis: Redis, start: Callable[..., Any]) -> None:
    redis.client.lpush(MAINTENANCE, *["{}"] * scheduler.MOST_WAITING)
    process = start("beat")
    until(lambda: "tick_skipped" in process.log, "a tick is skipped")
    assert redis.client.llen(MAINTENANCE) == scheduler.MOST_WAITING


def test_beat_outlives_redis(redis: Redis, start: Callable[..., Any]) -> None:
    process = start("beat")
    redis.stop()
    try:
        until(lambda: "tick_not_sent" in process.log, "a tick cannot be sent")
    finally:
        redis.start()
    until(lambda: ticks(redis), "ticks come again")
    assert process.process.poll() is None
    assert "Traceback" not in process.log


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
