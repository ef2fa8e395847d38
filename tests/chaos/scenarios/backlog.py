"""Far more work than workers."""

from app.settings import Settings
from tests.chaos.chaos import Chaos
from tests.chaos.registry import scenario
from tests.waiting import until

FILL = """
INSERT INTO jobs (id, kind, priority, queue, payload, max_attempts, idempotency_key)
SELECT gen_random_uuid(), %(kind)s, 'low', 'low_priority', %(payload)s::jsonb, 4, NULL
FROM generate_series(1, %(count)s)
"""
EMPTY = "DELETE FROM jobs WHERE queue = 'low_priority' AND status = 'queued'"
STOP = "UPDATE jobs SET cancel_requested_at = now() WHERE queue = 'low_priority' AND status = 'running'"
LOW_SECONDS = 4
WINDOW = Settings.model_fields["queue_window"].default


@scenario(7, ci=True, rate=0)
def urgent_first(chaos: Chaos) -> None:
    """10,000 low jobs wait: a high one starts within one job's length, and the house is kept on time."""
    chaos.sql(FILL, kind="sleep", payload=f'{{"seconds": {LOW_SECONDS}, "steps": 4}}', count=10_000)
    busy = "SELECT count(*) FROM jobs WHERE queue = 'low_priority' AND status = 'running'"
    children = 2 * chaos.concurrency
    until(lambda: chaos.sql(busy)[0]["count"] >= children, "all children are busy", seconds=30)
    began = chaos.clock()
    high = [chaos.load.create("flaky", {"failures": 0}, priority="high") for _ in range(10)]
    # These only dispatch can find.
    found = [chaos.insert("flaky", {"failures": 0}, priority="high", queue="high_priority") for _ in range(5)]
    ids = [*(entry.job_id for entry in high), *(str(job.id) for job in found)]
    until(lambda: all(chaos.status(job_id) == "succeeded" for job_id in ids), "the high ones are done", seconds=60)
    [row] = chaos.sql(
        "SELECT max(extract(epoch FROM started_at))::float AS last FROM jobs WHERE id = ANY(%(ids)s::uuid[])", ids=ids
    )
    waited = row["last"] - began
    chaos.measured["longest wait of a high job, s"] = round(waited, 2)
    # One low job's length, and a tick of dispatch for those that were never published.
    chaos.expect(waited < LOW_SECONDS + 3, f"a high job waited for {waited:.1f} s behind low ones")
    empty(chaos)


def empty(chaos: Chaos) -> None:
    """Ends the backlog, and waits until its messages are gone."""
    chaos.sql(EMPTY)
    chaos.sql(STOP)
    chaos.drained(seconds=60)
    running = "SELECT 1 FROM jobs WHERE queue = 'low_priority' AND status = 'running'"
    until(lambda: not chaos.sql(running), "the last ones end", seconds=60)


@scenario(6, ci=True, rate=0)
def redis_stays_small(chaos: Chaos) -> None:
    """200,000 queued jobs take hardly more of Redis than 10,000; dispatch has work of milliseconds."""
    used = {}
    low = {"kind": "sleep", "payload": '{"seconds": 600, "steps": 600}'}
    for total, count in ((10_000, 10_000), (200_000, 190_000)):
        chaos.sql(FILL, **low, count=count)
        until(lambda: chaos.redis.llen("low_priority") > WINDOW * 0.9, "the window is full", seconds=60)
        # Published, and for some ticks left alone.
        mark = chaos.tick_mark()
        chaos.ticked(mark, at_least=3)
        used[total] = chaos.redis.info("memory")["used_memory"]
        chaos.measured[f"Redis with {total} queued, MB"] = round(used[total] / 1e6, 2)
        chaos.expect(chaos.redis.llen("low_priority") <= WINDOW + 2 * chaos.concurrency, "the window is exceeded")
    ratio = used[200_000] / used[10_000]
    chaos.measured["ratio"] = round(ratio, 3)
    chaos.expect(ratio <= 1.2, f"20 times the backlog take {ratio:.2f} times Redis's memory")
    chaos.measured["one dispatch, ms"] = round(chaos.dispatch_milliseconds(), 1)
    empty(chaos)
    chaos.sql("VACUUM jobs")  # the next scenario shall not read past the dead rows
