"""The queues, what goes where, and in which order a worker empties them."""

from collections.abc import Iterable
from typing import Literal

from app.settings import QUEUES_FOR_JOBS

Priority = Literal["high", "default", "low"]

# Own queues instead of Redis priorities: a queue can be watched, purged and given workers of its own.
QUEUE_OF_PRIORITY: dict[Priority, str] = dict(zip(("high", "default", "low"), QUEUES_FOR_JOBS, strict=True))
JOB_QUEUES = QUEUES_FOR_JOBS
# The house-keeping has its own queue and worker: a full job queue must never delay rescue and dispatch.
MAINTENANCE = "maintenance"
ALL_QUEUES = (*JOB_QUEUES, MAINTENANCE)


class UrgentFirst:
    """The order in which a worker asks its queues for the next message: strictly as in ALL_QUEUES.

    For kombu's `queue_order_strategy`. Its own "priority" keeps the order of a set, which changes with every start.
    """

    def __init__(self) -> None:
        self._queues: list[str] = []

    def update(self, queues: Iterable[str]) -> None:
        # Others are a worker's own, for remote control.
        self._queues = sorted(queues, key=lambda name: ALL_QUEUES.index(name) if name in ALL_QUEUES else -1)

    def consume(self, count: int) -> list[str]:
        return self._queues[:count]

    def rotate(self, last_used: str) -> None:
        """A queue that had a message keeps its place: bulk work waits as long as urgent work lasts."""
