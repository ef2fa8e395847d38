"""Connections to PostgreSQL: a pool for the API (async), one connection per worker process (sync).

Time limits are everywhere, since a database that is gone must not take anybody with it.
"""

import select
import threading
from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.rows import DictRow, dict_row
from psycopg.sql import Composed
from psycopg_pool import AsyncConnectionPool, PoolTimeout
from tenacity import Retrying, retry_if_exception, wait_exponential_jitter

from app.settings import Settings

# The newest migration that this code needs. A later one may be there: migrations only add what old code can live with.
SCHEMA_REVISION = "0004"

Params = Mapping[str, Any]
# What a lost or refused connection raises. Errors in a statement are not among them.
CONNECTION_LOST = (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout)


def may_pass(error: BaseException) -> bool:
    """Whether the same statement may work later. Class 54, "program limit exceeded", is an OperationalError that never
    passes: a value too large for PostgreSQL."""
    return isinstance(error, CONNECTION_LOST) and not str(getattr(error, "sqlstate", "")).startswith("54")


def conninfo(settings: Settings, process: str, *, statement_seconds: float) -> str:
    """How `process` connects; its name shows in pg_stat_activity."""
    return make_conninfo(
        settings.database_conninfo,
        application_name=f"jobstack-{process}",
        connect_timeout=3,
        # A peer that vanished (power cut, network cut) is noticed after about 15 s and not after two hours.
        keepalives_idle=5,
        keepalives_interval=5,
        keepalives_count=2,
        tcp_user_timeout=15_000,
        options=f"-c statement_timeout={int(statement_seconds * 1000)} -c timezone=UTC",
    )


class Database:
    """One sync connection, opened at first use and again after a loss. Threads may share it: they take turns.

    Opened lazily because workers fork: a connection made before the fork would be shared by all children.
    """

    def __init__(self, settings: Settings, process: str, *, statement_seconds: float = 10) -> None:
        self._conninfo = conninfo(settings, process, statement_seconds=statement_seconds)
        self._connection: psycopg.Connection[DictRow] | None = None
        self._lock = threading.Lock()

    def run(self, statement: str | Composed, params: Params | None = None, *, once: bool = False) -> list[DictRow]:
        """Runs one statement in its own transaction and returns its rows.

        A connection that died while it was idle is replaced once, without the caller noticing; but not for a statement
        that may be sent `once` only, since it may have arrived.

        Raises:
            psycopg.OperationalError: PostgreSQL cannot be reached; the statement may or may not have taken effect.
            psycopg.Error: the statement is wrong, or refused by a constraint.
        """
        with self._lock:
            fresh = self._connection is None
            try:
                return self._run(statement, params)
            except psycopg.errors.DeadlockDetected:
                return self._run(statement, params)  # the other side got through, and nothing of this was done
            except CONNECTION_LOST as error:
                if isinstance(error, psycopg.errors.QueryCanceled | psycopg.errors.LockNotAvailable):
                    raise
                self._close()
                if fresh or once:
                    raise
                return self._run(statement, params)

    def run_until_answered(self, statement: str, params: Params | None = None) -> list[DictRow]:
        """As `run`, but waits for PostgreSQL as long as it takes. What bounds it is the job's hard time limit.

        Raises:
            psycopg.Error: PostgreSQL answered, and refuses.
        """
        wait = wait_exponential_jitter(multiplier=0.1, max=2)
        return Retrying(retry=retry_if_exception(may_pass), wait=wait, reraise=True)(self.run, statement, params)

    def close(self) -> None:
        with self._lock:
            self._close()

    def _run(self, statement: str | Composed, params: Params | None) -> list[DictRow]:
        if self._connection is None:
            self._connection = psycopg.connect(self._conninfo, autocommit=True, row_factory=dict_row)
        cursor = self._connection.execute(statement, params)
        return cursor.fetchall() if cursor.description else []

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def open_pool(settings: Settings) -> AsyncConnectionPool[psycopg.AsyncConnection[DictRow]]:
    """The API's pool; to be opened by its caller. Autocommit: a single statement needs no BEGIN and COMMIT."""
    return AsyncConnectionPool(
        conninfo(settings, "api", statement_seconds=4),
        min_size=2,
        max_size=10,
        # How long a request waits for a connection before it becomes a 503.
        timeout=2,
        max_waiting=500,
        reconnect_timeout=0,
        check=_check,
        kwargs={"autocommit": True, "row_factory": dict_row},
        open=False,
    )


async def _check(connection: psycopg.AsyncConnection[Any]) -> None:
    """Costs no round trip: an idle server says nothing, so if there is something to read, it is most likely the end."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    if poll.poll(0):
        await AsyncConnectionPool.check_connection(connection)
