"""For migrations of tables that are in use: docs/migrations.md."""

from alembic import op


def build_index(name: str, definition: str, *, unique: bool = False) -> None:
    """Builds an index while the table is read and written: `build_index("jobs_due", "jobs (queue, run_at)")`.

    Commits what the migration did before, so that must be able to run twice.
    """
    with op.get_context().autocommit_block():
        # A build that broke off leaves an index that every write keeps up to date and no query uses.
        op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
        op.execute(f"CREATE {'UNIQUE ' if unique else ''}INDEX CONCURRENTLY {name} ON {definition}")
