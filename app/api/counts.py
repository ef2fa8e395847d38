"""How many jobs are where: asked here by everybody who wants to know, and of PostgreSQL once for all of them."""

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from psycopg.rows import DictRow

from app.api.errors import Problem
from app.api.shared import Shared
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
        self._shared = Shared(self._look, 0)
        # Queue -> (how many waited, when that was).
        self._many: dict[str, tuple[int, float]] = {}

    async def now(self) -> list[DictRow]:
        """Each queue's `name, queued, running, oldest_queued_seconds`, not older than this call; but `queued` beyond
        EXACT_UP_TO is some seconds old.

        Raises:
            psycopg.OperationalError, Problem: PostgreSQL is away.
        """
        return await within(self._shared.now())

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
