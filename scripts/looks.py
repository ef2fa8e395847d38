"""What the scripts ask PostgreSQL. Everything here only looks; what moves a job is in `app/jobs/statements.py`.

Ages are seconds by the database's clock: this machine's may be wrong.
"""

from app.jobs.statements import SHORT_DUE, SHOWN, WAITS_OUTSIDE


def _seconds(interval: str, name: str) -> str:
    return f"EXTRACT(EPOCH FROM {interval})::float AS {name}"


JOB = f"""
SELECT {SHOWN}, short, node, pid, published_at, cancel_requested_at, lease_expires_at,
    {_seconds("now() - heartbeat_at", "heartbeat_age")}, {_seconds("lease_expires_at - now()", "lease_left")},
    {_seconds("run_at - now()", "due_in")}, {_seconds("now() - published_at", "published_age")},
    {_seconds("now() - finished_at", "finished_age")}, {_seconds("now() - cancel_requested_at", "cancel_age")}
FROM jobs WHERE id = %(id)s
"""

ATTEMPTS = "SELECT attempt, worker, error, started_at, ended_at FROM job_attempts WHERE job_id = %(id)s ORDER BY id"
STEPS = "SELECT name, created_at FROM job_steps WHERE job_id = %(id)s ORDER BY created_at"
FILES = """
SELECT files.id, files.name, files.size FROM job_files JOIN files ON files.id = file_id WHERE job_id = %(id)s
"""

STATUSES = "SELECT id, status FROM jobs WHERE id = ANY(%(ids)s::uuid[])"
OVER = ("succeeded", "failed", "cancelled")
NOT_ENDED = """
SELECT id FROM jobs WHERE id = ANY(%(ids)s::uuid[]) AND status IN ('queued', 'running') AND cancel_requested_at IS NULL
"""
ENDING = """
SELECT id FROM jobs WHERE id = ANY(%(ids)s::uuid[]) AND status = 'running' AND cancel_requested_at IS NOT NULL
"""

# A run was counted, and another is to come or has begun. Both sides are walks of small indexes.
RETRYING = f"""
SELECT id, kind, queue, status, attempt, max_attempts, error, worker, {_seconds("run_at - now()", "due_in")}
FROM jobs
WHERE (status = 'queued' AND attempt > 0) OR (status = 'running' AND attempt > 1 AND cancel_requested_at IS NULL)
ORDER BY status DESC, run_at
"""

# Rows that have a message, or should have one; that wait for room in the window; short ones that are due, which have no
# message; and those that wait for their time.
QUEUED = f"""
SELECT q.queue,
    (SELECT count(*) FROM jobs d WHERE d.queue = q.queue AND d.status = 'queued' AND d.published_at IS NOT NULL)
        AS published,
    (SELECT count(*) FROM jobs d WHERE d.queue = q.queue AND {WAITS_OUTSIDE}) AS outside,
    (SELECT count(*) FROM jobs d WHERE d.queue = q.queue AND {SHORT_DUE}) AS short,
    (SELECT count(*) FROM jobs d WHERE d.queue = q.queue AND d.status = 'queued' AND d.published_at IS NULL
        AND NOT d.short AND d.run_at > now())
    + (SELECT count(*) FROM jobs d WHERE d.queue = q.queue AND d.status = 'queued' AND d.short AND d.run_at > now())
        AS later,
    (SELECT count(*) FROM jobs d WHERE d.queue = q.queue AND d.status = 'running') AS running,
    {_seconds("now() - LEAST(outside.run_at, short.run_at, published.run_at)", "oldest_seconds")},
    {_seconds("now() - short.run_at", "oldest_short_seconds")}
FROM unnest(%(queues)s::text[]) WITH ORDINALITY AS q (queue, position),
    LATERAL (SELECT min(d.run_at) AS run_at FROM jobs d WHERE d.queue = q.queue AND {WAITS_OUTSIDE}) AS outside,
    LATERAL (SELECT min(d.run_at) AS run_at FROM jobs d WHERE d.queue = q.queue AND {SHORT_DUE}) AS short,
    LATERAL (SELECT min(d.run_at) AS run_at FROM jobs d
        WHERE d.queue = q.queue AND d.status = 'queued' AND d.published_at IS NOT NULL) AS published
ORDER BY q.position
"""

# What has been gone longer than rescue needs: the ids as well, to be looked up.
EXPIRED = f"""
SELECT id, kind, worker, {_seconds("now() - lease_expires_at", "expired_age")} FROM jobs
WHERE status = 'running' AND lease_expires_at < now() - %(patience)s * interval '1 second'
ORDER BY lease_expires_at LIMIT 100
"""

# --- beat ----------------------------------------------------------------------------------------------------------

NEWEST_TICKS = f"""
SELECT wanted.entry, now() AS now, tick.due_at, tick.sent_at, tick.started_at, tick.finished_at, tick.result,
    tick.error, {_seconds("now() - tick.sent_at", "sent_age")}, {_seconds("now() - tick.started_at", "started_age")}
FROM unnest(%(entries)s::text[]) WITH ORDINALITY AS wanted (entry, position)
LEFT JOIN LATERAL (
    SELECT * FROM schedule_ticks t WHERE t.entry = wanted.entry AND t.due_at <= now() ORDER BY t.due_at DESC LIMIT 1
) AS tick ON true
ORDER BY wanted.position
"""

# Our processes by the name under which they connect: a beat that runs has a connection.
CONNECTIONS = f"""
SELECT application_name, count(*) AS connections, {_seconds("now() - min(backend_start)", "oldest_age")}
FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'jobstack-%%'
GROUP BY application_name ORDER BY application_name
"""

# --- the server ----------------------------------------------------------------------------------------------------

SERVER = f"""
SELECT current_setting('server_version') AS version, current_setting('fsync') AS fsync,
    current_setting('synchronous_commit') AS synchronous_commit,
    current_setting('full_page_writes') AS full_page_writes,
    current_setting('max_connections')::int AS max_connections,
    (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend') AS connections,
    (SELECT count(*) FROM pg_stat_activity
        WHERE state LIKE 'idle in transaction%%' AND state_change < now() - interval '1 minute') AS forgotten,
    pg_database_size(current_database()) AS bytes, pg_is_in_recovery() AS read_only,
    {_seconds("now() - pg_postmaster_start_time()", "uptime")}, {_seconds("now() - to_timestamp(0)", "clock")},
    (SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()) AS tls
"""
REVISION = "SELECT max(version_num) AS revision FROM alembic_version"
