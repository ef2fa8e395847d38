"""What must hold after every fault. Read from PostgreSQL and from the clients' journal, never from logs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

from app.queues import JOB_QUEUES
from tests.chaos.registry import Scenario
from tests.chaos.report import Result
from tests.e2e.stack import FINAL

if TYPE_CHECKING:
    from tests.chaos.chaos import Chaos

# The API answers, or says 503.
SLOW_SECONDS = 5.0
# Keys that live as long as the service: how Celery's processes find each other, and who was killed in their middle.
LASTING = ("_kombu.binding.", "unacked")


def check(chaos: Chaos, scenario: Scenario, seconds: float) -> Result:
    """Everything, for the jobs of the scenario that has just ended."""
    prefix = chaos.load.prefix
    assert chaos.fault is not None
    lost, unfinished = lost_jobs(chaos)
    doubled = [*succeeded_twice(chaos, prefix), *repeated_calls(chaos, prefix)]
    recovery, slowest = recovered(chaos, prefix, chaos.fault[1]) if scenario.bound else (None, "")
    violations = [
        *lost,
        *unfinished,
        *doubled,
        *wrong_ends(chaos),
        *([] if scenario.reruns else started_twice(chaos)),
        *stale_writes(chaos, prefix),
        *left_a_final_status(chaos, prefix),
        *not_atomic(chaos),
        *slow_answers(chaos),
        *dishonest_readiness(chaos, scenario),
        *left_in_redis(chaos),
        *hanging_transactions(chaos),
        *chaos.violations,
    ]
    if scenario.bound and recovery is not None and recovery > scenario.bound:
        violations.append(f"recovery took {recovery:.1f} s, {scenario.bound:g} are allowed: {slowest}")
    result = Result(
        scenario=scenario.name,
        promises=scenario.promises,
        jobs=sum(entry.accepted for entry in chaos.load.entries),
        lost=len(lost) + len(unfinished),
        double=len(doubled),
        recovery=recovery,
        bound=scenario.bound,
        seconds=seconds,
        violations=violations,
    )
    result.measured.update(chaos.measured)
    return result


def recovered(chaos: Chaos, prefix: str, end: float) -> tuple[float | None, str]:
    """Seconds from the end of the fault to the first start after it of the last job that came before, and which one.

    None if there is none.

    What waits for its own retry waits from then on: only `flaky` and `webhook` fail by themselves here.
    """
    rows = chaos.sql(
        """
        SELECT key, kind, at - GREATEST(%(end)s, CASE WHEN kind IN ('flaky', 'webhook') THEN due END) AS seconds,
            (SELECT extract(epoch FROM max(q.at))::float - %(end)s FROM chaos_audit q
             WHERE q.job_id = first.job_id AND q.n < first.n AND q.old_status = 'running') AS queued
        FROM (
            SELECT DISTINCT ON (a.job_id) a.job_id, a.n, j.kind, j.idempotency_key AS key,
                extract(epoch FROM a.at)::float AS at, extract(epoch FROM a.due)::float AS due
            FROM chaos_audit a JOIN jobs j ON j.id = a.job_id
            WHERE starts_with(j.idempotency_key, %(p)s) AND a.new_status = 'running' AND a.old_status = 'queued'
                AND a.at > to_timestamp(%(end)s) AND j.created_at <= to_timestamp(%(end)s)
            ORDER BY a.job_id, a.n
        ) AS first ORDER BY seconds DESC LIMIT 1
        """,
        p=prefix,
        end=end,
    )
    if not rows:
        return None, ""
    [row] = rows
    # Back in the queue early and started late: the workers were too busy, or the machine was.
    queued = "" if row["queued"] is None else f", back in the queue after {row['queued']:.1f} s"
    return row["seconds"], f"{row['key']} ({row['kind']}){queued}"


def lost_jobs(chaos: Chaos) -> tuple[list[str], list[str]]:
    """Accepted, and no row; or a row that came to no end in time."""
    rows = {str(row["id"]): row for row in _jobs(chaos)}
    accepted = [entry for entry in chaos.load.entries if entry.accepted]
    gone = [f"lost: {entry.key} was accepted and is gone" for entry in accepted if entry.job_id not in rows]
    late = [
        f"lost: {row['idempotency_key']} ({row['kind']}) is still {row['status']}, attempt {row['attempt']}"
        for row in rows.values()
        if row["status"] not in FINAL
    ]
    return gone, late


def wrong_ends(chaos: Chaos) -> list[str]:
    """Ended otherwise than it should: a fault of the service is no reason for a job to fail."""
    expected = {entry.key: entry.ends for entry in chaos.load.entries}
    return [
        f"wrong end: {row['idempotency_key']} ({row['kind']}) is {row['status']} and not {wanted}: {row['error']}"
        for row in _jobs(chaos)
        if row["status"] in FINAL and (wanted := expected[row["idempotency_key"]]) not in (row["status"], "any")
    ]


def succeeded_twice(chaos: Chaos, prefix: str) -> list[str]:
    rows = chaos.sql(
        """SELECT j.idempotency_key, count(*) FROM chaos_audit a JOIN jobs j ON j.id = a.job_id
        WHERE starts_with(j.idempotency_key, %(p)s) AND a.new_status = 'succeeded' AND a.old_status <> 'succeeded'
        GROUP BY 1 HAVING count(*) > 1""",
        p=prefix,
    )
    return [f"double: {row['idempotency_key']} succeeded {row['count']} times" for row in rows]


def started_twice(chaos: Chaos) -> list[str]:
    """Where no worker died, no job needs a second attempt but those that fail on purpose."""
    return [
        f"run again: {row['idempotency_key']} ({row['kind']}) needed {row['attempt']} attempts"
        for row in _jobs(chaos)
        if row["kind"] in ("sleep", "text_report") and row["attempt"] > 1
    ]


def repeated_calls(chaos: Chaos, prefix: str) -> list[str]:
    """Calls to somebody else's API after the answer to one was recorded. Both clocks are the engine's."""
    rows = chaos.sql(
        """SELECT j.idempotency_key, j.id, extract(epoch FROM s.created_at)::float AS recorded
        FROM job_steps s JOIN jobs j ON j.id = s.job_id
        WHERE starts_with(j.idempotency_key, %(p)s) AND j.kind = 'webhook' AND s.name = 'call'""",
        p=prefix,
    )
    if not rows:
        return []
    recorded = {str(row["id"]): row for row in rows}
    return [
        f"double: {recorded[call['key']]['idempotency_key']} called again after its answer was recorded"
        for call in chaos.calls()
        if call["key"] in recorded and call["at"] > recorded[call["key"]]["recorded"]
    ]


def stale_writes(chaos: Chaos, prefix: str) -> list[str]:
    """A claim that was written to by somebody who no longer held it.

    Out of `running` only the newest claim's token may lead; and a `sleep` that succeeded sooner after its last claim
    than it sleeps was ended by an earlier one.
    """
    rows = chaos.sql(
        """
        WITH moves AS (
            SELECT a.*, j.idempotency_key, j.kind, j.payload,
                max(a.n) FILTER (WHERE a.new_status = 'running' AND a.old_status = 'queued') OVER before AS claim
            FROM chaos_audit a JOIN jobs j ON j.id = a.job_id WHERE starts_with(j.idempotency_key, %(p)s)
            WINDOW before AS (PARTITION BY a.job_id ORDER BY a.n ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
        )
        SELECT m.idempotency_key, m.new_status, c.new_token IS DISTINCT FROM m.old_token AS foreign_token
        FROM moves m LEFT JOIN chaos_audit c ON c.n = m.claim
        WHERE m.old_status = 'running' AND m.new_status <> 'running' AND (
            c.new_token IS DISTINCT FROM m.old_token
            OR (m.new_status = 'succeeded' AND m.kind = 'sleep'
                AND m.at - c.at < (m.payload->>'seconds')::float * interval '0.99 second')
        )
        """,
        p=prefix,
    )
    return [f"stale: {row['idempotency_key']} was moved to {row['new_status']} by an earlier claim" for row in rows]


def left_a_final_status(chaos: Chaos, prefix: str) -> list[str]:
    rows = chaos.sql(
        """SELECT j.idempotency_key, a.old_status, a.new_status FROM chaos_audit a JOIN jobs j ON j.id = a.job_id
        WHERE starts_with(j.idempotency_key, %(p)s) AND a.old_status = ANY(%(final)s)
            AND a.new_status <> a.old_status""",
        p=prefix,
        final=list(FINAL),
    )
    return [f"undone: {row['idempotency_key']} went from {row['old_status']} to {row['new_status']}" for row in rows]


def not_atomic(chaos: Chaos) -> list[str]:
    """Each request has a clear answer in the end; an accepted one a row, the one that was named, a refused one none."""
    rows = {row["idempotency_key"]: str(row["id"]) for row in _jobs(chaos)}
    found = []
    for entry in chaos.load.entries:
        if entry.status is None or entry.status >= 500:
            found.append(f"unclear: {entry.key} got {entry.status or entry.error} for all its {entry.sent} requests")
        elif rows.get(entry.key) != entry.job_id:
            found.append(f"not atomic: {entry.key} was answered {entry.job_id}, the row is {rows.get(entry.key)}")
    return found


def slow_answers(chaos: Chaos) -> list[str]:
    slow = [(entry.key, entry.seconds) for entry in chaos.load.entries if entry.seconds > SLOW_SECONDS]
    slow += [(answer.path, answer.seconds) for answer in chaos.probe.answers if answer.seconds > SLOW_SECONDS]
    return [f"slow: {what} was answered after {seconds:.1f} s" for what, seconds in slow]


def dishonest_readiness(chaos: Chaos, scenario: Scenario) -> list[str]:
    """What a platform was told: alive all the time, and ready exactly as far as it was true."""
    if scenario.ready is None or chaos.fault is None:
        return []
    begin, end = chaos.fault
    during = [answer for answer in chaos.probe.answers if begin < answer.at < end]
    said = {answer.status for answer in during if answer.path == "/health/ready"}
    found = [f"readiness: /health/live failed {len(dead)} times"] if (dead := _dead(during)) else []
    if scenario.ready not in said:
        found.append(f"readiness: never said {scenario.ready}, but {said}")
    if said - {"ok", "degraded", scenario.ready}:
        found.append(f"readiness: said {said}, worse than {scenario.ready}")
    return found


def _dead(answers: list[Any]) -> list[Any]:
    return [answer for answer in answers if answer.path == "/health/live" and answer.status != "ok"]


def left_in_redis(chaos: Chaos, seconds: float = 15) -> list[str]:
    """All is done: the lists are empty, nobody but the killed holds a message, and every other key expires.

    A copy of a message may still be on its way, so it may take `seconds`.
    """
    end = time.monotonic() + seconds
    while (found := _left_in_redis(chaos)) and time.monotonic() < end:
        time.sleep(0.2)
    return found


def _left_in_redis(chaos: Chaos) -> list[str]:
    client = cast(Any, chaos.redis)
    found = [f"redis: {length} messages are left in {queue}" for queue in JOB_QUEUES if (length := client.llen(queue))]
    # One more than the children of a worker for each that was killed; rescue does not wait for them.
    if (held := client.hlen("unacked")) > chaos.killed * (chaos.concurrency + 1) + chaos.concurrency:
        found.append(f"redis: {held} messages are held by nobody, after {chaos.killed} killed workers")
    if client.hlen("unacked") != client.zcard("unacked_index"):
        found.append("redis: unacked and unacked_index differ")
    for key in client.scan_iter(count=1000):
        known = key.startswith(LASTING) or key in (*JOB_QUEUES, "maintenance")
        if not known and client.ttl(key) == -1:
            found.append(f"redis: {key} never expires")
    return found


def hanging_transactions(chaos: Chaos) -> list[str]:
    rows = chaos.sql(
        """SELECT application_name, state, extract(epoch FROM now() - xact_start)::float AS seconds
        FROM pg_stat_activity WHERE datname = 'jobstack' AND pid <> pg_backend_pid()
            AND backend_type = 'client backend' AND now() - xact_start > interval '5 seconds'"""
    )
    return [f"transaction: {row['application_name']} is {row['state']} for {row['seconds']:.0f} s" for row in rows]


def _jobs(chaos: Chaos) -> list[Any]:
    return chaos.sql(
        "SELECT id, kind, status, attempt, error, idempotency_key FROM jobs "
        "WHERE starts_with(idempotency_key, %(p)s) ORDER BY id",
        p=chaos.load.prefix,
    )
