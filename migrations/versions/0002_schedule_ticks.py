"""schedule_ticks: the schedule's due times, each one a row"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
    -- due_at lies on the entry's grid, so that all beats compute the same; the key lets it fire once. app/ticks.py
    CREATE TABLE schedule_ticks (
        entry        text,
        due_at       timestamptz,
        sent_at      timestamptz,
        started_at   timestamptz,
        finished_at  timestamptz,
        result       jsonb,
        error        text,
        PRIMARY KEY (entry, due_at)
    )
    """)


def downgrade() -> None:
    op.execute("DROP TABLE schedule_ticks")
