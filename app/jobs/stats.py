"""What became of jobs, by minute: counted in memory by whoever sees it, and added to PostgreSQL every few seconds.

Counters and plots are sums over these few rows, whatever `jobs` holds and however many processes there are. Nothing
that a job waits for writes them: a process that is killed takes its last seconds of counting along.
"""

import json
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Any

from psycopg.rows import DictRow

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


SUMS = f"""sum(jobs)::bigint AS jobs, sum(wait_seconds) AS wait_seconds, ARRAY[{_sums("wait_buckets")}] AS wait_buckets,
    sum(run_seconds) AS run_seconds, ARRAY[{_sums("run_buckets")}] AS run_buckets"""

_ADD = f"""
ON CONFLICT (minute, process, queue, kind, status, error) DO UPDATE SET jobs = stats.jobs + EXCLUDED.jobs,
    wait_seconds = stats.wait_seconds + EXCLUDED.wait_seconds, wait_buckets = {_added("wait_buckets")},
    run_seconds = stats.run_seconds + EXCLUDED.run_seconds, run_buckets = {_added("run_buckets")}
"""
_COLUMNS = "queue, kind, status, error, jobs, wait_seconds, wait_buckets, run_seconds, run_buckets"

# The minute is that of the write, by the database's clock: what lies behind grows no more. In order, since the children
# of a worker share its rows. Its commit waits for no disk.
FLUSH = f"""
WITH lazily AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true) AS done)
INSERT INTO job_stats AS stats (minute, process, {_COLUMNS})
SELECT date_trunc('minute', now()), %(process)s, {_COLUMNS}
FROM lazily, jsonb_to_recordset(%(rows)s::jsonb) AS counted (queue text, kind text, status text, error text,
    jobs bigint, wait_seconds float, wait_buckets bigint[], run_seconds float, run_buckets bigint[])
WHERE lazily.done IS NOT NULL ORDER BY queue, kind, status, error
{_ADD}
RETURNING 1
"""

# What no plot shows any more becomes one row for all processes and minutes, so that counters only ever grow.
ROLL_UP = f"""
WITH old AS (
    DELETE FROM job_stats WHERE minute < now() - interval '25 hours' AND minute > to_timestamp(0) RETURNING *
)
INSERT INTO job_stats AS stats (minute, process, {_COLUMNS})
SELECT to_timestamp(0), '', queue, kind, status, error, {SUMS} FROM old GROUP BY queue, kind, status, error
{_ADD}
RETURNING 1
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


class Stats:
    """The counts of one process, whose threads may share it. `process`: the worker's name, or the API's."""

    def __init__(self, process: str) -> None:
        self._process = process
        self._lock = threading.Lock()
        # (queue, kind, status, error) -> [jobs, wait seconds, wait buckets, run seconds, run buckets]
        self._rows: dict[tuple[str, str, str, str], list[Any]] = {}
        self._errors: dict[str, set[str]] = {}

    def count(
        self,
        job: DictRow | Any,
        status: str,
        *,
        waited: float | None = None,
        ran: float | None = None,
    ) -> None:
        """One more. `job` is a row or a claim; in seconds: `waited` from when it was due to its start, `ran` since."""
        queue, kind = (job["queue"], job["kind"]) if isinstance(job, dict) else (job.queue, job.kind)
        with self._lock:
            row = self._row(queue, kind, status, "")
            row[0] += 1
            if waited is not None:
                row[1] += waited
                row[2][bisect_left(BUCKETS, waited)] += 1
            if ran is not None:
                row[3] += ran
                row[4][bisect_left(BUCKETS, ran)] += 1

    def count_error(self, job: DictRow | Any, error_type: str) -> None:
        """An attempt failed with this."""
        queue, kind = (job["queue"], job["kind"]) if isinstance(job, dict) else (job.queue, job.kind)
        with self._lock:
            known = self._errors.setdefault(kind, set())
            if len(known) < MOST_ERRORS:
                known.add(error_type)
            self._row(queue, kind, ERROR, error_type if error_type in known else OTHER)[0] += 1

    def count_ends(self, rows: Iterable[DictRow], error_type: str) -> None:
        """Attempts that somebody else ended: rows as `_end_attempt` and `_hand_back` in `statements.py` return them."""
        for row in rows:
            uncounted = row.get("uncounted", True)
            outcome = row["status"] if row["status"] != "queued" else HANDED_BACK if uncounted else RETRY
            self.count(row, outcome)
            if outcome in (RETRY, FAILED):
                self.count_error(row, error_type)

    def _row(self, queue: str, kind: str, status: str, error: str) -> list[Any]:
        key = (queue, kind, status, error)
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = [0, 0.0, [0] * (len(BUCKETS) + 1), 0.0, [0] * (len(BUCKETS) + 1)]
        return row

    def take(self) -> dict[str, Any] | None:
        """The parameters of FLUSH, and counting begins anew; None if there is nothing. `put_back` if it failed."""
        with self._lock:
            rows, self._rows = self._rows, {}
        if not rows:
            return None
        names = _COLUMNS.split(", ")
        return {
            "process": self._process,
            "rows": json.dumps([dict(zip(names, (*key, *row), strict=True)) for key, row in rows.items()]),
        }

    def put_back(self, taken: dict[str, Any]) -> None:
        """What could not be written is counted with the next."""
        for row in json.loads(taken["rows"]):
            with self._lock:
                ours = self._row(row["queue"], row["kind"], row["status"], row["error"])
                ours[0] += row["jobs"]
                for place, name in ((1, "wait"), (3, "run")):
                    ours[place] += row[f"{name}_seconds"]
                    ours[place + 1] = [a + b for a, b in zip(ours[place + 1], row[f"{name}_buckets"], strict=True)]

    def flush(self, run: Callable[[str, dict[str, Any]], object]) -> None:
        """Adds what was counted to the table. Raises what `run(statement, params)` raises, and keeps the counts."""
        taken = self.take()
        if taken is None:
            return
        try:
            run(FLUSH, taken)
        except BaseException:
            self.put_back(taken)
            raise
