"""How many jobs are where: asked here by everybody who wants to know, and of PostgreSQL once for all of them."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from psycopg.rows import DictRow

from app.api.errors import Problem
from app.api.within import SECONDS, within
from app.database import CONNECTION_LOST
from app.jobs import statements
from app.queues import ALL_QUEUES

# So many waiting jobs of a queue are counted for every caller. More than that are counted all once in a while.
EXACT_UP_TO = 10_000
FRESH_SECONDS = 10.0
COUNT_ALL_SECONDS = 2.0


class QueueCounts:
    """Counts for one API process: one look at a time, however many callers wait for one.

    `query(statement, params, prepare=False)` asks PostgreSQL.
    """

    def __init__(self, query: Callable[..., Awaitable[list[DictRow]]]) -> None:
        self._query = query
        self._running: asyncio.Task[list[DictRow]] | None = None
        self._next: asyncio.Task[list[DictRow]] | None = None
        # Queue -> (how many waited, when that was).
        self._many: dict[str, tuple[int, float]] = {}

    async def now(self) -> list[DictRow]:
        """Each queue's `name, queued, running, oldest_queued_seconds`, not older than this call; but `queued` beyond
        EXACT_UP_TO is some seconds old.

        Raises:
            psycopg.OperationalError, Problem: PostgreSQL is away.
        """
        # Shielded: a caller that gives up must not take the answer from the others.
        return await within(asyncio.shield(self._shared()))

    def _shared(self) -> asyncio.Task[list[DictRow]]:
        if self._next is None and self._running is not None and not self._running.done():
            # That one began before this call, and what was done in between would be missing.
            self._next = asyncio.create_task(self._after(self._running))
        if self._next is not None:
            return self._next
        self._running = asyncio.create_task(self._look())
        return self._running

    async def _after(self, running: asyncio.Task[list[DictRow]]) -> list[DictRow]:
        await asyncio.wait({running})
        self._running, self._next = self._next, None
        return await self._look()

    async def _look(self) -> list[DictRow]:
        began = time.monotonic()
        rows = await self._count(list(ALL_QUEUES), EXACT_UP_TO + 1)
        many = [row for row in rows if row["queued"] > EXACT_UP_TO]
        fresh = {name for name, (_, moment) in self._many.items() if began - moment < FRESH_SECONDS}
        stale = [row["name"] for row in many if row["name"] not in fresh]
        if stale:
            # So many that it takes too long: then an old count, or the 10,001 that were counted.
            with suppress(*CONNECTION_LOST, Problem):
                all_of_them = await self._count(stale, None, COUNT_ALL_SECONDS)
                self._many.update({row["name"]: (row["queued"], began) for row in all_of_them})
        for row in many:
            row["queued"], _ = self._many.get(row["name"], (row["queued"], 0))
        return rows

    async def _count(self, queues: list[str], most: int | None, seconds: float = SECONDS) -> list[DictRow]:
        # Planned for these values: how it is best done depends on `most`.
        params = {"queues": queues, "most": most}
        return await within(self._query(statements.QUEUE_COUNTS, params, prepare=False), seconds=seconds)
