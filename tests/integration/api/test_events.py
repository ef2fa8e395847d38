"""A job's states as server-sent events, over real connections."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from queue import Queue
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from psycopg.rows import DictRow

from app.api import events
from app.api.events import event
from app.queues import ALL_QUEUES
from tests.integration.api.conftest import created, problem
from tests.processes import Process
from tests.servers import Postgres
from tests.waiting import until

Insert = Callable[..., UUID]
Db = psycopg.Connection[DictRow]
CLAIM = """UPDATE jobs SET status = 'running', attempt = attempt + 1, started_at = now(), heartbeat_at = now(),
    lease_token = gen_random_uuid(), lease_expires_at = '2100-01-01' WHERE id = %s"""
SUCCEED = """UPDATE jobs SET status = 'succeeded', result = '{"slept": 0}', finished_at = now(), lease_expires_at = NULL
    WHERE id = %s"""


def progress(db: Db, job_id: UUID, current: int) -> None:
    text = json.dumps({"current": current, "total": 100, "message": None})
    db.execute("UPDATE jobs SET progress = %s WHERE id = %s", [text, job_id])


class Listener:
    """A client that notes what it gets: events as (id, job), comments as (None, None)."""

    def __init__(self, api: httpx.Client, path: str, last_event_id: str | None = None) -> None:
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        self._got: Queue[tuple[str | None, Any]] = Queue()
        self.closed = threading.Event()
        self.error: Exception | None = None
        self._answer = api.build_request("GET", path, headers=headers, timeout=60)
        self.response = api.send(self._answer, stream=True)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        found: dict[str, str] = {}
        try:
            for line in self.response.iter_lines():
                name, _, value = line.partition(": ")
                if line:
                    found[name] = value
                elif "data" in found:
                    self._got.put((found["id"], {"event": found["event"], **json.loads(found["data"])}))
                    found = {}
                else:
                    self._got.put((None, None))
                    found = {}
        except (httpx.TransportError, httpx.StreamError) as error:
            self.error = error
        self.closed.set()

    def next(self, seconds: float = 10) -> tuple[str, dict[str, Any]]:
        """The next event, past all comments."""
        while True:
            event_id, job = self._got.get(timeout=seconds)
            if event_id is not None:
                return event_id, job

    def next_any(self, seconds: float = 10) -> tuple[str | None, Any]:
        return self._got.get(timeout=seconds)

    def all(self) -> list[dict[str, Any]]:
        """What came until the stream was closed."""
        assert self.closed.wait(15), "the stream is still open"
        assert self.error is None, "it broke off"
        return [job for event_id, job in list(self._got.queue) if event_id]


@contextmanager
def listening(api: httpx.Client, job_id: UUID | str, last_event_id: str | None = None) -> Iterator[Listener]:
    listener = Listener(api, f"/api/jobs/{job_id}/events", last_event_id)
    with closing(listener.response):
        yield listener


def test_a_job_from_its_present_state_to_its_end(api: httpx.Client, insert_job: Insert, db: Db) -> None:
    job_id = insert_job()
    with listening(api, job_id) as listener:
        headers = listener.response.headers
        assert headers["content-type"].startswith("text/event-stream")
        assert headers["cache-control"] == "no-store"
        assert headers["x-accel-buffering"] == "no"
        _, first = listener.next()
        assert first.pop("event") == "job"
        assert first == api.get(f"/api/jobs/{job_id}").json()
        db.execute(CLAIM, [job_id])
        _, second = listener.next()
        assert (second["status"], second["attempt"]) == ("running", 1)
        progress(db, job_id, 40)
        assert listener.next()[1]["progress"]["current"] == 40
        db.execute(SUCCEED, [job_id])
        assert [job["status"] for job in listener.all()] == ["succeeded"]


def test_progress_comes_twice_a_second_at_most_and_in_order(api: httpx.Client, insert_job: Insert, db: Db) -> None:
    job_id = insert_job()
    db.execute(CLAIM, [job_id])
    with listening(api, job_id) as listener:
        began, reports = time.monotonic(), 0
        while time.monotonic() < began + 3:
            reports += 1
            progress(db, job_id, reports)
        db.execute(SUCCEED, [job_id])
        seen = listener.all()
    currents = [job["progress"]["current"] for job in seen if job["progress"]]
    assert currents == sorted(currents)
    assert reports > 3 * len(seen), "this machine is too slow to show it"
    assert (seen[-1]["status"], currents[-1]) == ("succeeded", reports)
    assert len(seen) <= 2 * (time.monotonic() - began) + 2


def test_progress_right_behind_another_event_waits() -> None:
    """For the next look, which may come at any moment after the first event; a change of status does not wait."""
    row: dict[str, Any] = dict.fromkeys(("id", "started_at", "progress")) | {"status": "running", "attempt": 1}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(events, "_job_event", lambda row: row["state"].encode())
        stream = events.JobStream(events.JobEvents(events.Streams(1), None), row | {"state": "a"}, None)  # type: ignore[arg-type]
        stream.show(row | {"state": "b"})
        assert stream.seen["state"] == "a"
        stream.at -= events.TICK_SECONDS
        stream.show(row | {"state": "c"})
        assert stream.seen["state"] == "c"
        stream.show(row | {"state": "d", "status": "queued"})
        assert stream.seen["state"] == "d"


@pytest.mark.parametrize("answering", [1, 2])
def test_a_client_goes_on_where_it_was(
    api: httpx.Client, serve: Any, insert_job: Insert, db: Db, answering: int
) -> None:
    """At whatever replica it comes out."""
    job_id = insert_job()
    with listening(api, job_id) as listener:
        queued, _ = listener.next()
    again = api if answering == 1 else serve()
    with listening(again, job_id, queued) as listener:
        assert listener.next_any() == (None, None), "it knows that state"
        db.execute(CLAIM, [job_id])
        running, job = listener.next()
        assert job["status"] == "running"
    with listening(again, job_id, queued) as listener:
        assert listener.next()[0] == running
    with listening(again, job_id, "unknown") as listener:
        assert listener.next()[0] == running


def test_a_job_that_is_over(api: httpx.Client, insert_job: Insert, db: Db) -> None:
    job_id = insert_job()
    db.execute(CLAIM, [job_id])
    db.execute(SUCCEED, [job_id])
    with listening(api, job_id) as listener:
        final, job = listener.next()
        assert job["status"] == "succeeded"
        assert listener.all() == []
    # A browser comes back after every end; this answer is how it is told not to.
    assert api.get(f"/api/jobs/{job_id}/events", headers={"Last-Event-ID": final}).status_code == 204


def test_a_retried_job_is_another_state(api: httpx.Client, insert_job: Insert, db: Db) -> None:
    """Though its attempts count from one again."""
    fail = 'UPDATE jobs SET status = \'failed\', error = \'{"type": "A", "message": "b"}\', finished_at = now(), '
    fail += "lease_expires_at = NULL WHERE id = %s"
    job_id, ids = insert_job(), []
    for _ in range(2):
        db.execute(CLAIM, [job_id])
        db.execute(fail, [job_id])
        with listening(api, job_id) as listener:
            ids.append(listener.next()[0])
        api.post(f"/api/jobs/{job_id}/retry").raise_for_status()
    assert ids[0] != ids[1]


def test_what_get_refuses_is_refused(api: httpx.Client, serve: Any, insert_job: Insert) -> None:
    problem(api.get(f"/api/jobs/{uuid4()}/events"), 404, "unknown-job")
    problem(api.get("/api/jobs/x/events"), 422)
    job_id = insert_job()
    closed = serve(app_env="production", api_keys=(("a", "k"),))
    problem(closed.get(f"/api/jobs/{job_id}/events"), 401, "unauthorized")
    problem(closed.get("/events"), 401, "unauthorized")


def test_secrets_stay_secret(api: httpx.Client, insert_job: Insert) -> None:
    job_id = insert_job("webhook", {"url": "https://a.example", "body": {}, "headers": {"Authorization": "Bearer X"}})
    with listening(api, job_id) as listener:
        assert "Bearer X" not in json.dumps(listener.next()[1])


def test_comments_keep_a_quiet_stream_alive(
    serve: Any, insert_job: Insert, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "COMMENT_SECONDS", 0.2)
    with listening(serve(), job_id := insert_job()) as listener:
        listener.next()
        assert [listener.next_any() for _ in range(3)] == [(None, None)] * 3
        db.execute(CLAIM, [job_id])
        assert listener.next()[1]["status"] == "running"


def test_streams_are_counted(serve: Any, insert_job: Insert) -> None:
    api, job_id = serve(max_event_streams=2), insert_job()
    with listening(api, job_id) as one, listening(api, job_id) as two:
        assert one.next() == two.next()
        answer = api.get(f"/api/jobs/{job_id}/events")
        problem(answer, 503, "too-many-streams")
        assert answer.headers["retry-after"]
        two.response.close()
        # Its place is free as soon as it is gone.
        until(lambda: api.get(f"/api/jobs/{uuid4()}/events").status_code == 404, "there is room again")


def test_many_streams_are_one_query(serve: Any, insert_job: Insert, db: Db) -> None:
    """By PostgreSQL's own count of transactions; each query of the API is one."""
    api = serve()
    job_ids = [insert_job() for _ in range(30)]

    def per_second() -> float:
        count = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
        numbers, began = [], time.monotonic()
        for wait in (0, 4):
            time.sleep(wait)
            [row] = db.execute(count)
            numbers.append(row["xact_commit"])
        return float((numbers[1] - numbers[0]) / (time.monotonic() - began))

    with listening(api, job_ids[0]) as first:
        first.next()
        one = per_second()
        others = [Listener(api, f"/api/jobs/{job_id}/events") for job_id in job_ids]
        for listener in others:
            listener.next()
        time.sleep(1.5)  # the queries that opened them are counted by now
        many = per_second()
        db.execute("UPDATE jobs SET status = 'cancelled', finished_at = now()")
        for listener in others:
            assert [job["status"] for job in listener.all()] == ["cancelled"]
            listener.response.close()
    assert one > 1
    assert many < one + 3, (one, many)


def test_postgresql_may_go_away_and_come_back(serve: Any, insert_job: Insert, postgres: Postgres, db: Db) -> None:
    job_id = insert_job()
    with listening(serve(), job_id) as listener:
        listener.next()
        postgres.restart()
        with psycopg.connect(postgres.url, autocommit=True) as connection:
            connection.execute(CLAIM, [job_id])
        assert listener.next(seconds=30)[1]["status"] == "running"


def test_a_reader_who_takes_nothing_in_is_dropped(
    serve: Any, insert_job: Insert, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "SEND_SECONDS", 1.0)
    monkeypatch.setattr(events, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(events.JobEvents, "seconds", 0.05)
    api = serve(max_event_streams=1)
    job_id = insert_job("webhook", {"url": "https://a.example", "body": {"x": "y" * 900_000}})
    db.execute(CLAIM, [job_id])
    with socket.create_connection((api.base_url.host, api.base_url.port or 0)) as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.sendall(f"GET /api/jobs/{job_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert reader.recv(100).startswith(b"HTTP/1.1 200")

        def has_room() -> bool:
            progress(db, job_id, time.monotonic_ns())
            return bool(api.get(f"/api/jobs/{uuid4()}/events").status_code == 404)

        assert not has_room()
        until(has_room, "the reader's stream was dropped")


def test_a_shutdown_does_not_wait_for_streams(
    serve_process: Callable[..., tuple[httpx.Client, Process]], insert_job: Insert
) -> None:
    api, process = serve_process()
    job_id = insert_job()
    with listening(api, job_id) as listener:
        listener.next()
        process.terminate()
        began = time.monotonic()
        assert listener.all() == []
        process.wait(8)
        assert time.monotonic() - began < 8, "it waited for the grace of requests"
    assert "Traceback" not in process.log


def test_an_event_is_what_browsers_read() -> None:
    assert event("job", "abc", "{}") == b"event: job\nid: abc\ndata: {}\n\n"


def test_the_first_pages_numbers(api: httpx.Client, db: Db) -> None:
    listener = Listener(api, "/events")
    with closing(listener.response):
        first_id, first = listener.next()
        assert first["event"] == "overview"
        assert [queue["name"] for queue in first["queues"]] == list(ALL_QUEUES)
        job = created(api.post("/api/jobs", json={"kind": "sleep", "payload": {"seconds": 0}}))
        while listener.next()[1]["jobs_version"] == first["jobs_version"]:
            pass
        assert job["status"] == "queued"
        assert first_id
