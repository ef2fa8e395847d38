"""The queues, what goes where, and in which order a worker empties them."""

from typing import Literal

from app.settings import QUEUES_FOR_JOBS

Priority = Literal["high", "default", "low"]

# Own queues instead of Redis priorities: a queue can be watched, purged and given workers of its own.
QUEUE_OF_PRIORITY: dict[Priority, str] = dict(zip(("high", "default", "low"), QUEUES_FOR_JOBS, strict=True))
JOB_QUEUES = QUEUES_FOR_JOBS
# The house-keeping has its own queue and worker: a full job queue must never delay rescue and dispatch.
MAINTENANCE = "maintenance"
ALL_QUEUES = (*JOB_QUEUES, MAINTENANCE)
