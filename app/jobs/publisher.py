"""The API's side of publishing: in the background, in batches, over one connection, and never waited for."""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import redis.asyncio

from app import logs
from app.jobs import messages
from app.queues import ALL_QUEUES, MAINTENANCE
from app.settings import Settings

log = logs.get(__name__)

AWAY_SECONDS = 1.0
ASK_SECONDS = 0.2


class Publisher:
    """Sends messages for rows that are committed. What it can't send, dispatch does: the row is the truth."""

    def __init__(self, settings: Settings, client: redis.asyncio.Redis | None) -> None:
        self._settings = settings
        self._client = client
        self._waiting: list[messages.Address] = []
        self._wanted = asyncio.Event()
        # Each queue's length when last seen: at a send, or when dispatch was asked for, which a full queue leads to.
        self._lengths: defaultdict[str, int] = defaultdict(int)
        # Messages for each queue that those lengths don't contain: of rows being inserted, to be sent, on their way.
        self._coming: Counter[str] = Counter()
        self._away_until = 0.0
        self._to_wake: set[str] = set()
        self._ask_dispatch = False
        self._asked_at = 0.0
        self._stopped = False

    @contextmanager
    def room_for(self, queues: Iterable[str]) -> Iterator[list[str]]:
        """Which of these queues (one entry a message) have room for all that is to come, as far as this process knows.

        It is kept until the end of the block, in which the messages are submitted.
        """
        wanted = Counter(queues)
        kept: Counter[str] = Counter()
        if self._client is not None and time.monotonic() >= self._away_until:
            for queue, count in wanted.items():
                if self._lengths[queue] + self._coming[queue] + count <= self._settings.queue_window:
                    kept[queue] = count
        self._coming += kept
        try:
            yield list(kept)
        finally:
            self._coming -= kept

    def submit(self, rows: Iterable[dict[str, object]]) -> None:
        """Queues messages for rows that were inserted as published; so never more than had room."""
        addresses = [messages.Address(row["id"], row["kind"], row["queue"]) for row in rows]  # type: ignore[arg-type]
        if addresses:
            self._waiting += addresses
            self._coming.update(job.queue for job in addresses)
            self._wanted.set()

    def wake(self, queues: set[str]) -> None:
        """Short jobs came into these queues."""
        if queues and self._client is not None:
            self._to_wake |= queues
            self._wanted.set()

    def ask_dispatch(self) -> None:
        """Rows were left to dispatch: tell it now instead of at its next tick."""
        if self._client is not None and time.monotonic() - self._asked_at > ASK_SECONDS:
            self._asked_at = time.monotonic()
            self._ask_dispatch = True
            self._wanted.set()

    async def run(self) -> None:
        """Until `stop`; what waits then is sent first if Redis answers."""
        while not self._stopped:
            await self._wanted.wait()
            self._wanted.clear()
            await self._flush()
        await self._flush()

    def stop(self) -> None:
        self._stopped = True
        self._wanted.set()

    async def _flush(self) -> None:
        batch, self._waiting = self._waiting, []
        wake, self._to_wake = self._to_wake, set()
        ask, self._ask_dispatch = self._ask_dispatch, False
        if self._client is None or not (batch or wake or ask):
            return
        try:
            await self._send(self._client, batch, wake, ask=ask)
        except messages.REDIS_ERRORS as error:
            # It may have arrived all the same: harmless, but it takes room. Until Redis is looked at again, rows go in
            # unpublished, so that dispatch finds them at once and not after repair's patience.
            self._away_until = time.monotonic() + AWAY_SECONDS
            for job in batch:
                self._lengths[job.queue] += 1
            log.warning("publish_failed", jobs=len(batch), error=str(error), note="dispatch sends them later")
        except Exception:  # a mistake of ours must not end all publishing
            log.exception("publish_failed", jobs=len(batch))
        finally:
            self._coming.subtract(job.queue for job in batch)

    async def _send(
        self, client: redis.asyncio.Redis, batch: list[messages.Address], wake: set[str], *, ask: bool
    ) -> None:
        queues = messages.by_queue(batch, self._settings)
        pipeline = client.pipeline(transaction=False)
        for queue, waiting in queues.items():
            pipeline.lpush(queue, *waiting)
        for queue in wake:
            pipeline.eval(*messages.wake_up(queue, self._settings))  # type: ignore[arg-type]
        for queue in ALL_QUEUES if ask else ():
            pipeline.llen(queue)
        answers: Sequence[int] = await pipeline.execute()
        self._lengths |= zip(queues, answers, strict=False)
        if not ask:
            return
        self._lengths |= zip(ALL_QUEUES, answers[-len(ALL_QUEUES) :], strict=True)
        # Nobody consumes it? Then five of these a second would only fill Redis.
        if self._lengths[MAINTENANCE] < messages.MOST_MAINTENANCE:
            ask_for = messages.maintenance_message("enqueue_pending_jobs")
            await client.lpush(MAINTENANCE, ask_for)  # type: ignore[misc]
