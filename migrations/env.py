"""Alembic's entry: a transaction for each migration, and a lock so that two releases can't migrate at once."""

import time
from typing import Any

import psycopg
from alembic import context
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, event, pool

from app.database import conninfo
from app.settings import get_settings
from app.tables import metadata

# Any number will do, as long as nothing else in the database uses it.
TRY_LOCK = "SELECT 1 WHERE pg_try_advisory_xact_lock(7261544021)"
LOOK_SECONDS = 0.2

where = conninfo(get_settings(), "migrate", statement_seconds=0)
engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(where), poolclass=pool.NullPool)


@event.listens_for(engine, "begin")
def _give_up_early(connection: Any) -> None:
    """Whoever waits for a table makes everybody behind it wait as well, so after this long it steps back and tries
    again later (app/migrate.py). Outside of a transaction, where indexes are built concurrently, it has no effect:
    what waits there holds up nobody."""
    connection.exec_driver_sql("SET LOCAL lock_timeout = '2s'")


def _number(migration: Any, _: Any, directives: list[Any]) -> None:
    """Counted and not drawn by lot: code compares revisions to tell older from newer."""
    head = ScriptDirectory.from_config(migration.config).get_current_head()
    directives[0].rev_id = f"{int(head or 0) + 1:04}"


def _say(ctx: Any, step: Any, heads: Any, run_args: Any) -> None:
    print(f"{step.up_revision_id} {step.up_revision.doc}: {'done' if step.is_upgrade else 'undone'}", flush=True)


# Held by a transaction of its own, so that it works through PgBouncer too, and ends with this process. CREATE INDEX
# CONCURRENTLY waits for the end of every transaction that has a snapshot, and would wait for ever for this one or for
# those that wait for it. So nobody waits inside a statement or a transaction, each try is one; and none is prepared,
# as psycopg would from the sixth on, since what was prepared keeps its snapshot until the next statement.
with psycopg.connect(where, prepare_threshold=None) as keeper, engine.connect() as connection:
    said = False
    while keeper.execute(TRY_LOCK).fetchone() is None:
        keeper.rollback()
        if not said:
            said = True
            print("Another migration is at work, waiting for its end", flush=True)
        time.sleep(LOOK_SECONDS)
    keeper.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
    context.configure(
        connection=connection,
        target_metadata=metadata,
        compare_server_default=True,
        transaction_per_migration=True,
        process_revision_directives=_number,
        on_version_apply=_say,
    )
    with context.begin_transaction():
        context.run_migrations()
