"""The tables, as Alembic compares them with the database. The program itself speaks SQL: see `jobs/statements.py`.

SQLAlchemy is imported by migrations only, so no process pays for it.
"""

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP, UUID

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "ck": "%(table_name)s_%(constraint_name)s_check",
    }
)

_UUID, _TIME = UUID(as_uuid=True), TIMESTAMP(timezone=True)
_NOW = text("now()")

jobs = Table(
    "jobs",
    metadata,
    Column("id", _UUID, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("status", Text, nullable=False, server_default="queued"),
    Column("priority", Text, nullable=False),
    Column("queue", Text, nullable=False),
    Column("payload", JSONB, nullable=False),
    Column("result", JSONB),
    Column("error", JSONB),
    Column("progress", JSONB),
    Column("attempt", Integer, nullable=False, server_default="0"),
    Column("max_attempts", Integer, nullable=False),
    Column("run_at", _TIME, nullable=False, server_default=_NOW),
    Column("created_at", _TIME, nullable=False, server_default=_NOW),
    Column("started_at", _TIME),
    Column("heartbeat_at", _TIME),
    Column("finished_at", _TIME),
    Column("request_id", Text),
    # Who runs it: `worker` for people, node (one start of one worker) and child pid for the parent of a dead child.
    Column("worker", Text),
    Column("node", Text),
    Column("pid", Integer),
    # The fence: made at the claim, asked for by every later write, kept on the finished row so that a finish
    # whose answer was lost can be recognised.
    Column("lease_token", _UUID),
    Column("lease_expires_at", _TIME),
    Column("cancel_requested_at", _TIME),
    Column("published_at", _TIME),
    # Runs in a group with others, at its first attempt: see `worker/short_jobs.py`.
    Column("short", Boolean, nullable=False, server_default=text("false")),
    Column("api_key", Text, nullable=False, server_default=""),
    Column("idempotency_key", Text),
    Column("request_hash", LargeBinary),
    CheckConstraint("status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", "status"),
    CheckConstraint("priority IN ('high', 'default', 'low')", "priority"),
    CheckConstraint("max_attempts BETWEEN 1 AND 25 AND attempt BETWEEN 0 AND max_attempts", "attempts"),
    CheckConstraint("(status = 'running') = (lease_expires_at IS NOT NULL)", "lease_while_running"),
    CheckConstraint("status <> 'running' OR lease_token IS NOT NULL", "running_has_token"),
    CheckConstraint("status <> 'queued' OR (lease_token IS NULL AND cancel_requested_at IS NULL)", "queued_is_free"),
    CheckConstraint(
        "(status IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)", "finished_has_time"
    ),
    CheckConstraint("status <> 'succeeded' OR result IS NOT NULL", "succeeded_has_result"),
    CheckConstraint("status <> 'failed' OR error IS NOT NULL", "failed_has_error"),
)
# What each index is for stands beside it in the migration.
for name, columns, where in (
    ("jobs_due", ("queue", "run_at", "id"), "status = 'queued' AND published_at IS NULL AND NOT short"),
    ("jobs_short_due", ("queue", "run_at", "id"), "status = 'queued' AND short"),
    ("jobs_published", ("queue", "published_at"), "status = 'queued' AND published_at IS NOT NULL"),
    ("jobs_running", ("queue",), "status = 'running'"),
    ("jobs_newest", ("created_at", "id"), None),
    ("jobs_newest_of_kind", ("kind", "created_at", "id"), None),
    ("jobs_newest_of_status", ("status", "created_at", "id"), None),
    ("jobs_newest_of_queue", ("queue", "created_at", "id"), None),
    ("jobs_idempotency_key", ("api_key", "idempotency_key"), "idempotency_key IS NOT NULL"),
):
    Index(
        name,
        *(jobs.c[column] for column in columns),
        unique=name == "jobs_idempotency_key",
        postgresql_where=None if where is None else text(where),
    )

job_steps = Table(
    "job_steps",
    metadata,
    Column("job_id", _UUID, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("result", JSONB, nullable=False),
    Column("created_at", _TIME, nullable=False, server_default=_NOW),
)

job_attempts = Table(
    "job_attempts",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("job_id", _UUID, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("worker", Text),
    Column("error", JSONB, nullable=False),
    Column("started_at", _TIME),
    Column("ended_at", _TIME, nullable=False, server_default=_NOW),
    Index("job_attempts_of_job", "job_id"),
)

files = Table(
    "files",
    metadata,
    Column("id", _UUID, primary_key=True),
    Column("name", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("content_type", Text, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("created_at", _TIME, nullable=False, server_default=_NOW),
    CheckConstraint("size >= 0", "size"),
)

# Which files a job needs: written with the job, it keeps them from clean-up and deletion.
job_files = Table(
    "job_files",
    metadata,
    Column("job_id", _UUID, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("file_id", _UUID, ForeignKey("files.id", ondelete="RESTRICT"), primary_key=True),
    Index("job_files_of_file", "file_id"),
)

# What beat sent and what became of it: see `ticks.py`.
schedule_ticks = Table(
    "schedule_ticks",
    metadata,
    Column("entry", Text, primary_key=True),
    Column("due_at", _TIME, primary_key=True),
    Column("sent_at", _TIME),
    Column("started_at", _TIME),
    Column("finished_at", _TIME),
    Column("result", JSONB),
    Column("error", Text),
)

# What became of jobs, by process and minute.
job_stats = Table(
    "job_stats",
    metadata,
    Column("minute", _TIME, primary_key=True),
    Column("process", Text, primary_key=True),
    Column("queue", Text, primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("status", Text, primary_key=True),
    Column("error", Text, primary_key=True, server_default=""),
    Column("jobs", BigInteger, nullable=False, server_default="0"),
    Column("wait_us", BigInteger, nullable=False, server_default="0"),
    Column("wait_buckets", ARRAY(BigInteger), nullable=False, server_default="{}"),
    Column("run_us", BigInteger, nullable=False, server_default="0"),
    Column("run_buckets", ARRAY(BigInteger), nullable=False, server_default="{}"),
)

# Cookies that are refused although their time is not over.
ended_sessions = Table(
    "ended_sessions",
    metadata,
    Column("id", _UUID, primary_key=True),
    Column("expires_at", _TIME, nullable=False),
)
