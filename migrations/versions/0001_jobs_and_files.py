"""jobs with their steps, attempts and files, and the state machine that guards them"""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = """
CREATE TABLE files (
    id            uuid PRIMARY KEY,
    name          text NOT NULL,
    size          bigint NOT NULL,
    content_type  text NOT NULL,
    sha256        text NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT files_size_check CHECK (size >= 0)
);

CREATE TABLE jobs (
    id                   uuid PRIMARY KEY,
    kind                 text NOT NULL,
    status               text NOT NULL DEFAULT 'queued',
    priority             text NOT NULL,
    queue                text NOT NULL,
    payload              jsonb NOT NULL,
    result               jsonb,
    error                jsonb,
    progress             jsonb,
    attempt              integer NOT NULL DEFAULT 0,
    max_attempts         integer NOT NULL,
    run_at               timestamptz NOT NULL DEFAULT now(),
    created_at           timestamptz NOT NULL DEFAULT now(),
    started_at           timestamptz,
    heartbeat_at         timestamptz,
    finished_at          timestamptz,
    request_id           text,
    worker               text,
    node                 text,
    pid                  integer,
    lease_token          uuid,
    lease_expires_at     timestamptz,
    cancel_requested_at  timestamptz,
    published_at         timestamptz,
    api_key              text NOT NULL DEFAULT '',
    idempotency_key      text,
    request_hash         bytea,
    CONSTRAINT jobs_status_check CHECK (status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    CONSTRAINT jobs_priority_check CHECK (priority IN ('high', 'default', 'low')),
    CONSTRAINT jobs_attempts_check CHECK (max_attempts BETWEEN 1 AND 25 AND attempt BETWEEN 0 AND max_attempts),
    CONSTRAINT jobs_lease_while_running_check CHECK ((status = 'running') = (lease_expires_at IS NOT NULL)),
    CONSTRAINT jobs_running_has_token_check CHECK (status <> 'running' OR lease_token IS NOT NULL),
    CONSTRAINT jobs_queued_is_free_check
        CHECK (status <> 'queued' OR (lease_token IS NULL AND cancel_requested_at IS NULL)),
    CONSTRAINT jobs_finished_has_time_check
        CHECK ((status IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)),
    CONSTRAINT jobs_succeeded_has_result_check CHECK (status <> 'succeeded' OR result IS NOT NULL),
    CONSTRAINT jobs_failed_has_error_check CHECK (status <> 'failed' OR error IS NOT NULL)
) WITH (
    -- Room on each page, so that heartbeats and progress rewrite the row without touching an index.
    fillfactor = 80,
    -- By default a table of a million rows is vacuumed after 200,000 dead ones; dispatch would read past them all.
    autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000,
    autovacuum_analyze_scale_factor = 0.02
);

-- Dispatch: the oldest due rows that no message stands for.
CREATE INDEX jobs_due ON jobs (queue, run_at, id) WHERE status = 'queued' AND published_at IS NULL;
-- Repair: the rows a message should stand for; never more than the queues' windows hold.
CREATE INDEX jobs_published ON jobs (queue, published_at) WHERE status = 'queued' AND published_at IS NOT NULL;
-- Rescue and counts. On the queue, not on the lease's end: so a heartbeat changes no indexed column.
CREATE INDEX jobs_running ON jobs (queue) WHERE status = 'running';
-- Lists, newest first: everything, and one for each filter, since what a filter looks for may be rare and old.
CREATE INDEX jobs_newest ON jobs (created_at, id);
CREATE INDEX jobs_newest_of_kind ON jobs (kind, created_at, id);
CREATE INDEX jobs_newest_of_status ON jobs (status, created_at, id);
CREATE INDEX jobs_newest_of_queue ON jobs (queue, created_at, id);
CREATE UNIQUE INDEX jobs_idempotency_key ON jobs (api_key, idempotency_key) WHERE idempotency_key IS NOT NULL;

CREATE TABLE job_steps (
    job_id      uuid CONSTRAINT job_steps_job_id_fkey REFERENCES jobs (id) ON DELETE CASCADE,
    name        text,
    result      jsonb NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (job_id, name)
);

CREATE TABLE job_attempts (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job_id      uuid NOT NULL CONSTRAINT job_attempts_job_id_fkey REFERENCES jobs (id) ON DELETE CASCADE,
    attempt     integer NOT NULL,
    worker      text,
    error       jsonb NOT NULL,
    started_at  timestamptz,
    ended_at    timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX job_attempts_of_job ON job_attempts (job_id);

CREATE TABLE job_files (
    job_id   uuid CONSTRAINT job_files_job_id_fkey REFERENCES jobs (id) ON DELETE CASCADE,
    file_id  uuid CONSTRAINT job_files_file_id_fkey REFERENCES files (id) ON DELETE RESTRICT,
    PRIMARY KEY (job_id, file_id)
);
CREATE INDEX job_files_of_file ON job_files (file_id);
"""

# The moves that there are. Whoever tries another one, from this code or from psql, gets an error and no change.
STATE_MACHINE = """
CREATE FUNCTION jobs_guard_moves() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.status = 'running' AND OLD.cancel_requested_at IS NOT NULL
        AND (NEW.status NOT IN ('running', 'cancelled') OR NEW.cancel_requested_at IS NULL)
    THEN
        RAISE EXCEPTION 'job % was cancelled and cannot end otherwise', OLD.id
            USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.status = OLD.status THEN
        IF NEW.lease_token IS DISTINCT FROM OLD.lease_token THEN
            RAISE EXCEPTION 'job % is % and its lease belongs to somebody', OLD.id, OLD.status
                USING ERRCODE = 'check_violation', HINT = 'A lease token changes only with the status.';
        END IF;
        RETURN NEW;
    END IF;
    IF (OLD.status || ' -> ' || NEW.status) NOT IN (
        'queued -> running', 'queued -> cancelled',
        'running -> succeeded', 'running -> failed', 'running -> cancelled', 'running -> queued',
        'failed -> queued', 'cancelled -> queued'
    ) THEN
        RAISE EXCEPTION 'job % cannot move from % to %', OLD.id, OLD.status, NEW.status
            USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.status = 'running' AND NEW.attempt <> OLD.attempt + 1 THEN
        RAISE EXCEPTION 'job % is claimed without counting the attempt', OLD.id
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER jobs_guard_moves BEFORE UPDATE ON jobs FOR EACH ROW
    WHEN (OLD.status IS DISTINCT FROM NEW.status OR OLD.lease_token IS DISTINCT FROM NEW.lease_token
        OR (OLD.cancel_requested_at IS NOT NULL AND NEW.cancel_requested_at IS NULL))
    EXECUTE FUNCTION jobs_guard_moves();
"""


def upgrade() -> None:
    op.execute(TABLES)
    op.execute(STATE_MACHINE)


def downgrade() -> None:
    op.execute("DROP TABLE job_files, job_attempts, job_steps, jobs, files")
    op.execute("DROP FUNCTION jobs_guard_moves")
