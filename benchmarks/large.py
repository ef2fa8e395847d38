"""`--large`: whether a million jobs cost more than a few, queued or finished."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

from app.database import Database
from app.jobs import messages
from app.jobs.dispatch import dispatch
from app.settings import get_settings
from benchmarks.contenders import Jobstack
from benchmarks.noise import watched
from benchmarks.servers import Bench
from tests.waiting import until

FEW_QUEUED, FEW_FINISHED, MANY = 10_000, 1_000, 1_000_000
TICKS, REQUESTS, DRAINED = 20, 300, 2_000
Figures = tuple[dict[str, float], dict[str, float]]

# As the API inserts them, but for who asked. In the order of their times and ids, as they come in life: jobs that are
# next to one another in the queue lie on the same page.
QUEUED = """
INSERT INTO jobs (id, kind, priority, queue, payload, max_attempts, created_at, run_at)
SELECT uuidv7(), 'flaky', 'default', 'default', '{"failures": 0}', 4, at, at
FROM (SELECT now() - (%(count)s - n) * interval '1 millisecond' AS at FROM generate_series(1, %(count)s) AS n) AS made
"""
# Thirty days of jobs of five kinds in three queues, a tenth of them failed: pages are as full among few as among many.
FINISHED = """
INSERT INTO jobs (id, kind, priority, queue, payload, max_attempts, attempt, status, result, error,
                  created_at, run_at, started_at, heartbeat_at, finished_at, worker, lease_token)
SELECT uuidv7(), (ARRAY['sleep', 'text_report', 'thumbnail', 'waveform', 'webhook'])[1 + n %% 5],
       (ARRAY['high', 'default', 'low'])[1 + n / 50 %% 3],
       (ARRAY['high_priority', 'default', 'low_priority'])[1 + n / 50 %% 3],
       '{"seconds": 0}', 4, 1, status, CASE status WHEN 'succeeded' THEN '{"slept": 0}'::jsonb END,
       CASE status WHEN 'failed' THEN '{"type": "PermanentError", "message": "no"}'::jsonb END,
       at, at, at, at, at, 'worker@host', gen_random_uuid()
FROM (
    SELECT n, now() - n * interval '30 days' / %(count)s AS at,
           CASE n / 5 %% 10 WHEN 0 THEN 'failed' WHEN 1 THEN 'cancelled' ELSE 'succeeded' END AS status
    FROM generate_series(1, %(count)s) AS n
) AS made
"""


@dataclass
class Table:
    """A contender: the same stack with so many jobs in it."""

    name: str
    count: int


def plan(bench: Bench) -> dict[str, tuple[Callable[[Any], Figures], list[Any]]]:
    many = Table("million", MANY)
    return {
        "queued": (lambda table: queued(bench, table.count), [Table("few", FEW_QUEUED), many]),
        "finished": (lambda table: finished(bench, table.count), [Table("few", FEW_FINISHED), many]),
    }


def queued(bench: Bench, count: int) -> Figures:
    """A dispatch that fills the window, dispatches that find it full, what Redis holds then, `/api/queues`, and
    how fast workers are with the rest behind."""
    bench.reset()
    empty = _memory(bench)
    bench.db.execute(QUEUED, {"count": count})
    bench.db.execute("VACUUM ANALYZE jobs")  # as autovacuum does by itself, some time later
    bench.db.execute("CHECKPOINT")
    settings = get_settings()
    database, figures = Database(settings, "maintenance", statement_seconds=60), {}
    with messages.connect(settings) as client:

        def tick() -> float:
            began = time.perf_counter()
            dispatch(database, client, settings)
            return (time.perf_counter() - began) * 1000

        figures["dispatch of a window, ms"] = tick()
        ticks = sorted(tick() for _ in range(TICKS))
    database.close()
    figures["dispatch, ms p50"], figures["dispatch, ms max"] = ticks[TICKS // 2], ticks[-1]
    figures["Redis, MB"] = (_memory(bench) - empty) / 1e6
    ours = Jobstack(bench)
    with ours.api() as address:
        figures |= _timed(address, "/api/queues", "queues")
    with ours.working(), watched() as noise:
        until(lambda: ours.over() >= 200, "the workers work", seconds=120)
        until(lambda: _slowly(ours) >= 200 + DRAINED, "the workers go on", seconds=600)
    times = "SELECT EXTRACT(EPOCH FROM finished_at)::float FROM jobs WHERE status = 'succeeded' ORDER BY finished_at"
    ends = [end for (end,) in bench.db.execute(times)]
    figures["jobs/s"] = DRAINED / (ends[200 + DRAINED - 1] - ends[200 - 1])
    return figures, noise


def finished(bench: Bench, count: int) -> Figures:
    """One job, and a page of them by each filter, from the top and from deep inside."""
    bench.reset()
    bench.db.execute(FINISHED, {"count": count})
    bench.db.execute("VACUUM ANALYZE jobs")
    bench.db.execute("CHECKPOINT")
    ids = [str(found) for (found,) in bench.db.execute("SELECT id FROM jobs ORDER BY random() LIMIT %s", [REQUESTS])]
    deep = bench.row(
        """SELECT (EXTRACT(EPOCH FROM created_at) * 1000000)::bigint || '-' || replace(id::text, '-', '')
           FROM jobs ORDER BY created_at OFFSET %s LIMIT 1""",
        count // 2,
    )[0]
    figures: dict[str, float] = {}
    with Jobstack(bench).api() as address, watched() as noise:
        figures |= _timed(address, [f"/api/jobs/{job}" for job in ids], "get")
        for name, query in {
            "list": "",
            "by kind": "?kind=webhook",
            "by queue": "?queue=low_priority",
            "by status": "?status=failed",
            "by an empty status": "?status=running",
            "by all three": "?status=failed&kind=thumbnail&queue=default&limit=5",
            "deep": f"?cursor={deep}",
        }.items():
            figures |= _timed(address, f"/api/jobs{query}", name)
        figures |= _timed(address, "/api/queues", "queues")
    # Less at the mercy of a busy machine than the times are.
    figures["CPU ms/request"] = noise["cpu_seconds"] / (REQUESTS * len(figures) / 2) * 1000
    return figures, noise


def _memory(bench: Bench) -> int:
    return int(bench.redis.client.info("memory")["used_memory"])  # type: ignore[index]


def _slowly(ours: Jobstack) -> int:
    time.sleep(0.2)
    return ours.over()


def _timed(address: str, paths: str | list[str], name: str) -> dict[str, float]:
    """Over one connection, one after the other."""
    connection = HTTPConnection(address.removeprefix("http://"), timeout=10)
    times = []
    for path in [paths] * REQUESTS if isinstance(paths, str) else paths:
        began = time.perf_counter()
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        times.append((time.perf_counter() - began) * 1000)
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status}")
    connection.close()
    times.sort()
    return {f"{name}, ms p50": times[len(times) // 2], f"{name}, ms p99": times[int(len(times) * 0.99)]}
