"""short jobs, which travel in groups"""

from alembic import op

from migrations.online import build_index

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
    -- Each statement may run twice: what stands before an index that is built concurrently is committed before it.
    ALTER TABLE jobs ADD COLUMN IF NOT EXISTS short boolean NOT NULL DEFAULT false;

    -- The two moves of every job that goes well are seen to be right without a call of the function.
    CREATE OR REPLACE TRIGGER jobs_guard_moves BEFORE UPDATE ON jobs FOR EACH ROW
        WHEN ((OLD.status IS DISTINCT FROM NEW.status OR OLD.lease_token IS DISTINCT FROM NEW.lease_token
                OR (OLD.cancel_requested_at IS NOT NULL AND NEW.cancel_requested_at IS NULL))
            AND NOT (OLD.status = 'queued' AND NEW.status = 'running' AND NEW.attempt = OLD.attempt + 1)
            AND NOT (OLD.status = 'running' AND NEW.status = 'succeeded' AND OLD.cancel_requested_at IS NULL))
        EXECUTE FUNCTION jobs_guard_moves();
    """)
    # A worker's group: the oldest due short jobs of a queue. No message stands for one of them.
    build_index("jobs_short_due", "jobs (queue, run_at, id) WHERE status = 'queued' AND short")
    # Dispatch would read past all of them.
    due = "status = 'queued' AND published_at IS NULL AND NOT short"
    build_index("jobs_due_new", f"jobs (queue, run_at, id) WHERE {due}")
    # Both at once: dispatch always has one. That of older code can't use the new one and is slow until it is replaced.
    op.execute("""
    DROP INDEX jobs_due;
    ALTER INDEX jobs_due_new RENAME TO jobs_due;
    """)


def downgrade() -> None:
    op.execute("""
    DROP INDEX jobs_due, jobs_short_due;
    CREATE INDEX jobs_due ON jobs (queue, run_at, id) WHERE status = 'queued' AND published_at IS NULL;
    ALTER TABLE jobs DROP COLUMN short;

    CREATE OR REPLACE TRIGGER jobs_guard_moves BEFORE UPDATE ON jobs FOR EACH ROW
        WHEN (OLD.status IS DISTINCT FROM NEW.status OR OLD.lease_token IS DISTINCT FROM NEW.lease_token
            OR (OLD.cancel_requested_at IS NOT NULL AND NEW.cancel_requested_at IS NULL))
        EXECUTE FUNCTION jobs_guard_moves();
    """)
