"""Celery's prefork pool, which notices the end of a child at once."""

import time
from typing import Any

from celery.concurrency import asynpool, prefork

PATIENCE_SECONDS = 0.2


class Pool(asynpool.AsynPool):
    def _event_process_exit(self, hub: Any, proc: Any) -> None:
        # The pipe that tells of a child's end closes a moment before the kernel lets the parent have the child. Celery
        # looks once, sees a living child every other time, and looks again after five seconds: until then the job of a
        # dead child waits, and after `worker_max_tasks_per_child` nobody takes the place of the old one.
        end = time.monotonic() + PATIENCE_SECONDS
        while proc.exitcode is None and time.monotonic() < end:
            time.sleep(0.001)
        super()._event_process_exit(hub, proc)  # type: ignore[misc]


class TaskPool(prefork.TaskPool):
    Pool = Pool
