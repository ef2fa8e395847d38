"""Every SQL statement that moves a job, and the ones that look at jobs. Nothing else writes to `jobs`.

Rules that hold for all of them:
- Times are the database's (`now()`), never a process's: clocks of machines differ.
- After the claim every write names the lease token (the fence). No row back means: somebody else has the job now.
- Each is one statement in its own transaction, safe to repeat when its answer was lost.
- Every exit from `running` goes to `cancelled` if a cancel is recorded, in the same statement.
"""

# The columns of a job that the API shows. A list for people does without payload and result, each up to a megabyte.
LISTED = """id, kind, status, priority, queue, error, progress, attempt, max_attempts,
    run_at, created_at, started_at, heartbeat_at, finished_at, worker, request_id"""
SHOWN = f"{LISTED}, payload, result"

# A due row of jobs `d` that no message stands for: its queue's window was full when it came. Exactly as in the index.
WAITS_OUTSIDE = "d.status = 'queued' AND d.published_at IS NULL AND NOT d.short AND d.run_at <= now()"
# Those of the `short` have none; they are claimed in groups.
SHORT_DUE = "d.status = 'queued' AND d.short AND d.run_at <= now()"


def _oldest_due(condition: str) -> str:
    """Since when the oldest such row of the queue `q` has been due; NULL if there is none.

    Not EXISTS: where a million rows wait the planner counts on finding one soon, wherever it begins, and reads the
    whole table for a queue that has none. By its order it has to read the index.
    """
    return f"(SELECT d.run_at FROM jobs d WHERE d.queue = q.queue AND {condition} ORDER BY d.run_at LIMIT 1)"


# --- creating ------------------------------------------------------------------------------------------------------

# One statement for one job or a thousand, of one client or of many. `published_at` is set where the caller may publish
# at once: the job is due, its queue is among `open_queues`, and no older row waits outside the window (then only
# dispatch publishes, in turn).
# The lists come as text: see `create.array`. Only what the caller can't know is returned.
# Rows are inserted in the order of their keys: two batches with the same keys would otherwise deadlock.
CREATE = f"""
WITH wanted AS (
    SELECT * FROM unnest(
        %(ids)s::uuid[], %(kinds)s::text[], %(priorities)s::text[], %(queues)s::text[], %(payloads)s::text[],
        %(max_attempts)s::int[], %(run_ats)s::timestamptz[], %(idempotency_keys)s::text[], %(request_hashes)s::bytea[],
        %(api_keys)s::text[], %(request_ids)s::text[], %(short)s::boolean[]
    ) AS w (id, kind, priority, queue, payload, max_attempts, run_at, idempotency_key, request_hash, api_key,
            request_id, short)
), backlog AS MATERIALIZED (
    SELECT q.queue FROM (SELECT DISTINCT queue FROM wanted) q
    WHERE {_oldest_due(WAITS_OUTSIDE)} IS NOT NULL
), created AS (
    INSERT INTO jobs (id, kind, priority, queue, payload, max_attempts, run_at, published_at, short,
                      request_id, api_key, idempotency_key, request_hash)
    SELECT id, kind, priority, queue, payload::jsonb, max_attempts, GREATEST(run_at, now()),
           CASE WHEN NOT short AND COALESCE(run_at, now()) <= now() AND queue = ANY(%(open_queues)s::text[])
                     AND queue NOT IN (SELECT queue FROM backlog) THEN now() END, short,
           request_id, api_key, idempotency_key, request_hash
    FROM wanted ORDER BY api_key, idempotency_key
    ON CONFLICT (api_key, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
    RETURNING id, created_at, run_at, published_at
), linked AS (
    INSERT INTO job_files (job_id, file_id)
    SELECT f.job_id, f.file_id FROM unnest(%(file_jobs)s::uuid[], %(file_ids)s::uuid[]) AS f (job_id, file_id)
    JOIN created ON created.id = f.job_id
)
SELECT * FROM created
"""

# A statement of its own: the one that met the conflict does not see the winner's row in its snapshot.
FIND_BY_KEYS = f"""
SELECT api_key, idempotency_key, request_hash, {SHOWN} FROM jobs
JOIN unnest(%(api_keys)s::text[], %(idempotency_keys)s::text[]) AS k (api_key, idempotency_key)
    USING (api_key, idempotency_key)
WHERE idempotency_key IS NOT NULL
"""

MISSING_FILES = """
SELECT wanted.id FROM unnest(%(file_ids)s::uuid[]) AS wanted (id)
WHERE NOT EXISTS (SELECT FROM files WHERE files.id = wanted.id)
"""

# `scripts/run_job.py` runs a job in its own process: claimed from birth, no worker can take it.
CREATE_CLAIMED = """
WITH created AS (
    INSERT INTO jobs (id, kind, priority, queue, payload, max_attempts, attempt, status,
                      started_at, heartbeat_at, worker, node, pid, lease_token, lease_expires_at)
    VALUES (%(id)s, %(kind)s, %(priority)s, %(queue)s, %(payload)s::jsonb, %(max_attempts)s, 1, 'running',
            now(), now(), %(worker)s, %(node)s, %(pid)s, %(token)s, now() + %(lease)s * interval '1 second')
    RETURNING id, kind, queue, payload, attempt, max_attempts, request_id, lease_token, 0.0::float AS waited
), linked AS (
    INSERT INTO job_files (job_id, file_id) SELECT %(id)s, unnest(%(file_ids)s::uuid[])
)
SELECT * FROM created
"""

# --- running -------------------------------------------------------------------------------------------------------

_CLAIM = """
    UPDATE jobs SET status = 'running', attempt = attempt + 1, started_at = now(), heartbeat_at = now(),
        worker = %(worker)s, node = %(node)s, pid = %(pid)s,
        lease_token = %(token)s, lease_expires_at = now() + %(lease)s * interval '1 second', published_at = NULL
"""
# Who runs alone is not to be treated as one of a group.
_ALONE = ", short = false"
_CLAIM_SHOWS = """id, kind, queue, payload, attempt, max_attempts, request_id, lease_token,
    EXTRACT(EPOCH FROM started_at - run_at)::float AS waited"""
_CLAIMED = f"RETURNING {_CLAIM_SHOWS}"
_DUE = "status = 'queued' AND run_at <= now() AND attempt < max_attempts AND cancel_requested_at IS NULL"

# The compare-and-set that makes duplicates of a message harmless. Its commit does not wait for the disk: a claim lost
# in a crash of PostgreSQL leaves the job queued, which is true. The setting ends with the statement's transaction.
CLAIM = f"""
WITH lazily AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true) AS done)
{_CLAIM} {_ALONE} FROM lazily WHERE lazily.done IS NOT NULL AND id = %(id)s AND {_DUE}
{_CLAIMED}
"""

# The oldest due short jobs of a queue, all with the same token. As lazily as one.
CLAIM_SHORT = f"""
WITH lazily AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true) AS done),
picked AS (
    SELECT d.id FROM jobs d WHERE d.queue = %(queue)s AND {SHORT_DUE}
    ORDER BY d.run_at, d.id LIMIT %(limit)s FOR UPDATE SKIP LOCKED
)
{_CLAIM} FROM lazily WHERE lazily.done IS NOT NULL AND id = ANY(ARRAY(SELECT id FROM picked)) AND {_DUE}
{_CLAIMED}, run_at
"""

# After a claim whose answer was lost: the row carries our token, so it is ours.
CLAIMED = f"""
SELECT {_CLAIM_SHOWS} FROM jobs
WHERE id = %(id)s AND lease_token = %(token)s AND status = 'running'
"""

# Without a queue (inline mode): the oldest due job, skipping those that another thread is just taking.
CLAIM_NEXT = f"""
{_CLAIM} {_ALONE} WHERE id = (
    SELECT id FROM jobs WHERE {_DUE} AND queue = ANY(%(queues)s)
    ORDER BY array_position(%(queues)s, queue), run_at, id LIMIT 1 FOR UPDATE SKIP LOCKED
)
{_CLAIMED}
"""

# Renews leases and writes progress in one go, and brings back recorded cancels. A lease that expired but that nobody
# took is renewed as well: the token decides, not the clock.
HEARTBEAT = """
UPDATE jobs SET heartbeat_at = now(), lease_expires_at = now() + %(lease)s * interval '1 second',
    progress = COALESCE(held.progress::jsonb, jobs.progress)
FROM unnest(%(ids)s::uuid[], %(tokens)s::uuid[], %(progress)s::text[]) AS held (id, token, progress)
WHERE jobs.id = held.id AND jobs.lease_token = held.token AND jobs.status = 'running'
RETURNING jobs.id, jobs.lease_token, jobs.cancel_requested_at IS NOT NULL AS cancelled
"""

# --- leaving `running` ---------------------------------------------------------------------------------------------


def _finish(result: str, progress: str) -> str:
    return f"""
UPDATE jobs SET status = CASE WHEN cancel_requested_at IS NULL THEN 'succeeded' ELSE 'cancelled' END,
    result = CASE WHEN cancel_requested_at IS NULL THEN {result}::jsonb END, error = NULL,
    progress = COALESCE({progress}::jsonb, jobs.progress),
    heartbeat_at = now(), finished_at = now(), lease_expires_at = NULL
"""


FINISH = f"""
{_finish("%(result)s", "%(progress)s")}
WHERE id = %(id)s AND lease_token = %(token)s AND status = 'running'
RETURNING status
"""

# What a group has done so far.
FINISH_SHORT = f"""
{_finish("done.result", "done.progress")}
FROM unnest(%(ids)s::uuid[], %(results)b::text[], %(progress)b::text[]) AS done (id, result, progress)
WHERE jobs.id = done.id AND lease_token = %(token)s AND status = 'running'
RETURNING jobs.id, status
"""

# After a write whose answer was lost: a finished row still carries our token, so the write was ours and a success.
OUTCOMES = """
SELECT id, status FROM jobs
WHERE id = ANY(%(ids)s::uuid[]) AND lease_token = %(token)s AND status IN ('succeeded', 'failed', 'cancelled')
"""

CANCELLED = """
UPDATE jobs SET status = 'cancelled', progress = COALESCE(%(progress)s::jsonb, progress),
    heartbeat_at = now(), finished_at = now(), lease_expires_at = NULL
WHERE id = %(id)s AND lease_token = %(token)s AND status = 'running' AND cancel_requested_at IS NOT NULL
RETURNING status, kind, queue
"""


def _end_attempt(whose: str, *, group: str = "short", lock: str = "FOR UPDATE", progress: str = "progress") -> str:
    """An attempt failed: back to the queue after `retry_in` seconds; `failed` if that is null or attempts are spent.

    One of a broken `group` has most likely done nothing wrong, or not even begun: it goes back uncounted. Whatever
    failed, or was there when something did, runs alone from then on.

    Parameters besides those of `whose`: error (JSON), retry_in (seconds or null), published (a message is coming).
    """
    return f"""
WITH ended AS MATERIALIZED (
    SELECT id, {group} AS uncounted,
        CASE WHEN cancel_requested_at IS NOT NULL THEN 'cancelled'
             WHEN {group} THEN 'queued'
             WHEN %(retry_in)s::float IS NULL OR attempt >= max_attempts THEN 'failed'
             ELSE 'queued' END AS next
    FROM jobs WHERE status = 'running' AND {whose} {lock}
), moved AS (
    UPDATE jobs SET status = next, short = false, lease_expires_at = NULL,
        error = CASE WHEN uncounted THEN error ELSE %(error)s::jsonb END,
        attempt = CASE WHEN uncounted AND next = 'queued' THEN attempt - 1 ELSE attempt END,
        lease_token = CASE WHEN next = 'queued' THEN NULL ELSE lease_token END,
        finished_at = CASE WHEN next = 'queued' THEN NULL ELSE now() END,
        run_at = CASE WHEN next = 'queued' THEN now() + %(retry_in)s::float * interval '1 second' ELSE run_at END,
        progress = {progress},
        published_at = CASE WHEN next = 'queued' AND %(published)s THEN now() END
    FROM ended WHERE jobs.id = ended.id
    RETURNING jobs.id, jobs.kind, jobs.queue, jobs.status, jobs.attempt, jobs.worker, jobs.error, jobs.started_at,
        jobs.run_at, jobs.request_id, uncounted
), kept AS (
    INSERT INTO job_attempts (job_id, attempt, worker, error, started_at)
    SELECT id, attempt, worker, error, started_at FROM moved WHERE status <> 'cancelled' AND NOT uncounted
)
SELECT id, kind, queue, status, attempt, worker, run_at, request_id, uncounted FROM moved
"""


# By the worker itself, which knows its token.
FAIL = _end_attempt(
    "id = %(id)s AND lease_token = %(token)s", group="false", progress="COALESCE(%(progress)s::jsonb, progress)"
)
# By the parent, for a child that died or was stopped: it knows which child it was.
CHILD_DIED = _end_attempt("node = %(node)s AND pid = %(pid)s")
# By anybody, for a worker that sends no heartbeats. PostgreSQL's own restart is not the workers' fault: after it they
# get the time to renew their leases first.
# A clock that was ahead and was set back has left times in the future: they must stop nothing until they are reached.
RESCUE = _end_attempt(
    """(lease_expires_at < now() OR heartbeat_at > now() + interval '1 minute')
    AND now() - pg_postmaster_start_time() NOT BETWEEN interval '0' AND %(settle)s * interval '1 second'""",
    lock="FOR UPDATE SKIP LOCKED",
)


def _hand_back(whose: str) -> str:
    """Not the job's fault: the attempt is not counted, and with 0 `retry_in` seconds it is first in line again."""
    return f"""
UPDATE jobs SET status = CASE WHEN cancel_requested_at IS NULL THEN 'queued' ELSE 'cancelled' END,
    lease_token = CASE WHEN cancel_requested_at IS NULL THEN NULL ELSE lease_token END,
    finished_at = CASE WHEN cancel_requested_at IS NULL THEN NULL ELSE now() END,
    attempt = attempt - 1, lease_expires_at = NULL, published_at = NULL,
    run_at = GREATEST(run_at, now() + NULLIF(%(retry_in)s::float, 0) * interval '1 second'),
    progress = COALESCE(%(progress)s::jsonb, progress)
WHERE status = 'running' AND {whose}
RETURNING id, status, kind, queue, true AS uncounted
"""


HAND_BACK = _hand_back("id = %(id)s AND lease_token = %(token)s")
HAND_BACK_CHILD = _hand_back("node = %(node)s AND pid = %(pid)s")
HAND_BACK_NODE = _hand_back("node = %(node)s")
# Those of a group that have not begun.
HAND_BACK_SHORT = _hand_back("id = ANY(%(ids)s::uuid[]) AND lease_token = %(token)s")

# --- by people -----------------------------------------------------------------------------------------------------

# Queued: over at once. Running: recorded; from this moment on the job cannot succeed.
CANCEL = f"""
UPDATE jobs SET status = CASE status WHEN 'queued' THEN 'cancelled' ELSE status END,
    cancel_requested_at = COALESCE(cancel_requested_at, now()),
    finished_at = CASE status WHEN 'queued' THEN now() END
WHERE id = %(id)s AND status IN ('queued', 'running')
RETURNING {SHOWN}
"""

# From the beginning, but what `once` recorded stays: a paid call is not paid again.
RETRY = f"""
UPDATE jobs SET status = 'queued', attempt = 0, run_at = now(), error = NULL, result = NULL, progress = NULL,
    started_at = NULL, heartbeat_at = NULL, finished_at = NULL, worker = NULL, node = NULL, pid = NULL,
    lease_token = NULL, cancel_requested_at = NULL, published_at = NULL
WHERE id = %(id)s AND status IN ('failed', 'cancelled')
RETURNING {SHOWN}
"""

# --- steps ---------------------------------------------------------------------------------------------------------

STEPS = "SELECT name, result FROM job_steps WHERE job_id = %(id)s"

# The one write without a fence: the first record stays, and both attempts use it.
RECORD_STEP = """
INSERT INTO job_steps (job_id, name, result) VALUES (%(id)s, %(name)s, %(result)s::jsonb)
ON CONFLICT DO NOTHING RETURNING result
"""
READ_STEP = "SELECT result FROM job_steps WHERE job_id = %(id)s AND name = %(name)s"

# --- dispatch and repair -------------------------------------------------------------------------------------------

# The oldest due rows of each queue, as many as its window has room for. `published_at` is written before the send: a
# dispatcher that dies in between has promised a message that never came, which repair notices.
DISPATCH = f"""
WITH room AS (
    SELECT q.queue, %(window)s - (
        SELECT count(*) FROM jobs p WHERE p.queue = q.queue AND p.status = 'queued' AND p.published_at IS NOT NULL
    ) AS free
    FROM unnest(%(queues)s::text[]) AS q (queue)
), picked AS (
    SELECT due.id FROM room CROSS JOIN LATERAL (
        SELECT d.id FROM jobs d
        WHERE d.queue = room.queue AND {WAITS_OUTSIDE}
        ORDER BY d.run_at, d.id LIMIT GREATEST(room.free, 0) FOR UPDATE SKIP LOCKED
    ) AS due
)
-- An array and not a join: the planner can't know how few rows these are, and would read the whole table for them.
UPDATE jobs SET published_at = now() WHERE id = ANY(ARRAY(SELECT id FROM picked)) AND status = 'queued'
RETURNING id, kind, queue, run_at
"""

# Rows whose message was sent a while ago and should be in the queue's list, or with a worker that claims it any moment.
SETTLED = """
SELECT queue, array_agg(id) AS ids FROM jobs
WHERE queue = ANY(%(queues)s::text[]) AND status = 'queued'
    AND published_at NOT BETWEEN now() - %(settle)s * interval '1 second' AND now() + interval '1 minute'
GROUP BY queue
"""

# A row that somebody holds is left for the next time: dispatch must wait for nobody.
PUBLISH_AGAIN = """
UPDATE jobs SET published_at = now()
WHERE id = ANY(ARRAY(
    SELECT id FROM jobs WHERE id = ANY(%(ids)s::uuid[]) AND status = 'queued'
        AND published_at NOT BETWEEN now() - %(settle)s * interval '1 second' AND now() + interval '1 minute'
    ORDER BY id FOR UPDATE SKIP LOCKED
))
RETURNING id, kind, queue, run_at
"""

WAITING = f"""
SELECT q.queue, {_oldest_due(WAITS_OUTSIDE)} IS NOT NULL AS outside,
    {_oldest_due(SHORT_DUE)} IS NOT NULL AS short
FROM unnest(%(queues)s::text[]) AS q (queue)
"""

# --- deleting ------------------------------------------------------------------------------------------------------

# Finished jobs past their time, oldest first; steps, attempts and links to files go with them (ON DELETE CASCADE), and
# their idempotency keys are free again. The index is on `created_at`, which is never later than `finished_at`. Each
# batch begins behind the last one, or it would read past all that the others deleted. A statement for each status,
# written out: planned for any status, one of a few rows would be looked for among all jobs.
DELETE_FINISHED = tuple(
    f"""
WITH old AS MATERIALIZED (
    SELECT id FROM jobs
    WHERE status = '{status}' AND (created_at, id) > (%(after_time)s, %(after_id)s)
      AND created_at < now() - %(days)s * interval '1 day' AND finished_at < now() - %(days)s * interval '1 day'
    ORDER BY created_at, id LIMIT %(batch)s FOR UPDATE SKIP LOCKED
)
DELETE FROM jobs WHERE id = ANY(ARRAY(SELECT id FROM old)) RETURNING id, created_at
"""
    for status in ("succeeded", "failed", "cancelled")
)

# --- looking -------------------------------------------------------------------------------------------------------

GET = f"SELECT {SHOWN} FROM jobs WHERE id = %(id)s"

# A name for what a job's watchers want to know: the same whoever asks, another one after each change.
_STATE = "left(md5(concat_ws(' ', status, attempt, started_at, progress)), 16)"
GET_STATE = f"SELECT finished_at, {_STATE} AS state FROM jobs WHERE id = %(id)s"
# Of many jobs those whose state is not the one that is known. As text: the driver would parse megabytes where the event
# loop waits.
CHANGED = f"""
SELECT {LISTED}, payload::text, result::text, {_STATE} AS state
FROM unnest(%(ids)s::uuid[], %(states)s::text[]) AS seen (job_id, known)
JOIN jobs ON jobs.id = job_id WHERE {_STATE} <> known
"""

# What a person wants to know besides.
GET_STORY = f"SELECT {SHOWN}, cancel_requested_at, api_key, now() FROM jobs WHERE id = %(id)s"

# The unsuccessful ones, also those before a person's retry, where counting begins again.
ATTEMPTS = """
SELECT attempt, worker, error, started_at, ended_at FROM job_attempts WHERE job_id = %(id)s ORDER BY id DESC LIMIT 50
"""


def list_jobs(filters: list[str], *, after_cursor: bool, id_range: bool = False, columns: str = SHOWN) -> str:
    """Newest first, by keyset: a page costs the same wherever it is. `filters` are names of columns. `id_range`: only
    ids from `low` to `high`."""
    conditions = [f"{column} = %({column})s" for column in filters]
    if id_range:
        conditions.append("id BETWEEN %(low)s AND %(high)s")
    if after_cursor:
        conditions.append("(created_at, id) < (%(cursor_time)s, %(cursor_id)s)")
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    return f"SELECT {columns} FROM jobs {where} ORDER BY created_at DESC, id DESC LIMIT %(limit)s"


# Of the first page: a name for the state of its list, and who is at work.
NEWEST_VERSION = f"""
SELECT md5(string_agg(id || {_STATE}, ' ' ORDER BY created_at, id)) AS version
FROM (SELECT * FROM jobs ORDER BY created_at DESC, id DESC LIMIT 50) AS newest
"""
# Rows that should have a message, by queue; running jobs whose lease is over.
HEALTH = """
SELECT (
    SELECT jsonb_object_agg(q.queue, (
        SELECT count(*) FROM jobs j WHERE j.queue = q.queue AND j.status = 'queued' AND j.published_at IS NOT NULL
    )) FROM unnest(%(queues)s::text[]) AS q (queue)
) AS published, (SELECT count(*) FROM jobs WHERE status = 'running' AND lease_expires_at < now()) AS expired
"""
RUNNING_BY_WORKER = """
SELECT COALESCE(worker, 'unknown') AS worker, count(*) AS jobs,
    EXTRACT(EPOCH FROM now() - COALESCE(max(heartbeat_at), min(created_at)))::float AS heartbeat_age
FROM jobs WHERE status = 'running' GROUP BY 1
"""

# Each count reads one partial index, which holds only rows in that state, and of each sort of waiting rows no more than
# `most` (null: all of them): where they come to less, `queued` is exact.
QUEUE_COUNTS = f"""
SELECT q.queue AS name,
    (SELECT count(*) FROM (SELECT FROM jobs j WHERE j.queue = q.queue AND j.status = 'queued'
        AND j.published_at IS NULL AND NOT j.short LIMIT %(most)s) AS waiting)
  + (SELECT count(*) FROM (SELECT FROM jobs j WHERE j.queue = q.queue AND j.status = 'queued'
        AND j.published_at IS NOT NULL LIMIT %(most)s) AS published)
  + (SELECT count(*) FROM (SELECT FROM jobs j WHERE j.queue = q.queue AND j.status = 'queued'
        AND j.short LIMIT %(most)s) AS short)
    AS queued,
    (SELECT count(*) FROM jobs j WHERE j.queue = q.queue AND j.status = 'running') AS running,
    EXTRACT(EPOCH FROM now() - LEAST(
        {_oldest_due(WAITS_OUTSIDE)},
        {_oldest_due(SHORT_DUE)},
        (SELECT min(j.run_at) FROM jobs j WHERE j.queue = q.queue AND j.status = 'queued'
            AND j.published_at IS NOT NULL)
    ))::float AS oldest_queued_seconds
FROM unnest(%(queues)s::text[]) WITH ORDINALITY AS q (queue, position) ORDER BY q.position
"""
