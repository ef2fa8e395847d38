"""What Prometheus reads: names, values, and that every replica tells the same."""

from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families
from psycopg.rows import DictRow
from psycopg.sql import Composed

from app import workers
from app.database import Database
from app.jobs import stats
from app.jobs.stats import Stats
from app.settings import Settings
from tests.integration.api.conftest import created
from tests.servers import Postgres, Redis
from tests.waiting import until
from worker.maintenance import database_maintenance

Serve = Callable[..., httpx.Client]
Insert = Callable[..., UUID]
Db = psycopg.Connection[DictRow]
SLEEP = ("default", "sleep")


def scrape(api: httpx.Client) -> dict[str, float]:
    """'name{label=value}' -> value."""
    answer = api.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            assert f"{sample.name}{{{labels}}}" not in found, "twice"
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


@pytest.fixture(autouse=True)
def _nothing_counted(db: Db) -> None:
    db.execute("TRUNCATE job_stats")


def test_what_waits_and_what_is_wrong(serve: Serve, insert_job: Insert, redis: Redis, db: Db) -> None:
    long_ago = datetime.now(UTC) - timedelta(seconds=100)
    insert_job(published_at=long_ago, run_at=long_ago)
    insert_job(published_at=long_ago)
    running = {"status": "running", "attempt": 1, "lease_token": uuid4()}
    insert_job(**running, lease_expires_at="2100-01-01")
    insert_job(**running, lease_expires_at=long_ago)
    redis.client.lpush("default", "x")
    redis.client.set("for-ever", 1)
    redis.client.set("for-a-while", 1, ex=100)
    for name, queues in (("a@b", ("default",)), ("c@d", ("default", "low_priority"))):
        redis.client.eval(workers.SIGN, 1, workers.KEY, workers.member(name, queues))
    db.execute(
        "INSERT INTO schedule_ticks (entry, due_at, sent_at) VALUES ('cleanup_orphaned_jobs', %s, %s)", [long_ago] * 2
    )
    api = serve()
    api.get(f"/api/jobs/{uuid4()}")
    seen = scrape(api)
    assert seen["jobstack_jobs{queue=default,status=queued}"] == 2
    assert seen["jobstack_jobs{queue=default,status=running}"] == 2
    assert 100 <= seen["jobstack_oldest_queued_seconds{queue=default}"] < 130
    assert seen["jobstack_oldest_queued_seconds{queue=low_priority}"] == 0
    assert seen["jobstack_queue_messages{queue=default}"] == 1
    assert seen["jobstack_queue_drift{queue=default}"] == 1
    assert seen["jobstack_queue_consumers{queue=default}"] == 2
    assert seen["jobstack_queue_consumers{queue=maintenance}"] == 0
    assert seen["jobstack_leases_expired{}"] == 1
    assert seen["jobstack_beat_last_tick_timestamp_seconds{entry=cleanup_orphaned_jobs}"] == pytest.approx(
        long_ago.timestamp()
    )
    assert seen["jobstack_beat_entry_late{entry=cleanup_orphaned_jobs}"] == 1
    assert seen["jobstack_redis_memory_bytes{}"] > 100_000
    # The queue's list, and one that nobody should have made; signs of life expire.
    assert seen["jobstack_redis_keys_without_ttl{}"] == 2
    assert seen["jobstack_part_up{part=postgres}"] == seen["jobstack_part_up{part=redis}"] == 1
    assert seen["jobstack_pool_connections{state=idle}"] + seen["jobstack_pool_connections{state=used}"] >= 1
    assert seen["jobstack_event_streams{}"] == 0
    # The route's template: an id would make a series of its own.
    assert seen["jobstack_http_requests_total{method=GET,route=/api/jobs/{job_id},status=404}"] >= 1
    assert any(name.startswith("jobstack_http_request_duration_seconds_bucket{") for name in seen)


def test_what_was_counted(serve: Serve, database: Database) -> None:
    for process in ("one", "two"):
        ours = Stats(process)
        ours.count(*SLEEP, "succeeded", waited=0.02, ran=4)
        ours.count(*SLEEP, stats.RETRY, waited=7200, ran=0.5)
        ours.count_error(*SLEEP, "ReadTimeout")
        ours.count(*SLEEP, stats.WITHDRAWN)
        ours.count(*SLEEP, stats.CREATED)
        for _ in range(2):  # the second has nothing to add
            ours.flush(database)
    first, second = scrape(serve()), scrape(serve())
    assert first["jobstack_jobs_created_total{kind=sleep}"] == 2
    assert first["jobstack_jobs_finished_total{kind=sleep,status=succeeded}"] == 2
    assert first["jobstack_jobs_finished_total{kind=sleep,status=cancelled}"] == 2
    assert first["jobstack_jobs_finished_total{kind=sleep,status=failed}"] == 0
    assert first["jobstack_job_attempts_total{kind=sleep,outcome=retry}"] == 2
    assert first["jobstack_job_attempts_total{kind=sleep,outcome=cancelled}"] == 0
    assert first["jobstack_job_failures_total{error=ReadTimeout,kind=sleep}"] == 2
    assert first["jobstack_job_wait_seconds_bucket{kind=sleep,le=0.01}"] == 0
    assert first["jobstack_job_wait_seconds_bucket{kind=sleep,le=0.05}"] == 2
    assert first["jobstack_job_wait_seconds_bucket{kind=sleep,le=3600.0}"] == 2
    assert first["jobstack_job_wait_seconds_count{kind=sleep}"] == 4
    assert first["jobstack_job_wait_seconds_sum{kind=sleep}"] == pytest.approx(2 * 7200.02)
    assert first["jobstack_job_run_seconds_sum{kind=sleep}"] == 9
    of_jobs = [name for name in first if name.startswith("jobstack_job")]
    assert {name: second[name] for name in of_jobs} == {name: first[name] for name in of_jobs}


def test_counters_do_not_shrink_when_old_minutes_become_one_row(
    serve: Serve, settings: Settings, db: Db, redis: Redis, database: Database
) -> None:
    # As floats, these have another sum in another order.
    for hours, seconds in ((50, 0.3), (30, 0.2), (20, 0.1), (0, 0.7)):
        ours = Stats("w")
        ours.count(*SLEEP, "succeeded", waited=seconds, ran=seconds)
        ours.flush(database)
        ago = "UPDATE job_stats SET minute = minute - %s * interval '1h' WHERE minute > now() - interval '1h'"
        db.execute(ago, [hours])
    before = scrape(serve())
    for _ in range(2):
        database_maintenance.run(database, redis.client, settings)
        [row] = db.execute("SELECT count(*) AS n FROM job_stats").fetchall()
        assert row["n"] == 3
    after = scrape(serve())
    counted = [name for name in before if name.startswith(("jobstack_jobs_finished", "jobstack_job_run"))]
    assert before["jobstack_jobs_finished_total{kind=sleep,status=succeeded}"] == 4
    assert {name: after[name] for name in counted} == {name: before[name] for name in counted}


def test_a_flush_that_is_refused_waits_for_the_next(database: Database, postgres: Postgres, db: Db) -> None:
    with psycopg.connect(postgres.url) as other:
        other.execute("LOCK TABLE job_stats")
        ours = Stats("w")
        for _ in range(2):
            ours.count(*SLEEP, "succeeded", waited=0.2, ran=2)
            ours.flush(database)
        other.rollback()
        ours.flush(database)
        ours.flush(database)
    [row] = db.execute("SELECT * FROM job_stats").fetchall()
    assert (row["jobs"], row["run_us"], sum(row["run_buckets"])) == (2, 4_000_000, 2)


class Deaf(Database):
    """What it sends arrives; the answer does not, and the connection is lost."""

    def _run(self, statement: str | Composed, params: Any) -> list[DictRow]:
        rows = super()._run(statement, params)
        if isinstance(statement, Composed):
            self._close()
            raise psycopg.OperationalError("server closed the connection unexpectedly")
        return rows


def test_what_may_have_been_written_is_not_written_again(settings: Settings, db: Db) -> None:
    with closing(Deaf(settings, "test")) as database:
        ours = Stats("w")
        for _ in range(3):
            ours.count(*SLEEP, "succeeded")
            ours.flush(database)
    [row] = db.execute("SELECT sum(jobs) AS jobs FROM job_stats").fetchall()  # a minute may turn in between
    assert row["jobs"] == 3


def test_error_types_are_bounded(database: Database, db: Db) -> None:
    ours = Stats("w")
    for number in range(100):
        ours.count_error(*SLEEP, f"Error{number}")
    ours.flush(database)
    rows = {row["error"]: row["jobs"] for row in db.execute("SELECT error, jobs FROM job_stats").fetchall()}
    assert len(rows) == stats.MOST_ERRORS + 1
    assert rows["other"] == 100 - stats.MOST_ERRORS


def test_the_api_counts_what_it_does(serve: Serve, db: Db) -> None:
    api = serve(job_heartbeat_seconds=0.1)
    job = created(api.post("/api/jobs", json={"kind": "sleep", "payload": {"seconds": 0}}))
    api.post(f"/api/jobs/{job['id']}/cancel").raise_for_status()

    def counted() -> dict[str, int]:
        return {row["status"]: row["jobs"] for row in db.execute("SELECT status, jobs FROM job_stats").fetchall()}

    until(lambda: counted() == {"created": 1, "withdrawn": 1}, "both are counted")


def test_many_scrapes_are_one_look(serve: Serve, db: Db) -> None:
    api = serve()

    def commits() -> int:
        [row] = db.execute("SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()").fetchall()
        return int(row["xact_commit"])

    before = commits()
    for _ in range(50):
        scrape(api)
    assert commits() - before < 50
