"""PostgreSQL restarts, dies, throws everybody out, is away, and has no connection left."""

import time

import psycopg

from tests.chaos.chaos import Chaos
from tests.chaos.registry import scenario

THROW_OUT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE starts_with(application_name, 'jobstack-')"


@scenario(1, 2, bound=45, ci=True, soak=True)
def postgres_restart(chaos: Chaos) -> None:
    """PostgreSQL restarts: no job whose worker lives is run again."""
    chaos.one("postgres").restart()
    chaos.postgres_answers()


@scenario(1, 2, bound=45, soak=True)
def postgres_kill(chaos: Chaos) -> None:
    """kill -9 of PostgreSQL: every job that was accepted is still there."""
    postgres = chaos.one("postgres")
    postgres.kill()
    postgres.start()
    chaos.postgres_answers()


@scenario(2, 11, bound=45, soak=True)
def postgres_throws_out(chaos: Chaos) -> None:
    """All our sessions are ended, every 3 s: no job suffers."""
    for _ in range(6):
        chaos.sql(THROW_OUT)
        time.sleep(3)


@scenario(2, 11, bound=45, rate=5, ready="unavailable", soak=True)
def postgres_away(chaos: Chaos) -> None:
    """PostgreSQL is away for two leases while jobs run: each is ended by the worker that has it, once."""
    postgres = chaos.one("postgres")
    postgres.stop()
    time.sleep(60)
    postgres.start()
    chaos.postgres_answers()


@scenario(11, bound=45, rate=5, ci=True, ready="unavailable", soak=True)
def postgres_freeze(chaos: Chaos) -> None:
    """PostgreSQL stands still: connections stay open and nothing answers; the API says 503 in time."""
    with chaos.during(chaos.one("postgres").frozen()):
        time.sleep(15)


@scenario(11, bound=45, rate=10, ready="unavailable", soak=True)
def postgres_full(chaos: Chaos) -> None:
    """All connections are taken by others."""
    taken: list[psycopg.Connection] = []
    try:
        full_until = None
        chaos.sql("SELECT 1")
        chaos.sql(THROW_OUT)
        while full_until is None or time.monotonic() < full_until:
            try:
                taken.append(psycopg.connect(chaos.conninfo))
            except psycopg.OperationalError:
                full_until = full_until or time.monotonic() + 10
                chaos.sql(THROW_OUT)  # whoever was quicker
                time.sleep(0.05)
    finally:
        for connection in taken:
            connection.close()
    chaos.measured["connections taken"] = len(taken)
