"""Server-sent events: a job's states, and the numbers of the first page, for whoever keeps a connection open.

PostgreSQL is asked once a tick for all streams of this process together, and answers with the jobs that changed: a
thousand streams cost it one query, no stream costs it none. Redis has no part in it, and no notification of PostgreSQL
either, which serialises commits. An event's id is made of the job's state, so that a client that reconnects to another
replica goes on where it was.
"""

import asyncio
import json
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Request, Response
from psycopg.rows import DictRow
from starlette.types import Receive, Scope, Send

from app import logs
from app.api.auth import key_name
from app.api.errors import Problem, responses
from app.api.jobs import unknown_job
from app.api.overview import overview
from app.api.strict_json import JsonRoute
from app.api.within import within
from app.database import CONNECTION_LOST
from app.jobs import statements
from app.jobs.create import array
from app.jobs.requests import shown

log = logs.get(__name__)

TICK_SECONDS = 0.5
OVERVIEW_SECONDS = 1.0
COMMENT_SECONDS = 15.0
# Who takes nothing in for so long is dropped. Until then the newest event waits for him, and nothing else.
SEND_SECONDS = 20.0
# A large event goes out in pieces of so many bytes: what one reader has not taken yet is no copy of all of it.
PIECE_BYTES = 2**16
# Then a stream ends and its client comes back: with a session that still holds, and maybe to another replica.
STREAM_SECONDS = 900.0
# A job whose payload and result are longer is encoded in a thread.
LARGE_BYTES = 100_000
RETRY_AFTER_SECONDS = 5
ALIVE = b":\n\n"
# What was sent before may be old: PostgreSQL does not answer.
STALE = b": stale\n\n"
HEADERS = {
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx would collect events before it passes them on
}

Query = Callable[..., Awaitable[list[DictRow]]]


def event(name: str, event_id: str, data: str) -> bytes:
    return f"event: {name}\nid: {event_id}\ndata: {data}\n\n".encode()


class Stream(Response):
    """One open answer. It holds its newest event only: who reads slowly misses what was in between.

    Of what `source` tells, `topic` is what its client wants to hear (a job's id), and `known` the state of it that the
    client knows.
    """

    def __init__(self, source: "Source", topic: UUID | None = None, known: str = "") -> None:
        super().__init__(headers=HEADERS, media_type="text/event-stream")
        del self.headers["content-length"]
        self.source, self.topic, self.known = source, topic, known
        # Something at once, by which a client sees that it is connected.
        self._newest = source.comment
        self._over = self._ended = False
        self._changed = asyncio.Event()

    def put(self, newest: bytes, known: str, *, over: bool = False) -> None:
        """An event to be sent, in the place of one that still waits. The stream closes behind it if all is `over`,
        unless another one comes before it went out: somebody may retry a job."""
        self._newest, self.known, self._over = newest, known, over
        self._changed.set()

    def say(self, comment: bytes) -> None:
        """A comment, which keeps proxies from closing a connection that looks dead; an event that waits says more."""
        if not self._newest.startswith(b"event"):
            self._newest = comment
            self._changed.set()

    def end(self) -> None:
        self._ended = True
        self._changed.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_disconnected(receive))
        gone.add_done_callback(lambda _: self._changed.set())
        # Not all that came back after a deploy at the same moment again.
        seconds = STREAM_SECONDS * random.uniform(0.7, 1)  # noqa: S311
        too_old = asyncio.get_running_loop().call_later(seconds, self.end)
        self.source.join(self)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            over = False
            while not over and not gone.done():
                self._changed.clear()
                newest, self._newest, over = self._newest, b"", self._over or self._ended
                for start in range(0, len(newest), PIECE_BYTES):
                    await _send(send, newest[start : start + PIECE_BYTES])
                    await asyncio.sleep(0)  # a quick reader takes them all at once, while others wait
                if not over:
                    await self._wait()
            await _send(send, b"", more=False)
        except TimeoutError:
            # Its task ends; what the kernel still holds for it, `protocol.py` bounds.
            log.warning("slow_reader_dropped", path=scope["path"])
        finally:
            too_old.cancel()
            gone.cancel()
            self.source.streams.discard(self)

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(COMMENT_SECONDS):
                await self._changed.wait()
        except TimeoutError:
            self.say(self.source.comment)


async def _send(send: Send, body: bytes, *, more: bool = True) -> None:
    async with asyncio.timeout(SEND_SECONDS):
        await send({"type": "http.response.body", "body": body, "more_body": more})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Streams(set[Stream]):
    """All that are open in this process."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self._closed = False

    def check_room(self) -> None:
        if self._closed or len(self) >= self._most:
            detail = f"This process has {len(self)} streams open and takes no more now; ask again, or look at the job."
            raise Problem(503, "too-many-streams", detail, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})

    def add(self, stream: Stream) -> None:
        super().add(stream)
        if self._closed:  # while it was on its way from `check_room` to here
            stream.end()

    def close(self) -> None:
        """At shutdown, before the server begins to wait for answers that are under way."""
        self._closed = True
        for stream in self:
            stream.end()


class Source:
    """Where events come from. Its task runs while somebody listens."""

    seconds: float

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self.comment = ALIVE
        self._running: asyncio.Task[None] | None = None

    def listeners(self) -> list[Stream]:
        return [stream for stream in self.streams if stream.source is self]

    def join(self, stream: Stream) -> None:
        self.streams.add(stream)
        if self._running is None or self._running.done():
            # In no request's context, whose id would be in the log lines of what is done for all.
            self._running = asyncio.get_running_loop().create_task(self._run(), context=Context())

    async def stop(self) -> None:
        """Before what it asks is closed."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})

    async def tick(self) -> None:
        raise NotImplementedError

    async def _run(self) -> None:
        while self.listeners():
            try:
                await self.tick()
            except (*CONNECTION_LOST, Problem) as error:
                # Streams stay open, and what changed meanwhile is seen by the first look that succeeds.
                if self.comment is not STALE:
                    log.warning("events_wait", error=str(error).strip())
                self._say(STALE)
            except Exception:  # a mistake of ours must not silence all streams for good
                log.exception("events_failed")
            else:
                self._say(ALIVE)
            await asyncio.sleep(self.seconds)

    def _say(self, comment: bytes) -> None:
        if comment is not self.comment:
            self.comment = comment
            for stream in self.listeners():
                stream.say(comment)


class JobEvents(Source):
    seconds = TICK_SECONDS

    def __init__(self, streams: Streams, query: Query) -> None:
        super().__init__(streams)
        self._query = query

    async def tick(self) -> None:
        by_job = defaultdict[Any, list[Stream]](list)
        for stream in self.listeners():
            by_job[stream.topic].append(stream)
        known = []
        for streams in by_job.values():
            states = {stream.known for stream in streams}
            # Two that know different states of a job: any row of it is news for one of them.
            known.append(states.pop() if len(states) == 1 else "")
        rows = await within(self._query(statements.CHANGED, {"ids": array(by_job), "states": array(known)}))
        for row in sorted(rows, key=_length):  # nobody waits for a larger one than his
            over = row["finished_at"] is not None
            try:
                data = _job_event(row) if _length(row) < LARGE_BYTES else await asyncio.to_thread(_job_event, row)
            except Exception:  # of one row, written by a person or another release: the others go on
                log.exception("event_failed", job_id=str(row["id"]))
                data, over = ALIVE, False
            for stream in by_job[row["id"]]:
                if stream.known != row["state"]:
                    stream.put(data, row["state"], over=over)


def _length(row: DictRow) -> int:
    return len(row["payload"]) + len(row["result"] or "")


def _job_event(row: DictRow) -> bytes:
    parsed = {name: json.loads(row[name] or "null") for name in ("payload", "result")}
    return event("job", row["state"], shown({**row, **parsed}).model_dump_json())


# What changes although nothing happens. It goes along with anything else, and from time to time.
AGES: Any = {
    "queues": {"__all__": {"oldest_queued_seconds"}},
    "workers": {"__all__": {"last_seen_seconds"}},
    "beat": {"__all__": {"last_sent_at", "last_finished_at", "next_due_at"}},
    "redis": {"memory_bytes"},
}
AGES_SECONDS = 30.0


class OverviewEvents(Source):
    seconds = OVERVIEW_SECONDS

    def __init__(self, streams: Streams, state: Any) -> None:
        super().__init__(streams)
        self._state = state
        self._known = ""
        self._number = 0
        self._event = ALIVE

    async def tick(self) -> None:
        now = await overview(self._state)
        known = f"{int(time.time() / AGES_SECONDS)} {now.model_dump_json(exclude=AGES)}"
        if known != self._known:
            self._known = known
            self._number += 1
            self._event = event("overview", str(self._number), now.model_dump_json())
        for stream in self.listeners():
            if stream.known != str(self._number):
                stream.put(self._event, str(self._number))


router = APIRouter(tags=["jobs"], route_class=JsonRoute)
page_router = APIRouter()

STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "`event: job`, its `data` a job as GET shows it. Behind the final state the stream closes.",
        # No schema: OpenAPI 3.1 has none for a stream, and what reads one takes it for each event's.
        "content": {"text/event-stream": {}},
    },
    204: {"description": "The final state is the one that Last-Event-ID names: there is nothing more to come."},
}


@router.get(
    "/api/jobs/{job_id:one_job}/events",
    response_class=Response,
    responses={**STREAM, **responses(401, 404, 422, 503)},
)
async def job_events(request: Request, job_id: UUID, last_event_id: Annotated[str | None, Header()] = None) -> Response:
    """The job's present state, then each change of status, attempt or progress (twice a second at most), as
    server-sent events. States in between may be left out; the final one never is."""
    state = request.app.state
    state.streams.check_room()
    rows = await within(state.query(statements.GET_STATE, {"id": job_id}))
    if not rows:
        raise unknown_job(job_id)
    [row] = rows
    known = row["state"] if row["state"] == last_event_id else ""
    if known and row["finished_at"] is not None:
        return Response(status_code=204)  # by which a browser stops to reconnect
    return Stream(state.job_events, job_id, known)


@page_router.get("/events", include_in_schema=False, dependencies=[Depends(key_name)])
async def overview_events(request: Request) -> Response:
    """For the first page: `event: overview`, `data` an `Overview`; once a second at most, and only when it changed."""
    request.app.state.streams.check_room()
    return Stream(request.app.state.overview_events)
