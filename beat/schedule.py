"""The schedule: which house-keeping task runs how often. docs: `worker/maintenance/` says what each does."""

from typing import NamedTuple


class Entry(NamedTuple):
    """A task of `worker.maintenance`, every so many seconds. A run that comes later than `expires` seconds is dropped:
    the next one does its work, and stale ones must not pile up behind a worker that was away."""

    task: str
    every: float
    expires: float


SCHEDULE = (
    # A retry or a job with `run_at` waits at most this long past its time.
    Entry("enqueue_pending_jobs", every=2, expires=30),
    # With the lease of 30 s: a dead worker's job runs again within 45 s.
    Entry("cleanup_orphaned_jobs", every=10, expires=60),
)
