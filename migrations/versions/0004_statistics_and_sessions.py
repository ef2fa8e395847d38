"""statistics of jobs, and sessions that were ended"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
    -- What became of jobs, minute by minute: counters and plots are sums of few rows, whatever `jobs` holds. Each
    -- process adds to rows of its own, so that they never wait for one another.
    CREATE TABLE job_stats (
        minute timestamptz NOT NULL,
        process text NOT NULL,
        queue text NOT NULL,
        kind text NOT NULL,
        status text NOT NULL,
        error text NOT NULL DEFAULT '',
        jobs bigint NOT NULL DEFAULT 0,
        wait_us bigint NOT NULL DEFAULT 0,
        wait_buckets bigint[] NOT NULL DEFAULT '{}',
        run_us bigint NOT NULL DEFAULT 0,
        run_buckets bigint[] NOT NULL DEFAULT '{}',
        PRIMARY KEY (minute, process, queue, kind, status, error)
    );

    -- A cookie is good until its time, wherever it is kept; but not after its owner has logged out.
    CREATE TABLE ended_sessions (
        id uuid PRIMARY KEY,
        expires_at timestamptz NOT NULL
    );
    """)


def downgrade() -> None:
    op.execute("DROP TABLE job_stats, ended_sessions")
