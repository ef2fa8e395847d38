"""POST /api/jobs and /api/jobs/batch: what becomes a row, and how often."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from http.client import HTTPConnection
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from psycopg.rows import DictRow

from app.jobs import create
from app.jobs.messages import job_id_of
from tests.integration.api.conftest import NOOP, count, created, problem, waiting
from tests.processes import Process
from tests.servers import Redis
from tests.waiting import until

Db = psycopg.Connection[DictRow]


def test_the_answer_is_the_job_and_the_row_is_there(api: httpx.Client, db: Db) -> None:
    answer = api.post("/api/jobs", json=NOOP, headers={"X-Request-ID": "mine.1"})
    job = created(answer)
    assert answer.headers["location"] == f"/api/jobs/{job['id']}"
    assert UUID(job["id"]).version == 7
    times = ("run_at", "created_at")
    moment = datetime.fromisoformat(job["created_at"])
    assert job["created_at"].endswith("Z")
    assert abs(datetime.now(UTC) - moment) < timedelta(minutes=1)
    assert {name: value for name, value in job.items() if name not in ("id", *times)} == {
        "kind": "flaky",
        "status": "queued",
        "priority": "default",
        "queue": "default",
        "payload": {"failures": 0, "error": "transient"},
        "result": None,
        "error": None,
        "progress": None,
        "attempt": 0,
        "max_attempts": 4,
        "started_at": None,
        "heartbeat_at": None,
        "finished_at": None,
        "worker": None,
        "request_id": "mine.1",
    }
    assert api.get(answer.headers["location"]).json() == job
    [row] = db.execute("SELECT id, status FROM jobs").fetchall()
    assert (str(row["id"]), row["status"]) == (job["id"], "queued")


def test_its_message_waits_in_the_queue_of_its_priority(api: httpx.Client, redis: Redis) -> None:
    for priority, queue in (("high", "high_priority"), ("default", "default"), ("low", "low_priority")):
        job = created(api.post("/api/jobs", json={**NOOP, "priority": priority}))
        assert (job["priority"], job["queue"]) == (priority, queue)
        [message] = until(partial(waiting, redis, queue), "the message is there")
        assert job_id_of(message) == UUID(job["id"])


def test_beyond_the_window_rows_wait_in_postgresql(serve: Callable[..., httpx.Client], db: Db, redis: Redis) -> None:
    api = serve(queue_window=3)
    for _ in range(3):
        created(api.post("/api/jobs", json=NOOP))
    until(lambda: len(waiting(redis, "default")) == 3, "the window is full")
    for _ in range(5):
        created(api.post("/api/jobs", json=NOOP))
    until(lambda: waiting(redis, "maintenance"), "dispatch is asked for")
    assert len(waiting(redis, "default")) == 3
    [row] = db.execute("SELECT count(*) AS n FROM jobs WHERE published_at IS NULL")
    assert row["n"] == 5


def test_calls_at_once_share_one_window(serve: Callable[..., httpx.Client], redis: Redis) -> None:
    api = serve(queue_window=3)
    batch = {"jobs": [NOOP] * 2}
    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(api.post, "/api/jobs", json=NOOP) for _ in range(20)]
        answers += [pool.submit(api.post, "/api/jobs/batch", json=batch) for _ in range(20)]
    assert {answer.result().status_code for answer in answers} == {202}
    until(lambda: waiting(redis, "maintenance"), "dispatch is asked for")
    assert len(waiting(redis, "default")) <= 3


# --- when, and how often ---------------------------------------------------------------------------------------------


def in_days(days: float, hours_east: int = 0) -> str:
    return (datetime.now(UTC) + timedelta(days=days)).astimezone(timezone(timedelta(hours=hours_east))).isoformat()


@pytest.mark.parametrize(("days", "hours_east"), [(1, 0), (1, -12), (365, 14)])
def test_a_later_job_has_no_message_yet(api: httpx.Client, db: Db, days: int, hours_east: int) -> None:
    moment = in_days(days, hours_east)
    job = created(api.post("/api/jobs", json={**NOOP, "run_at": moment}))
    assert datetime.fromisoformat(job["run_at"]) == datetime.fromisoformat(moment)
    assert job["run_at"].endswith("Z")
    assert db.execute("SELECT published_at FROM jobs").fetchall() == [{"published_at": None}]


PAST = ["2020-02-29t12:00:00z", "2020-01-01T00:00:00.123456-12:00", "1999-12-31T23:59:59Z", "0001-01-01T00:00:00+14:00"]


@pytest.mark.parametrize("moment", [*PAST, None])
def test_a_time_in_the_past_means_now(api: httpx.Client, moment: str | None) -> None:
    job = created(api.post("/api/jobs", json={**NOOP, "run_at": moment}))
    assert job["run_at"] == job["created_at"]


def test_over_a_year_ahead_is_refused(api: httpx.Client, db: Db) -> None:
    answer = api.post("/api/jobs", json={**NOOP, "run_at": in_days(367)})
    assert "at most a year" in problem(answer, 422, "invalid-request")["detail"]
    assert count(db) == 0


@pytest.mark.parametrize("attempts", [1, 25])
def test_attempts_at_the_bounds(api: httpx.Client, attempts: int) -> None:
    job = created(api.post("/api/jobs", json={**NOOP, "max_attempts": attempts}))
    assert job["max_attempts"] == attempts


@pytest.mark.parametrize("text", ['"', "\\", '\\"', "{}", "a,b", "NULL", "%s %(id)s", "ü\n\t'"])
def test_odd_characters_arrive_as_they_are(api: httpx.Client, db: Db, text: str) -> None:
    payload = {"url": "http://a.test", "body": {text: [text]}}
    item = {"kind": "webhook", "payload": payload, "idempotency_key": text.encode("ascii", "ignore").decode().strip()}
    [made] = created(api.post("/api/jobs/batch", json={"jobs": [item]}))["jobs"]
    assert made["payload"]["body"] == payload["body"]
    assert api.get(f"/api/jobs/{made['id']}").json() == made
    [row] = db.execute("SELECT idempotency_key FROM jobs")
    assert row["idempotency_key"] == item["idempotency_key"]
    [again] = created(api.post("/api/jobs/batch", json={"jobs": [item]}))["jobs"]
    assert again == made


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_jobs_files_are_noted(api: httpx.Client, db: Db, upload: Callable[..., str]) -> None:
    file_id = upload("a.txt", b"a")
    job = created(api.post("/api/jobs", json={"kind": "text_report", "payload": {"file_id": file_id}}))
    [row] = db.execute("SELECT job_id, file_id FROM job_files").fetchall()
    assert (str(row["job_id"]), str(row["file_id"])) == (job["id"], file_id)


@pytest.mark.parametrize("batch", [False, True])
def test_an_unknown_file_makes_no_row(api: httpx.Client, db: Db, upload: Callable[..., str], batch: bool) -> None:
    known, unknown = upload("a.txt", b"a"), str(uuid4())
    items = [{"kind": "text_report", "payload": {"file_id": file_id}} for file_id in (known, unknown)]
    answer = api.post("/api/jobs/batch", json={"jobs": items}) if batch else api.post("/api/jobs", json=items[1])
    detail = problem(answer, 422, "unknown-file")["detail"]
    assert unknown in detail
    assert known not in detail
    assert count(db) == count(db, "job_files") == 0


# --- calls that come together -----------------------------------------------------------------------------------------


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is refused because the table was locked for long, as it is where the machine is busy."""
    monkeypatch.setattr(create, "TURN_SECONDS", 60)


@contextmanager
def held_up(api: httpx.Client, db: Db, bodies: list[Any], **headers: str) -> Iterator[list[HTTPConnection]]:
    """One connection a body, each with its POST sent and read by the API, while the table takes no rows."""
    connections = [HTTPConnection(api.base_url.host, api.base_url.port or 80, timeout=20) for _ in bodies]
    with db.transaction():
        db.execute("LOCK TABLE jobs IN SHARE ROW EXCLUSIVE MODE")
        for connection, body in zip(connections, bodies, strict=True):
            connection.request("POST", "/api/jobs", json.dumps(body), {"Content-Type": "application/json"} | headers)
        for _ in range(3):  # the API reads its connections in turn
            api.get("/health/live")
        yield connections


def answered(connection: HTTPConnection) -> tuple[int, dict[str, Any]]:
    with closing(connection):
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


@pytest.mark.usefixtures("patience")
def test_they_share_a_statement_and_a_commit(api: httpx.Client, db: Db, redis: Redis) -> None:
    with held_up(api, db, [NOOP] * 30) as connections:
        pass
    answers = [answered(connection) for connection in connections]
    assert {status for status, _ in answers} == {202}
    assert len({job["id"] for _, job in answers}) == count(db) == 30
    # Two go ahead, each alone; the others have gathered meanwhile.
    [row] = db.execute("SELECT count(DISTINCT xmin::text) AS transactions FROM jobs").fetchall()
    assert row["transactions"] <= 4
    until(lambda: redis.length("default") == 30, "each has its message")


@pytest.mark.usefixtures("patience")
def test_each_has_its_own_error(api: httpx.Client, db: Db, upload: Callable[..., str]) -> None:
    there, missing = upload("a", b"a"), str(uuid4())
    known, unknown = ({"kind": "text_report", "payload": {"file_id": file_id}} for file_id in (there, missing))
    bodies = [NOOP, NOOP, NOOP, known, unknown, NOOP, known]
    with held_up(api, db, bodies) as connections:
        pass
    answers = [answered(connection) for connection in connections]
    assert [status for status, _ in answers] == [202, 202, 202, 202, 422, 202, 202]
    assert missing in answers[4][1]["detail"]
    assert count(db) == 6
    for body, (_, job) in zip(bodies, answers, strict=True):
        assert body is unknown or job["kind"] == body["kind"]


@pytest.mark.usefixtures("patience")
def test_one_key_among_them(api: httpx.Client, db: Db) -> None:
    """The same key twice in one statement, and once more with another body."""
    bodies = [NOOP, NOOP, NOOP, NOOP, {"kind": "sleep", "payload": {"seconds": 0}}]
    with held_up(api, db, bodies, **{"Idempotency-Key": "shared"}) as connections:
        pass
    answers = [answered(connection) for connection in connections]
    assert sorted(status for status, _ in answers) == [200, 200, 200, 202, 422]
    assert count(db) == 1


def test_who_was_told_503_gets_no_job_later(api: httpx.Client, db: Db) -> None:
    with held_up(api, db, [NOOP] * 12) as connections:
        assert {answered(connection)[0] for connection in connections} == {503}
    job = created(api.post("/api/jobs", json=NOOP))
    # Two were under way when the time was up: what PostgreSQL made of them, nobody here knows.
    assert count(db) <= 3
    assert job["id"] in {str(row["id"]) for row in db.execute("SELECT id FROM jobs")}


# --- one key, one job ------------------------------------------------------------------------------------------------


def post_at_once(clients: list[httpx.Client], path: str, bodies: list[Any], **options: Any) -> list[httpx.Response]:
    """Every body over a connection of its own, all released at one moment, spread over the clients' APIs.

    Each has its keys: who is told 503, as happens on a busy machine, asks again.
    """
    gate = threading.Barrier(len(bodies), timeout=60)

    def post(number: int) -> httpx.Response:
        url = clients[number % len(clients)].base_url
        # It is plain HTTP, and to read the system's authorities takes 50 ms, a hundred times here.
        with httpx.Client(base_url=url, timeout=20, verify=False) as client:  # noqa: S501

            def answer() -> httpx.Response | None:
                response = client.post(path, json=bodies[number], **options)
                return None if response.status_code == 503 else response

            client.get("/health/live")
            gate.wait()
            return until(answer, "it is taken")

    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(post, range(len(bodies))))


def test_a_hundred_at_once_with_one_key_make_one_job(
    api: httpx.Client, serve_process: Callable[..., tuple[httpx.Client, Process]], db: Db
) -> None:
    other, _ = serve_process()
    answers = post_at_once([api, other], "/api/jobs", [NOOP] * 100, headers={"Idempotency-Key": "once"})
    told = Counter(answer.status_code for answer in answers)
    # None, if the one that made the job was told 503 before and had to ask again.
    assert told[202] <= 1
    assert told[200] + told[202] == 100
    [row] = db.execute("SELECT id FROM jobs").fetchall()
    assert {answer.json()["id"] for answer in answers} == {str(row["id"])}
    assert {answer.headers["location"] for answer in answers} == {f"/api/jobs/{row['id']}"}


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (NOOP, NOOP, True),
        # Defaults, order and spelling make no other body.
        (NOOP, {"payload": {"error": "transient", "failures": 0.0}, "kind": "flaky", "priority": None}, True),
        (
            {"kind": "webhook", "payload": {"url": "http://a.test/", "body": {"a": 1, "b": [{"c": 1, "d": 2}]}}},
            {"kind": "webhook", "payload": {"url": "http://A.test", "body": {"b": [{"d": 2, "c": 1}], "a": 1}}},
            True,
        ),
        ({**NOOP, "run_at": "2020-01-01T00:00:00Z"}, {**NOOP, "run_at": "2020-01-01T01:00:00+01:00"}, True),
        (NOOP, {"kind": "flaky", "payload": {"failures": 1}}, False),
        (NOOP, {**NOOP, "priority": "low"}, False),
        (NOOP, {**NOOP, "max_attempts": 4}, False),
        (NOOP, {"kind": "sleep", "payload": {"seconds": 0}}, False),
    ],
)
def test_a_key_belongs_to_its_body(api: httpx.Client, db: Db, first: Any, second: Any, same: bool) -> None:
    headers = {"Idempotency-Key": "a key, with ~ and !"}
    job = created(api.post("/api/jobs", json=first, headers=headers))
    answer = api.post("/api/jobs", json=second, headers=headers)
    if same:
        assert (answer.status_code, answer.json()) == (200, job)
    else:
        assert "a key, with ~ and !" in problem(answer, 422, "idempotency-key-reused")["detail"]
    assert count(db) == 1


def test_a_repeated_call_gets_the_job_as_it_is_by_now(api: httpx.Client) -> None:
    headers = {"Idempotency-Key": "k" * 255}
    job = created(api.post("/api/jobs", json=NOOP, headers=headers))
    api.post(f"/api/jobs/{job['id']}/cancel")
    answer = api.post("/api/jobs", json=NOOP, headers=headers)
    assert (answer.status_code, answer.json()["id"], answer.json()["status"]) == (200, job["id"], "cancelled")


def test_every_api_key_has_its_own_idempotency_keys(serve: Callable[..., httpx.Client], db: Db) -> None:
    api = serve(api_keys=[("anna", "a"), ("otto", "o")])
    ids = [
        created(api.post("/api/jobs", json=NOOP, headers={"Idempotency-Key": "1", **sent}))["id"]
        for sent in ({"Authorization": "Bearer a"}, {"Authorization": "Bearer o"}, {})
    ]
    assert len(set(ids)) == count(db) == 3
    again = api.post("/api/jobs", json=NOOP, headers={"Idempotency-Key": "1", "Authorization": "Bearer o"})
    assert (again.status_code, again.json()["id"]) == (200, ids[1])


# --- batches ---------------------------------------------------------------------------------------------------------


def batch_of(*keys: str | None) -> dict[str, Any]:
    return {
        "jobs": [
            {"kind": "flaky", "payload": {"failures": number}, "idempotency_key": key}
            for number, key in enumerate(keys)
        ]
    }


def test_a_thousand_keep_their_order(api: httpx.Client, db: Db) -> None:
    answer = api.post("/api/jobs/batch", json=batch_of(*[None] * 1000), headers={"X-Request-ID": "bulk"})
    assert answer.status_code == 202, answer.text
    jobs = answer.json()["jobs"]
    assert [job["payload"]["failures"] for job in jobs] == list(range(1000))
    assert {job["request_id"] for job in jobs} == {"bulk"}
    stored = {str(row["id"]): row["payload"] for row in db.execute("SELECT id, payload FROM jobs")}
    assert stored == {job["id"]: job["payload"] for job in jobs}


@pytest.mark.parametrize("size", [0, 1001])
def test_other_sizes_are_refused(api: httpx.Client, db: Db, size: int) -> None:
    problem(api.post("/api/jobs/batch", json=batch_of(*[None] * size)), 422, "invalid-request")
    assert count(db) == 0


def test_one_bad_item_refuses_all(api: httpx.Client, db: Db) -> None:
    batch = batch_of(None, None, None)
    batch["jobs"][1]["payload"]["failures"] = -1
    body = problem(api.post("/api/jobs/batch", json=batch), 422, "invalid-request")
    assert body["errors"][0]["field"] == "body.jobs.1.flaky.payload.failures"
    assert count(db) == 0


def test_a_repeated_batch_gets_the_same_jobs(api: httpx.Client, db: Db) -> None:
    batch = batch_of("a", "b", "c")
    first = api.post("/api/jobs/batch", json=batch)
    second = api.post("/api/jobs/batch", json=batch)
    assert (first.status_code, second.status_code) == (202, 202)
    assert second.json() == first.json()
    assert count(db) == 3


def test_a_batch_adds_what_is_missing_in_its_place(api: httpx.Client, db: Db) -> None:
    known = created(api.post("/api/jobs", json=NOOP, headers={"Idempotency-Key": "b"}))
    batch = batch_of("a", "b", None, "d")
    batch["jobs"][1]["payload"] = NOOP["payload"]
    jobs = api.post("/api/jobs/batch", json=batch).json()["jobs"]
    assert jobs[1] == known
    assert [job["payload"]["failures"] for job in jobs] == [0, 0, 2, 3]
    assert count(db) == 4


def test_one_taken_key_refuses_the_whole_batch(api: httpx.Client, db: Db) -> None:
    created(api.post("/api/jobs", json={**NOOP, "priority": "low"}, headers={"Idempotency-Key": "b"}))
    problem(api.post("/api/jobs/batch", json=batch_of("a", "b", None)), 422, "idempotency-key-reused")
    assert count(db) == 1


def test_the_same_key_twice_in_a_batch(api: httpx.Client, db: Db) -> None:
    same = {"jobs": [{**NOOP, "idempotency_key": "a"}] * 2}
    answer = api.post("/api/jobs/batch", json=same)
    assert answer.status_code == 202, answer.text
    one, other = answer.json()["jobs"]
    assert one == other
    assert count(db) == 1
    problem(api.post("/api/jobs/batch", json=batch_of("b", "b")), 422, "idempotency-key-reused")
    assert count(db) == 1


def test_batches_with_the_same_keys_in_any_order_at_once(
    api: httpx.Client, serve_process: Callable[..., tuple[httpx.Client, Process]], db: Db
) -> None:
    other, _ = serve_process()
    jobs = batch_of(*[f"key {number}" for number in range(200)])["jobs"]
    bodies = [{"jobs": jobs}, {"jobs": jobs[::-1]}, {"jobs": jobs[100:] + jobs[:100]}, {"jobs": jobs[::2]}] * 2
    answers = post_at_once([api, other], "/api/jobs/batch", bodies)
    assert [answer.status_code for answer in answers] == [202] * len(bodies), [a.text[:300] for a in answers]
    assert count(db) == 200
    ids = {row["idempotency_key"]: str(row["id"]) for row in db.execute("SELECT id, idempotency_key FROM jobs")}
    for body, answer in zip(bodies, answers, strict=True):
        assert [job["id"] for job in answer.json()["jobs"]] == [ids[job["idempotency_key"]] for job in body["jobs"]]
