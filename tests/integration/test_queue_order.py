"""Urgent work is not behind bulk work: a worker empties high_priority, then default, then low_priority."""

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg.rows import DictRow

from app.queues import ALL_QUEUES, JOB_QUEUES, UrgentFirst
from tests.integration.conftest import Jobs
from tests.waiting import until


# kombu keeps a worker's queues in a set, whose order depends on the seed.
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_queues_is_strict(
    seed: int, db: psycopg.Connection[DictRow], jobs: Jobs, start: Callable[..., Any]
) -> None:
    for queue in reversed(JOB_QUEUES):
        for _ in range(4):
            jobs.start("flaky", {"failures": 0}, queue=queue)
    start("worker", WORKER_CONCURRENCY=1, PYTHONHASHSEED=seed)

    def over() -> bool:
        row = db.execute("SELECT count(*) AS left FROM jobs WHERE finished_at IS NULL").fetchone()
        return row is not None and row["left"] == 0

    until(over, "all jobs are over")
    ran = db.execute("SELECT queue FROM jobs ORDER BY started_at").fetchall()
    assert [row["queue"] for row in ran] == [queue for queue in JOB_QUEUES for _ in range(4)]


def test_any_order_of_a_set_becomes_ours() -> None:
    cycle = UrgentFirst()
    cycle.update({"low_priority", "worker@host.celery.pidbox", "high_priority", "maintenance", "default"})
    assert cycle.consume(5) == ["worker@host.celery.pidbox", *ALL_QUEUES]
    cycle.rotate("high_priority")
    assert cycle.consume(2) == ["worker@host.celery.pidbox", "high_priority"]
