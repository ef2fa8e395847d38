"""Celery's beat with our way of sending: short time limits, no file on disk, and no ticks that pile up."""

from datetime import timedelta
from typing import Any, cast

from celery.beat import ScheduleEntry, Scheduler
from celery.schedules import schedule

from app import alive, logs
from app.jobs import messages
from app.queues import MAINTENANCE
from app.settings import get_settings
from beat.schedule import SCHEDULE

log = logs.get(__name__)

# With this many messages waiting nobody is consuming `maintenance`; more ticks would only fill Redis.
MOST_WAITING = 100
EXPIRES = {entry.task: entry.expires for entry in SCHEDULE}


class JobstackScheduler(Scheduler):
    """In memory: when beat starts, everything is due at once, which is harmless, since each task only looks at rows."""

    max_interval = 5

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._client = messages.connect(get_settings())
        super().__init__(*args, **kwargs)

    def setup_schedule(self) -> None:
        # `last_run_at` in the past: the first round must not wait for its interval.
        for entry in SCHEDULE:
            every = schedule(timedelta(seconds=entry.every), app=self.app)
            self.schedule[entry.task] = ScheduleEntry(
                name=entry.task,
                task=entry.task,
                schedule=every,
                last_run_at=self.app.now() - timedelta(seconds=entry.every),
                app=self.app,
            )

    def tick(self, *args: Any, **kwargs: Any) -> float:
        wait: float = super().tick(*args, **kwargs)
        alive.touch("beat")
        return wait

    def apply_entry(self, entry: Any, producer: object = None) -> None:
        """Sends one tick. Redis away: the next tick does the work of this one."""
        try:
            waiting = cast(int, self._client.llen(MAINTENANCE))
            if waiting >= MOST_WAITING:
                log.warning("tick_skipped", task=entry.task, waiting=waiting, hint="is worker-maintenance running?")
                return
            self._client.lpush(
                MAINTENANCE, messages.maintenance_message(entry.task, expires_seconds=EXPIRES[entry.task])
            )
        except messages.REDIS_ERRORS as error:
            log.warning("tick_not_sent", task=entry.task, error=str(error))
