"""The house-keeping, one file a task. Each has `run(database, client, settings)`, which returns what it did (`{}` for
nothing), can be run by hand, and is safe to run twice at once."""

from worker.maintenance import cleanup_orphaned_jobs, enqueue_pending_jobs, health_check

ALL = (enqueue_pending_jobs, cleanup_orphaned_jobs, health_check)
