"""A job's states as server-sent events, over real connections."""

import asyncio
import gc
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from queue import Queue
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
import structlog
from psycopg.rows import DictRow

from app.api import events
from app.api.events import Source, Stream, Streams, event
from app.api.overview import Overview, overview
from app.queues import ALL_QUEUES
from tests.integration.api.conftest import created, problem
from tests.processes import Process
from tests.servers import Postgres
from tests.waiting import until

Insert = Callable[..., UUID]
Db = psycopg.Connection[DictRow]
CLAIM = """UPDATE jobs SET status = 'running', attempt = attempt + 1, started_at = now(), heartbeat_at = now(),
    worker = 'w@test', lease_token = gen_random_uuid(), lease_expires_at = '2100-01-01' WHERE id = %s"""
SUCCEED = """UPDATE jobs SET status = 'succeeded', result = '{"slept": 0}', finished_at = now(), lease_expires_at = NULL
    WHERE id = %s"""


def progress(db: Db, job_id: UUID, current: int) -> None:
    text = json.dumps({"current": current, "total": 100, "message": None})
    db.execute("UPDATE jobs SET progress = %s WHERE id = %s", [text, job_id])


class Listener:
    """A client that notes what it gets: events as (id, job), comments as (None, their text or None)."""

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
                    self._got.put((None, found.get("")))
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
        time.sleep(2.5)  # the queries that opened them are counted by now: each connection tells its own once a second
        many = per_second()
        db.execute("UPDATE jobs SET status = 'cancelled', finished_at = now()")
        for listener in others:
            assert [job["status"] for job in listener.all()] == ["cancelled"]
            listener.response.close()
    assert one > 1
    assert many < one + 3, (one, many)


def test_many_readers_of_a_large_job_share_its_events(
    serve: Any, insert_job: Insert, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[tuple[UUID, str, threading.Thread]] = []
    encode = events._job_event

    def noted(row: DictRow) -> bytes:
        encoded.append((row["id"], row["status"], threading.current_thread()))
        return encode(row)

    monkeypatch.setattr(events, "_job_event", noted)
    api = serve()
    large, small = insert_job("webhook", {"url": "https://a.example", "body": "y" * 900_000}), insert_job()
    with ExitStack() as stack:
        listeners = [stack.enter_context(listening(api, job_id)) for job_id in (small, *[large] * 30)]
        for listener in listeners:
            listener.next()
        streams = [found for found in gc.get_objects() if isinstance(found, Stream) and found.topic == large]
        assert len(streams) == 30
        until(lambda: not any(stream._newest for stream in streams), "nothing of the job is kept")
        db.execute("UPDATE jobs SET status = 'cancelled', finished_at = now()")
        for listener in listeners:
            assert [job["status"] for job in listener.all()] == ["cancelled"]
    assert [job_id for job_id, status, _ in encoded if status == "cancelled"] == [small, large]
    [loop] = {thread for job_id, _, thread in encoded if job_id == small}
    assert loop not in {thread for job_id, _, thread in encoded if job_id == large}


def test_one_odd_row_silences_only_its_own_stream(serve: Any, insert_job: Insert, db: Db) -> None:
    """Rows may come from another release, or from somebody's hand."""
    api, odd = serve(), insert_job(payload={})
    others = [insert_job() for _ in range(8)]
    with ExitStack() as stack:
        first = stack.enter_context(listening(api, odd))
        listeners = [stack.enter_context(listening(api, job_id)) for job_id in others]
        for listener in (first, *listeners):
            listener.next()
        db.execute(CLAIM, [odd])
        assert first.next()[1]["status"] == "running"
        with db.transaction():
            db.execute("""UPDATE jobs SET progress = '{"current": 1}' WHERE id = %s""", [odd])
            db.execute("UPDATE jobs SET status = 'cancelled', finished_at = now() WHERE id <> %s", [odd])
        for listener in listeners:
            assert [job["status"] for job in listener.all()] == ["cancelled"]
        for page in ("/", "/jobs"):
            assert api.get(page).status_code == 200
        progress(db, odd, 2)
        assert first.next()[1]["progress"]["current"] == 2


def test_postgresql_may_go_away_and_come_back(serve: Any, insert_job: Insert, postgres: Postgres, db: Db) -> None:
    job_id = insert_job()
    with listening(serve(), job_id) as listener:
        listener.next()
        postgres.restart()
        with psycopg.connect(postgres.url, autocommit=True) as connection:
            connection.execute(CLAIM, [job_id])
        assert listener.next(seconds=30)[1]["status"] == "running"


def test_a_stream_says_that_postgresql_does_not_answer(serve: Any, insert_job: Insert, postgres: Postgres) -> None:
    """Once, and once when it does again: what a page shows meanwhile is not live."""
    with listening(serve(), insert_job()) as listener:
        assert listener.next_any() == (None, None)
        listener.next()
        postgres.freeze()
        try:
            assert listener.next_any() == (None, "stale")
        finally:
            postgres.thaw()
        assert listener.next_any() == (None, None)


def test_a_stream_ends_before_long_and_goes_on_where_it_was(
    serve: Any, insert_job: Insert, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that whoever logged out, or whose session is over, is asked again."""
    monkeypatch.setattr(events, "STREAM_SECONDS", 1.5)
    api, job_id = serve(), insert_job()
    with listening(api, job_id) as listener:
        known, _ = listener.next()
        assert listener.all() == []
    monkeypatch.setattr(events, "STREAM_SECONDS", 900)  # this one may not end before the job goes on
    with listening(api, job_id, known) as listener:
        db.execute(CLAIM, [job_id])
        assert listener.next()[1]["status"] == "running"


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


def test_a_shutdown_does_not_wait_for_a_stream_that_is_just_being_opened(
    serve_process: Callable[..., tuple[httpx.Client, Process]], insert_job: Insert, postgres: Postgres, db: Db
) -> None:
    api, process = serve_process()
    job_id = insert_job()
    opened = Queue[Listener]()
    with psycopg.connect(postgres.url) as holding:
        holding.execute("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
        path = f"/api/jobs/{job_id}/events"
        threading.Thread(target=lambda: opened.put(Listener(api, path)), daemon=True).start()
        waits = "SELECT FROM pg_locks WHERE NOT granted AND relation = 'jobs'::regclass"
        until(lambda: db.execute(waits).fetchall(), "its first question waits")
        process.terminate()
        until(lambda: refuses(api), "streams are closed, and then the door")
    began = time.monotonic()
    listener = opened.get(timeout=8)
    assert listener.all() == []
    listener.response.close()
    process.wait(8)
    assert time.monotonic() - began < 8, "it waited for the grace of requests"
    assert "Traceback" not in process.log


def refuses(api: httpx.Client) -> bool:
    try:
        socket.create_connection((api.base_url.host, api.base_url.port or 0)).close()
    except ConnectionRefusedError:
        return True
    return False


async def silence() -> Any:
    await asyncio.Event().wait()


def test_what_comes_behind_the_end_does_not_keep_a_stream_open() -> None:
    """The end of a process, say, while a slow reader still has something to take."""
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def test() -> None:
        source = Ticks(Streams(1))
        stream = Stream(source)
        stream.end()
        stream.put(event("job", "a", "{}"), "a")
        async with asyncio.timeout(5):
            await stream({"type": "http", "path": "/"}, silence, send)

    asyncio.run(test())
    assert b"".join(message.get("body", b"") for message in sent) == event("job", "a", "{}")
    assert sent[-1]["more_body"] is False


class Ticks(Source):
    """Looks at what the log would say of a tick, once."""

    seconds = 0

    async def tick(self) -> None:
        self.said = structlog.contextvars.get_contextvars()
        self.streams.clear()


def test_what_is_done_for_all_is_logged_for_nobody() -> None:
    async def test() -> None:
        source = Ticks(Streams(1))
        with structlog.contextvars.bound_contextvars(request_id="of whoever came first"):
            source.join(Stream(source))
        await asyncio.wait_for(asyncio.wait({source._running}), 5)  # type: ignore[type-var]
        assert source.said == {}

    asyncio.run(test())


def test_an_event_is_what_browsers_read() -> None:
    assert event("job", "abc", "{}") == b"event: job\nid: abc\ndata: {}\n\n"


def test_the_first_pages_numbers_come_when_something_happens(
    serve: Any, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Overview] = []

    async def counted(state: Any) -> Any:
        looks.append(await overview(state))
        return looks[-1]

    monkeypatch.setattr(events, "overview", counted)
    monkeypatch.setattr(events, "AGES_SECONDS", 1e9)
    monkeypatch.setattr(events.OverviewEvents, "seconds", 0.05)
    db.execute("TRUNCATE job_stats")  # of which each new minute makes another picture
    api = serve()
    # Beat sends some entries every other second; that is no news. (One that would not be late before long.)
    sent = "INSERT INTO schedule_ticks (entry, due_at, sent_at) VALUES ('database_maintenance', now(), now())"
    db.execute(sent)
    listener = Listener(api, "/events")
    with closing(listener.response):
        _, first = listener.next()
        assert first["event"] == "overview"
        assert [queue["name"] for queue in first["queues"]] == list(ALL_QUEUES)
        for _ in range(3):
            db.execute(sent)
            seen = len(looks)
            until(lambda seen=seen: len(looks) > seen + 1, "that was looked at")  # type: ignore[misc]
        assert len({entry.last_sent_at for look in looks for entry in look.beat}) > 3
        created(api.post("/api/jobs", json={"kind": "sleep", "payload": {"seconds": 0}}))
        _, second = listener.next()
        # Its parts are asked for at once: in any of them the job may be seen first.
        assert (second["queues"], second["jobs_version"]) != (first["queues"], first["jobs_version"])
        while second["jobs_version"] == first["jobs_version"]:
            _, second = listener.next()
