"""Alembic's entry: one connection, one transaction, and a lock so that two releases can't migrate at once."""

from alembic import context
from sqlalchemy import create_engine, make_url, pool, text

from app.settings import get_settings
from app.tables import metadata

# Any number will do, as long as nothing else in the database uses it.
MIGRATION_LOCK = 7_261_544_021

engine = create_engine(
    make_url(get_settings().database_conninfo).set(drivername="postgresql+psycopg"), poolclass=pool.NullPool
)
with engine.begin() as connection:
    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
    # A migration that waits for a table lock makes everybody behind it wait as well: give up early instead.
    connection.execute(text("SET LOCAL lock_timeout = '5s'"))
    context.configure(connection=connection, target_metadata=metadata, compare_server_default=True)
    context.run_migrations()
