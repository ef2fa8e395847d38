"""The house-keeping, one file a task. Each has `run(database, client, settings)`, which returns what it did (`{}` for
nothing), can be run by hand, and is safe to run twice at once. docs/housekeeping.md says what each removes and when.

QUICK tasks take milliseconds. SLOW ones work in slices of SLICE_SECONDS and return `"unfinished": True` among their
counts when there is more to do; one of them at a time, so that dispatch and rescue always find a free child.
"""

from worker.maintenance import (
    cleanup_celery_results,
    cleanup_old_files,
    cleanup_orphaned_jobs,
    database_maintenance,
    enqueue_pending_jobs,
    health_check,
)
from worker.maintenance._slice import SLICE_SECONDS

QUICK = (enqueue_pending_jobs, cleanup_orphaned_jobs, health_check)
SLOW = (cleanup_celery_results, cleanup_old_files, database_maintenance)
ALL = QUICK + SLOW

__all__ = ["ALL", "QUICK", "SLICE_SECONDS", "SLOW"]
