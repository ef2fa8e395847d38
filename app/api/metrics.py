"""`/metrics` for Prometheus. What is counted of jobs comes from PostgreSQL, so every replica says the same; requests,
streams and the pool are those of the process that answers."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, NamedTuple

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import generate_latest
from prometheus_client.core import (
    REGISTRY,
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from psycopg.rows import DictRow

from app.api.auth import key_name
from app.api.errors import Problem, responses
from app.api.overview import BeatEntry, Broker, look_at_beat, look_at_redis
from app.api.shared import Shared
from app.api.within import within
from app.database import CONNECTION_LOST
from app.jobs import statements, stats
from app.jobs.kinds import offered_kinds
from app.queues import ALL_QUEUES, JOB_QUEUES

router = APIRouter()

# However many scrape, and however often.
FRESH_SECONDS = 5.0
# What was counted more than some minutes ago does not change.
OLD_SECONDS = 300.0


class Look(NamedTuple):
    """What PostgreSQL says."""

    queues: list[DictRow]
    health: DictRow
    beat: list[BeatEntry]
    totals: list[DictRow]


class Metrics:
    """The numbers of all jobs, for one API process."""

    def __init__(self, state: Any) -> None:
        self._state = state
        self._old = Shared(self._before, OLD_SECONDS)
        self.look = Shared(self._look, FRESH_SECONDS)
        self.broker = Shared(self._broker, FRESH_SECONDS)

    async def _broker(self) -> Broker | None:
        return await look_at_redis(self._state.redis)

    async def _look(self) -> Look:
        queues, [health], beat, (minute, before) = await asyncio.gather(
            self._state.counts.now(),
            self._ask(statements.HEALTH, {"queues": list(JOB_QUEUES)}),
            look_at_beat(self._state),
            self._old.now(),
        )
        return Look(queues, health, beat, before + await self._ask(stats.TOTALS_SINCE, {"minute": minute}))

    async def _before(self) -> tuple[datetime, list[DictRow]]:
        [settled] = await self._ask(stats.SETTLED_MINUTE, {})
        return settled["minute"], await self._ask(stats.TOTALS_BEFORE, settled)

    async def _ask(self, statement: str, params: dict[str, Any]) -> list[DictRow]:
        return await within(self._state.query(statement, params))


@router.get(
    "/metrics",
    tags=["operations"],
    dependencies=[Depends(key_name)],
    response_class=PlainTextResponse,
    responses=responses(401),
)
async def metrics(request: Request) -> Response:
    """For Prometheus: jobs, queues and beat as PostgreSQL and Redis have them, and this process's own numbers."""
    state = request.app.state
    broker, look = await asyncio.gather(state.metrics.broker.now(), _look(state.metrics))
    up = {"postgres": look is not None} | ({"redis": broker is not None} if state.redis is not None else {})
    families = [_gauge("part_up", "Whether this API reaches it", "part", up.items()), *_of_process(state)]
    if look is not None:
        families += [*_of_postgres(look), *_of_jobs(look.totals, offered_kinds(state.settings))]
    if broker is not None:
        families += _of_redis(broker, look)
    return Response(
        generate_latest(_Families(families)) + generate_latest(REGISTRY),
        media_type="text/plain; version=0.0.4; charset=utf-8",
    )


async def _look(metrics: Metrics) -> Look | None:
    """None while PostgreSQL is away: Prometheus shows a gap, and the other numbers still come."""
    try:
        return await metrics.look.now()
    except (*CONNECTION_LOST, Problem):
        return None


def _gauge(name: str, text: str, label: str | None, values: Iterable[tuple[str, float]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"jobstack_{name}", text, labels=[label] if label else [])
    for value_of, value in values:
        family.add_metric([value_of] if label else [], value)
    return family


def _of_process(state: Any) -> Iterator[Metric]:
    pool = state.pool.get_stats()
    size, idle = pool.get("pool_size", 0), pool.get("pool_available", 0)
    yield _gauge(
        "pool_connections", "Connections to PostgreSQL", "state", [("used", max(0, size - idle)), ("idle", idle)]
    )
    yield _gauge("pool_waiting", "Requests that wait for a connection", None, [("", pool.get("requests_waiting", 0))])
    yield _gauge("event_streams", "Streams of events that are open", None, [("", len(state.streams))])


def _of_postgres(look: Look) -> Iterator[Metric]:
    jobs = GaugeMetricFamily("jobstack_jobs", "Jobs that are not over", labels=["queue", "status"])
    for row in look.queues:
        for status in ("queued", "running"):
            jobs.add_metric([row["name"], status], row[status])
    yield jobs
    oldest = ((row["name"], row["oldest_queued_seconds"] or 0) for row in look.queues)
    yield _gauge("oldest_queued_seconds", "How long the oldest due job has been waiting", "queue", oldest)
    expired = "Running jobs whose worker gives no sign of life any more"
    yield _gauge("leases_expired", expired, None, [("", look.health["expired"])])
    ticks = [(tick.entry, tick.last_sent_at.timestamp()) for tick in look.beat if tick.last_sent_at]
    yield _gauge("beat_last_tick_timestamp_seconds", "When beat last sent this entry", "entry", ticks)
    late = [(tick.entry, tick.late) for tick in look.beat]
    yield _gauge("beat_entry_late", "Whether this entry was due and nothing was sent", "entry", late)


def _of_redis(broker: Broker, look: Look | None) -> Iterator[Metric]:
    yield _gauge("queue_messages", "Messages in Redis", "queue", broker.messages.items())
    consumers = ((queue, broker.consumers(queue)) for queue in ALL_QUEUES)
    yield _gauge("queue_consumers", "Workers that take from it", "queue", consumers)
    if look is not None:
        # Short jobs have one message for all of them, which counts as a copy.
        drift = [(queue, look.health["published"][queue] - broker.messages[queue]) for queue in JOB_QUEUES]
        text = "Jobs that have a message by their row, less messages: above 0 some got lost, below there are copies"
        yield _gauge("queue_drift", text, "queue", drift)
    yield _gauge("redis_memory_bytes", "What Redis uses", None, [("", broker.memory_bytes)])
    yield _gauge("redis_maxmemory_bytes", "What it may use; 0: no limit", None, [("", broker.maxmemory_bytes)])
    text = "Keys that stay for ever: queues and bindings, about a dozen"
    yield _gauge("redis_keys_without_ttl", text, None, [("", broker.keys_without_ttl)])


def _of_jobs(totals: list[DictRow], kinds: Iterable[str]) -> Iterator[Metric]:
    created, finished, attempts, failures = Counter[Any](), Counter[Any](), Counter[Any](), Counter[Any]()
    waits, runs = _Histogram("job_wait_seconds"), _Histogram("job_run_seconds")
    for kind in kinds:
        # From the beginning: the first failure must be an increase, and not the birth of a series.
        finished.update({(kind, status): 0 for status in set(stats.JOB_ENDS.values())})
        attempts.update({(kind, outcome): 0 for outcome in stats.ATTEMPTS})
        created.update({(kind,): 0})
    for row in totals:
        kind, status, count = row["kind"], row["status"], row["jobs"]
        if status == stats.CREATED:
            created[(kind,)] += count
        elif status == stats.ERROR:
            failures[(kind, row["error"])] += count
        if end := stats.JOB_ENDS.get(status):
            finished[(kind, end)] += count
        if status in stats.ATTEMPTS:
            attempts[(kind, status)] += count
            waits.add(kind, row["wait_buckets"], row["wait_us"])
            runs.add(kind, row["run_buckets"], row["run_us"])
    for name, text, labels, counts in (
        ("jobs_created", "Jobs accepted", ["kind"], created),
        ("jobs_finished", "Jobs that are over", ["kind", "status"], finished),
        ("job_attempts", "Runs that ended, however", ["kind", "outcome"], attempts),
        ("job_failures", "Runs that failed, by type of error", ["kind", "error"], failures),
    ):
        family = CounterMetricFamily(f"jobstack_{name}", text, labels=labels)
        for values, count in sorted(counts.items()):
            family.add_metric(values, count)
        yield family
    yield waits.family("From when a job was due to the start of its run")
    yield runs.family("From the start of a run to its end")


class _Histogram:
    """By kind."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._counts: dict[str, list[int]] = defaultdict(lambda: [0] * (len(stats.BUCKETS) + 1))
        self._us = Counter[str]()

    def add(self, kind: str, buckets: list[int], us: int) -> None:
        self._counts[kind] = [a + b for a, b in zip(self._counts[kind], buckets, strict=True)]
        self._us[kind] += us

    def family(self, text: str) -> Metric:
        family = HistogramMetricFamily(f"jobstack_{self._name}", text, labels=["kind"])
        bounds = (*map(str, stats.BUCKETS), "+Inf")
        for kind, counts in sorted(self._counts.items()):
            below = [sum(counts[: place + 1]) for place in range(len(counts))]
            family.add_metric([kind], list(zip(bounds, below, strict=True)), self._us[kind] / 1e6)
        return family


class _Families:
    """Numbers in the shape of a registry."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
