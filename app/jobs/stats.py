"""What became of jobs, by minute: counted in memory by whoever sees it, and added to PostgreSQL every few seconds.

Counters and plots are sums over these few rows, whatever `jobs` holds and however many processes there are. Nothing
that a job waits for writes them: a process that is killed takes its last seconds of counting along, and what may have
been written is not written again. So a count may lack something after a fault; it never counts twice.
"""

import threading
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import psycopg
from psycopg.rows import DictRow
from psycopg.sql import SQL, Composed, Literal
from psycopg.types.json import Jsonb
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from app import logs
from app.database import CONNECTION_LOST, Database

log = logs.get(__name__)

# Upper bounds, in seconds, of the histograms of waiting and running; what is longer stands behind them.
BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)
# Names of exception classes; what a library makes up at run time must not become a series each.
MOST_ERRORS = 20
OTHER = "other"

# What is counted, in the column `status`. A job is CREATED; its attempts end in one of ATTEMPTS. WITHDRAWN: cancelled
# before any. ERROR comes besides RETRY or FAILED, with its type.
CREATED, WITHDRAWN, ERROR = "created", "withdrawn", "error"
FAILED, RETRY, HANDED_BACK = "failed", "retry", "handed back"
ATTEMPTS = ("succeeded", FAILED, "cancelled", RETRY, HANDED_BACK)
# Those that end a job, and its status then.
JOB_ENDS = {"succeeded": "succeeded", FAILED: "failed", "cancelled": "cancelled", WITHDRAWN: "cancelled"}


def _sums(buckets: str) -> str:
    """An array of sums, place by place."""
    return ", ".join(f"COALESCE(sum({buckets}[{place}]), 0)::bigint" for place in range(1, len(BUCKETS) + 2))


def _added(buckets: str) -> str:
    return f"""(SELECT array_agg(COALESCE(old, 0) + COALESCE(new, 0) ORDER BY place)
        FROM unnest(stats.{buckets}, EXCLUDED.{buckets}) WITH ORDINALITY AS pair (old, new, place))"""


# Whole microseconds: a sum of floats depends on the order of the rows, and a counter that falls by a hair has begun
# anew to Prometheus.
SUMS = f"""sum(jobs)::bigint AS jobs, sum(wait_us)::bigint AS wait_us, ARRAY[{_sums("wait_buckets")}] AS wait_buckets,
    sum(run_us)::bigint AS run_us, ARRAY[{_sums("run_buckets")}] AS run_buckets"""

_ADD = f"""
ON CONFLICT (minute, process, queue, kind, status, error) DO UPDATE SET jobs = stats.jobs + EXCLUDED.jobs,
    wait_us = stats.wait_us + EXCLUDED.wait_us, wait_buckets = {_added("wait_buckets")},
    run_us = stats.run_us + EXCLUDED.run_us, run_buckets = {_added("run_buckets")}
"""
_COLUMNS = "queue, kind, status, error, jobs, wait_us, wait_buckets, run_us, run_buckets"

# The minute is that of the write, by the database's clock: what lies behind grows no more. In order, since the children
# of a worker share its rows. Its commit waits for no disk, and it waits for nobody who locks the table: a job may be
# waiting for the connection. One transaction, in which SET LOCAL holds for what comes after it, through PgBouncer too.
_FLUSH = SQL(f"""
SET LOCAL lock_timeout = '1s'; SET LOCAL synchronous_commit = off;
INSERT INTO job_stats AS stats (minute, process, {_COLUMNS})
SELECT date_trunc('minute', now()), {{process}}, {_COLUMNS}
FROM jsonb_to_recordset({{rows}}) AS counted (queue text, kind text, status text, error text,
    jobs bigint, wait_us bigint, wait_buckets bigint[], run_us bigint, run_buckets bigint[])
ORDER BY queue, kind, status, error
{_ADD}
""")

# What no plot shows any more becomes one row for all processes and minutes, so that counters only ever grow. In
# batches; it returns how many rows it took.
ROLL_UP = f"""
WITH old AS (
    DELETE FROM job_stats WHERE ctid = ANY(ARRAY(
        SELECT ctid FROM job_stats
        WHERE minute < now() - interval '25 hours' AND minute > to_timestamp(0) LIMIT 20000
    )) RETURNING *
), rolled AS (
    INSERT INTO job_stats AS stats (minute, process, {_COLUMNS})
    SELECT to_timestamp(0), '', queue, kind, status, error, {SUMS} FROM old GROUP BY queue, kind, status, error
    {_ADD}
)
SELECT count(*) AS rows FROM old
"""

# Of all time, in two parts: what lies before `minute` grows no more, and is asked for rarely.
_TOTALS = f"SELECT kind, status, error, {SUMS} FROM job_stats WHERE minute {{}} %(minute)s GROUP BY kind, status, error"
TOTALS_BEFORE, TOTALS_SINCE = _TOTALS.format("<"), _TOTALS.format(">=")
# A flush takes seconds at the most.
SETTLED_MINUTE = "SELECT date_trunc('minute', now()) - interval '2 minutes' AS minute"
LAST_HOUR = """
SELECT EXTRACT(EPOCH FROM date_trunc('minute', now()) - minute)::int / 60 AS minutes_ago, queue, kind, status, error,
    sum(jobs)::bigint AS jobs
FROM job_stats WHERE minute > now() - interval '1 hour' GROUP BY minute, queue, kind, status, error
"""


@dataclass
class _Times:
    """A histogram of seconds, with their sum."""

    us: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))

    def add(self, seconds: float) -> None:
        self.us += round(seconds * 1e6)
        self.buckets[bisect_left(BUCKETS, seconds)] += 1

    def add_all(self, other: "_Times") -> None:
        self.us += other.us
        self.buckets = [a + b for a, b in zip(self.buckets, other.buckets, strict=True)]


@dataclass
class _Count:
    jobs: int = 0
    wait: _Times = field(default_factory=_Times)
    run: _Times = field(default_factory=_Times)


# By queue, kind, status, error.
_Counts = dict[tuple[str, str, str, str], _Count]


class Stats:
    """The counts of one process, whose threads may share it. `process`: the worker's name, or the API's."""

    def __init__(self, process: str) -> None:
        self._process = process
        self._lock = threading.Lock()
        self._counts: _Counts = {}
        self._errors: dict[str, set[str]] = {}

    def count(
        self, queue: str, kind: str, status: str, *, waited: float | None = None, ran: float | None = None
    ) -> None:
        """In seconds: `waited` from when a job was due to its start, `ran` since."""
        with self._lock:
            count = self._counts.setdefault((queue, kind, status, ""), _Count())
            count.jobs += 1
            if waited is not None:
                count.wait.add(waited)
            if ran is not None:
                count.run.add(ran)

    def count_error(self, queue: str, kind: str, error_type: str) -> None:
        """An attempt failed with this."""
        with self._lock:
            known = self._errors.setdefault(kind, set())
            if len(known) < MOST_ERRORS:
                known.add(error_type)
            error = error_type if error_type in known else OTHER
            self._counts.setdefault((queue, kind, ERROR, error), _Count()).jobs += 1

    def count_ends(self, rows: Iterable[DictRow], error_type: str = "") -> None:
        """Attempts that somebody else ended: rows as `_end_attempt` and `_hand_back` in `statements.py` return them."""
        for row in rows:
            outcome = row["status"] if row["status"] != "queued" else HANDED_BACK if row["uncounted"] else RETRY
            self.count(row["queue"], row["kind"], outcome)
            if outcome in (RETRY, FAILED):
                self.count_error(row["queue"], row["kind"], error_type)

    def flush(self, database: Database) -> None:
        """Adds what was counted to the table. Raises nothing: statistics hold up nobody, and end nothing."""
        if not self._counts:
            return
        counts, statement = self._take()
        try:
            database.run("SELECT 1")  # a connection that died while it was idle is replaced here
            database.run(statement, once=True)
        except Exception as error:  # noqa: BLE001
            self._not_written(counts, error)

    async def flush_by(self, pool: AsyncConnectionPool[psycopg.AsyncConnection[DictRow]]) -> None:
        """As `flush`."""
        if not self._counts:
            return
        counts, statement = self._take()
        try:
            async with pool.connection() as connection:
                await connection.execute(statement)
        except Exception as error:  # noqa: BLE001
            self._not_written(counts, error)

    def _take(self) -> tuple[_Counts, Composed]:
        with self._lock:
            counts, self._counts = self._counts, {}
        rows = [
            dict(zip(("queue", "kind", "status", "error"), key, strict=True))
            | {"jobs": count.jobs}
            | {f"wait_{name}": value for name, value in asdict(count.wait).items()}
            | {f"run_{name}": value for name, value in asdict(count.run).items()}
            for key, count in counts.items()
        ]
        return counts, _FLUSH.format(process=Literal(self._process), rows=Literal(Jsonb(rows)))

    def _not_written(self, counts: _Counts, error: Exception) -> None:
        # An error that PostgreSQL told of has undone it all. Where no answer came it may be there, and is not repeated.
        again = isinstance(error, PoolTimeout) or getattr(error, "sqlstate", None) is not None
        expected = isinstance(error, CONNECTION_LOST)
        event = "stats_wait" if again else "stats_lost"
        log.warning(event, error=str(error).strip(), exc_info=None if expected else error)
        if not again:
            return
        with self._lock:
            for key, count in counts.items():
                ours = self._counts.setdefault(key, _Count())
                ours.jobs += count.jobs
                ours.wait.add_all(count.wait)
                ours.run.add_all(count.run)
