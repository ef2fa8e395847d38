"""The schedule: which house-keeping task runs when. Beat goes by it; the API shows it. `worker/maintenance/` says what
each task does, docs/schedule.md how an entry is added."""

from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import takewhile

from cronsim import CronSim

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# How far a cron entry's latest time may lie back: first a little, since most lie near; at last a 29th of February.
LOOK_BACK = (timedelta(hours=3), timedelta(days=2), timedelta(days=40), timedelta(days=400), timedelta(days=3000))
# How long after its time a tick may be sent before something is wrong.
SLACK = timedelta(seconds=20)


@dataclass(frozen=True)
class Entry:
    """A task of `worker.maintenance`, and when: an interval, or a cron expression of five fields in SCHEDULE_TIMEZONE.

    A tick that no worker has started `expires` after it was sent counts as lost: it is sent again.
    """

    task: str
    when: timedelta | str
    expires: timedelta

    @property
    def frequent(self) -> bool:
        """Oftener than once a minute. Such an entry keeps one row."""
        return isinstance(self.when, timedelta) and self.when < timedelta(minutes=1)

    def latest(self, now: datetime, zone: tzinfo) -> datetime:
        """The latest time at which this entry is due, `now` included, in UTC. It depends on nothing else, so that all
        beats say the same: intervals are counted from the epoch.

        A cron time that the change to summer time leaves out comes right behind the gap; one that comes twice in autumn
        counts once.
        """
        if isinstance(self.when, timedelta):
            return EPOCH + (now - EPOCH) // self.when * self.when
        for back in LOOK_BACK:
            # Forwards: where clocks are set back, the library's way backwards meets the day before twice. In UTC: times
            # of one zone are compared by their wall clocks.
            times = (time.astimezone(UTC) for time in CronSim(self.when, (now - back).astimezone(zone)))
            if latest := deque(takewhile(lambda time: time <= now, times), maxlen=1):
                return latest.pop()
        raise ValueError(f"{self.task} is never due: {self.when}")

    def next(self, after: datetime, zone: tzinfo) -> datetime:
        """The earliest time behind `after` at which this entry is due, in UTC."""
        if isinstance(self.when, timedelta):
            return EPOCH + ((after - EPOCH) // self.when + 1) * self.when
        return next(CronSim(self.when, after.astimezone(zone))).astimezone(UTC)

    def is_late(self, now: datetime, zone: tzinfo, due_at: datetime | None, sent_at: datetime | None) -> bool:
        """Whether the newest tick, due and sent then, should have been followed by another that nobody sent; for an
        entry that keeps one row: whether nothing was sent for longer than beat ever waits."""
        if self.frequent:
            last = sent_at or due_at
            return last is None or now - last > SLACK + self.expires
        due = self.latest(now, zone)
        return now - due > SLACK and (due_at is None or due_at < due)


_MINUTE = timedelta(minutes=1)

SCHEDULE = (
    # A retry or a job with `run_at` waits at most this long past its time. After a FLUSHALL everything must run again
    # within 15 s, this entry's own lost message included.
    Entry("enqueue_pending_jobs", timedelta(seconds=2), expires=timedelta(seconds=6)),
    # With the lease of 30 s: a dead worker's job runs again within 45 s.
    Entry("cleanup_orphaned_jobs", timedelta(seconds=10), expires=timedelta(seconds=12)),
    # The quiet hours, and not the minutes that everybody takes.
    Entry("cleanup_celery_results", "17 * * * *", expires=_MINUTE),
    Entry("cleanup_old_files", "23 3 * * *", expires=_MINUTE),
    Entry("database_maintenance", "41 3 * * *", expires=_MINUTE),
)
