"""Triggers that write down every move of a job and of a tick, in its own transaction. They go with the stack."""

JOBS = """
CREATE TABLE chaos_audit (
    n            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at           timestamptz NOT NULL DEFAULT clock_timestamp(),
    job_id       uuid NOT NULL,
    old_status   text NOT NULL,
    new_status   text NOT NULL,
    attempt      integer NOT NULL,
    due          timestamptz NOT NULL,  -- run_at as it was before
    old_token    uuid,
    new_token    uuid,
    worker       text,
    cancelled    boolean NOT NULL
);
CREATE INDEX ON chaos_audit (job_id, n);

CREATE FUNCTION chaos_write() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO chaos_audit (job_id, old_status, new_status, attempt, due, old_token, new_token, worker, cancelled)
    VALUES (NEW.id, OLD.status, NEW.status, NEW.attempt, OLD.run_at, OLD.lease_token, NEW.lease_token, NEW.worker,
            NEW.cancel_requested_at IS NOT NULL);
    RETURN NULL;
END
$$;
CREATE TRIGGER chaos_write AFTER UPDATE ON jobs FOR EACH ROW
    WHEN (OLD.status <> NEW.status OR OLD.lease_token IS DISTINCT FROM NEW.lease_token
          OR OLD.cancel_requested_at IS DISTINCT FROM NEW.cancel_requested_at)
    EXECUTE FUNCTION chaos_write();
"""

TICKS = """
CREATE TABLE chaos_ticks (
    n           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    entry       text NOT NULL,
    due_at      timestamptz NOT NULL,
    what        text NOT NULL
);
CREATE FUNCTION chaos_tick() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.sent_at IS NOT NULL AND (TG_OP = 'INSERT' OR NEW.sent_at IS DISTINCT FROM OLD.sent_at) THEN
        INSERT INTO chaos_ticks (entry, due_at, what) VALUES (NEW.entry, NEW.due_at, 'sent');
    END IF;
    IF TG_OP = 'UPDATE' AND NEW.started_at IS NOT NULL AND NEW.started_at IS DISTINCT FROM OLD.started_at THEN
        INSERT INTO chaos_ticks (entry, due_at, what) VALUES (NEW.entry, NEW.due_at, 'started');
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER chaos_tick AFTER INSERT OR UPDATE ON schedule_ticks FOR EACH ROW EXECUTE FUNCTION chaos_tick();
"""
