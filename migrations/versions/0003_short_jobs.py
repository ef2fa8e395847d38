"""short jobs, which travel in groups"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
    ALTER TABLE jobs ADD COLUMN short boolean NOT NULL DEFAULT false;
    -- A worker's group: the oldest due short jobs of a queue. No message stands for one of them.
    CREATE INDEX jobs_short_due ON jobs (queue, run_at, id) WHERE status = 'queued' AND short;
    -- Dispatch would read past all of them.
    DROP INDEX jobs_due;
    CREATE INDEX jobs_due ON jobs (queue, run_at, id) WHERE status = 'queued' AND published_at IS NULL AND NOT short;
    """)


def downgrade() -> None:
    op.execute("""
    DROP INDEX jobs_due, jobs_short_due;
    CREATE INDEX jobs_due ON jobs (queue, run_at, id) WHERE status = 'queued' AND published_at IS NULL;
    ALTER TABLE jobs DROP COLUMN short;
    """)
