"""Server-sent events: a job's states, and the numbers of the first page, for whoever keeps a connection open.

PostgreSQL is asked once a tick for all streams of this process together, and answers with the jobs that changed: a
thousand streams cost it one query, no stream costs it none. Redis has no part in it, and no notification of PostgreSQL
either, which serialises commits. An event's id is made of the job's state, so that a client that reconnects to another
replica goes on where it was.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
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
RETRY_AFTER_SECONDS = 5
OVER = ("succeeded", "failed", "cancelled")
HEADERS = {
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
}  # nginx would collect events before it passes them on

Query = Callable[..., Awaitable[list[DictRow]]]


def event(name: str, event_id: str, data: str) -> bytes:
    return f"event: {name}\nid: {event_id}\ndata: {data}\n\n".encode()


class Stream(Response):
    """One open answer. It holds its newest event only: who reads slowly misses what was in between."""

    def __init__(self, source: "Source", first: bytes | None) -> None:
        super().__init__(headers=HEADERS, media_type="text/event-stream")
        del self.headers["content-length"]
        self._source = source
        # Something at once, by which a client sees that it is connected.
        self._newest = first or b":\n\n"
        self._last = False
        self._changed = asyncio.Event()

    def put(self, newest: bytes, *, last: bool = False) -> None:
        """An event to be sent, in the place of one that still waits. Behind the last one the stream closes."""
        self._newest, self._last = newest, last
        self._changed.set()

    def end(self) -> None:
        self._last = True
        self._changed.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_disconnected(receive))
        gone.add_done_callback(lambda _: self._changed.set())
        self._source.streams.add(self)
        self._source.join(self)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while not gone.done():
                newest, self._newest = self._newest, b""
                last = self._last and not gone.done()
                async with asyncio.timeout(SEND_SECONDS):
                    await send({"type": "http.response.body", "body": newest, "more_body": not last})
                if last:
                    break
                await self._wait()
        except TimeoutError:
            # Its task ends; what the kernel still holds for it, `Server` in `__main__.py` bounds.
            log.warning("slow_reader_dropped", path=scope["path"])
        finally:
            gone.cancel()
            self._source.leave(self)
            self._source.streams.discard(self)

    async def _wait(self) -> None:
        """Until there is something to send."""
        try:
            async with asyncio.timeout(COMMENT_SECONDS):
                await self._changed.wait()
        except TimeoutError:
            self._newest = self._newest or b":\n\n"  # keeps proxies from closing a connection that looks dead
        self._changed.clear()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Streams(set[Stream]):
    """The open ones of this process."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self._closed = False

    def check_room(self) -> None:
        if self._closed or len(self) >= self._most:
            detail = f"This process has {len(self)} streams open and takes no more now; ask again, or look at the job."
            raise Problem(503, "too-many-streams", detail, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})

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
        self._listeners: set[Any] = set()
        self._running: asyncio.Task[None] | None = None

    def join(self, stream: Any) -> None:
        self._listeners.add(stream)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())

    def leave(self, stream: Any) -> None:
        self._listeners.discard(stream)

    async def stop(self) -> None:
        """Before what it asks is closed."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})

    async def tick(self) -> None:
        raise NotImplementedError

    async def _run(self) -> None:
        failing = False
        while self._listeners:
            try:
                await self.tick()
            except (*CONNECTION_LOST, Problem) as error:
                # Streams stay open, and what changed meanwhile is seen by the first look that succeeds.
                if not failing:
                    log.warning("events_wait", error=str(error).strip())
                failing = True
            except Exception:  # a mistake of ours must not silence all streams for good
                log.exception("events_failed")
            else:
                failing = False
            await asyncio.sleep(self.seconds)


class JobStream(Stream):
    """A stream of a job's states; `seen` is the row that its client knows."""

    def __init__(self, source: "JobEvents", seen: DictRow, last_event_id: str | None) -> None:
        super().__init__(source, None if last_event_id == seen["state"] else _job_event(seen))
        self.seen = seen
        self.at = time.monotonic()
        if seen["status"] in OVER:
            self.end()

    def show(self, row: DictRow) -> None:
        """A row as it is now."""
        now = time.monotonic()
        same_run = all(row[name] == self.seen[name] for name in ("status", "attempt", "started_at"))
        # Right behind the first event, progress waits for the next tick.
        if row["state"] == self.seen["state"] or (same_run and now - self.at < TICK_SECONDS * 0.9):
            return
        self.seen, self.at = row, now
        self.put(_job_event(row), last=row["status"] in OVER)


def _job_event(row: DictRow) -> bytes:
    return event("job", row["state"], shown(row).model_dump_json())


class JobEvents(Source):
    seconds = TICK_SECONDS

    def __init__(self, streams: Streams, query: Query) -> None:
        super().__init__(streams)
        self._query = query

    async def tick(self) -> None:
        by_job = defaultdict[UUID, list[JobStream]](list)
        for stream in self._listeners:
            by_job[stream.seen["id"]].append(stream)
        # Two that know different states of a job: any row of it is news for one of them.
        known = {
            job_id: seen.pop() if len(seen := {stream.seen["state"] for stream in streams}) == 1 else ""
            for job_id, streams in by_job.items()
        }
        rows = await within(self._query(statements.CHANGED, {"ids": array(known), "states": array(known.values())}))
        for row in rows:
            for stream in by_job[row["id"]]:
                stream.show(row)


class OverviewEvents(Source):
    seconds = OVERVIEW_SECONDS

    def __init__(self, streams: Streams, state: Any) -> None:
        super().__init__(streams)
        self._state = state
        self._text = ""
        self._number = 0

    def join(self, stream: Stream) -> None:
        super().join(stream)
        if self._text:
            stream.put(self._event())

    async def tick(self) -> None:
        text = (await overview(self._state)).model_dump_json()
        if text != self._text:
            self._text = text
            self._number += 1
            for stream in self._listeners:
                stream.put(self._event())

    def _event(self) -> bytes:
        return event("overview", str(self._number), self._text)


router = APIRouter(tags=["jobs"], route_class=JsonRoute)
page_router = APIRouter()

STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "`event: job`, its `data` a job as GET shows it. Behind the final state the stream closes.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
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
    if row["status"] in OVER and last_event_id == row["state"]:
        return Response(status_code=204)  # by which a browser stops to reconnect
    return JobStream(state.job_events, row, last_event_id)


@page_router.get("/events", include_in_schema=False, dependencies=[Depends(key_name)])
async def overview_events(request: Request) -> Response:
    """For the first page: `event: overview`, `data` an `Overview`; once a second at most, and only when it changed."""
    request.app.state.streams.check_room()
    return Stream(request.app.state.overview_events, None)
