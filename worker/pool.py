"""Celery's prefork pool, mended in three places. Each has a test that shows what happens without."""

import time
from typing import Any

from celery.concurrency import asynpool, prefork

PATIENCE_SECONDS = 0.2


class Pool(asynpool.AsynPool):
    _busy_workers: set[int]  # the pipes of children at work
    _fileno_to_inq: dict[int, Any]
    _cache: dict[int, Any]
    on_timeout_set: Any

    def _event_process_exit(self, hub: Any, proc: Any) -> None:
        # The pipe that tells of a child's end closes a moment before the kernel lets the parent have the child. Celery
        # looks once, sees a living child every other time, and looks again after five seconds: until then the job of a
        # dead child waits, and after `worker_max_tasks_per_child` nobody takes the place of the old one.
        end = time.monotonic() + PATIENCE_SECONDS
        while proc.exitcode is None and time.monotonic() < end:
            time.sleep(0.001)
        super()._event_process_exit(hub, proc)  # type: ignore[misc]

    def register_with_event_loop(self, hub: Any) -> None:
        # Called at the start and after a lost connection, at which Celery clears all timers: those that end running
        # jobs at their hard limits too.
        super().register_with_event_loop(hub)
        for job in list(self._cache.values()):
            if job._timeout and job._time_accepted:
                left = job._time_accepted + job._timeout - time.monotonic()
                self.on_timeout_set(job, None, max(0.01, left))

    def flush(self) -> None:
        # Called when the connection to Redis is lost. Celery forgets which children are at work, and hands the next
        # message to one of them: it waits for that job's end, maybe for an hour, with idle children beside it.
        busy = {fd: self._fileno_to_inq.get(fd) for fd in self._busy_workers}
        super().flush()
        self._busy_workers.update(fd for fd, child in busy.items() if child and self._fileno_to_inq.get(fd) is child)


class TaskPool(prefork.TaskPool):
    Pool = Pool
