"""Who shares a look at the queues with whom."""

import asyncio
import gc
from collections.abc import Awaitable, Coroutine
from typing import Any

import psycopg
import pytest
import structlog

from app.api import counts
from app.api.counts import EXACT_UP_TO, QueueCounts
from app.api.errors import Problem
from app.api.shared import Shared
from app.api.within import within


class Table:
    """Stands for PostgreSQL: answers when it is told to, with what is in it when it is asked."""

    def __init__(self) -> None:
        self.queued = 0
        self.asked: list[dict[str, Any]] = []
        self.answers = asyncio.Event()
        self.error: Exception | None = None
        self.takes_too_long = False  # to count them all

    def answer_once(self) -> None:
        """Whoever waits now gets an answer, and nobody else."""
        self.answers.set()
        self.answers = asyncio.Event()

    async def query(self, statement: str, params: dict[str, Any], *, prepare: bool) -> list[dict[str, Any]]:
        self.asked.append(params)
        found = min(self.queued, params["most"] or self.queued)
        await self.answers.wait()
        if self.takes_too_long and params["most"] is None:
            raise psycopg.errors.QueryCanceled
        if self.error:
            raise self.error
        return [{"name": name, "queued": found} for name in params["queues"]]


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 10))


def test_callers_share_a_look_that_began_after_they_came() -> None:
    async def test() -> None:
        table = Table()
        looks = QueueCounts(table.query)
        first = asyncio.create_task(looks.now())
        await settle()
        table.queued = 1
        others = [asyncio.create_task(looks.now()) for _ in range(100)]
        await settle()
        assert len(table.asked) == 1
        others[0].cancel()
        table.answers.set()
        assert (await first)[0]["queued"] == 0
        for other in others[1:]:
            assert (await other)[0]["queued"] == 1
        assert len(table.asked) == 2
        table.queued = 2
        assert (await looks.now())[0]["queued"] == 2

    run(test())


def test_one_look_at_a_time() -> None:
    async def test() -> None:
        table = Table()
        looks = QueueCounts(table.query)
        callers = []
        for number in range(1, 5):
            callers.append(asyncio.create_task(looks.now()))
            await settle()
            callers.append(asyncio.create_task(looks.now()))
            await settle()
            assert len(table.asked) == number
            table.answer_once()
            await settle()
        table.answers.set()
        await asyncio.gather(*callers)

    run(test())


@pytest.mark.parametrize("waits", ["for an answer that others wait for", "for an answer of his own"])
def test_an_error_that_nobody_waits_for_any_more_is_not_printed(waits: str) -> None:
    """asyncio would, with a traceback, when the task is thrown away."""
    printed: list[Any] = []

    async def fails() -> None:
        await asyncio.sleep(0.05)
        raise psycopg.OperationalError("away")

    async def test() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: printed.append(context))
        shared = Shared(fails, 0)
        caller = asyncio.create_task(shared.now() if waits.endswith("wait for") else within(fails()))
        await asyncio.sleep(0.01)
        caller.cancel()
        await asyncio.sleep(0.1)
        with pytest.raises(psycopg.OperationalError):
            await shared.now()  # forgets the one before

    run(test())
    gc.collect()
    assert printed == []


def test_who_gives_up_leaves_the_look_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async def soon(work: Awaitable[Any], **_: object) -> Any:
        return await within(work, seconds=0.4)

    async def test() -> None:
        monkeypatch.setattr(counts, "within", soon)
        looks = QueueCounts(Table().query)
        early = [asyncio.create_task(looks.now()) for _ in range(2)]
        await asyncio.sleep(0.2)
        late = asyncio.create_task(looks.now())
        # Each is told after its own time, although the second and the late one wait for the same look.
        for caller in (*early, late):
            with pytest.raises(Problem, match="503"):
                await caller

    run(test())


def test_a_failed_look_fails_for_all_and_the_next_asks_again() -> None:
    async def test() -> None:
        table = Table()
        looks = QueueCounts(table.query)
        table.error = ConnectionError()
        table.answers.set()
        failed = await asyncio.gather(*(looks.now() for _ in range(5)), return_exceptions=True)
        assert failed == [table.error] * 5
        assert len(table.asked) == 2  # the first one's, and that of all who came then
        table.error = None
        assert (await looks.now())[0]["queued"] == 0

    run(test())


def test_many_are_counted_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        table = Table()
        table.answers.set()
        looks = QueueCounts(table.query)
        for queued, seen in (
            (EXACT_UP_TO, EXACT_UP_TO),
            (EXACT_UP_TO + 1, EXACT_UP_TO + 1),
            (EXACT_UP_TO + 50, EXACT_UP_TO + 1),
            (EXACT_UP_TO - 1, EXACT_UP_TO - 1),
        ):
            table.queued = queued
            assert {row["queued"] for row in await looks.now()} == {seen}
        assert [asked["most"] for asked in table.asked].count(None) == 1
        monkeypatch.setattr(counts, "FRESH_SECONDS", 0)
        table.queued = EXACT_UP_TO + 60
        assert {row["queued"] for row in await looks.now()} == {EXACT_UP_TO + 60}

    run(test())


def test_a_backlog_that_cannot_be_counted_is_still_shown() -> None:
    async def test() -> None:
        table = Table()
        table.queued, table.takes_too_long = EXACT_UP_TO + 5, True
        table.answers.set()
        assert {row["queued"] for row in await QueueCounts(table.query).now()} == {EXACT_UP_TO + 1}

    run(test())


def test_what_is_asked_for_all_is_logged_for_nobody() -> None:
    """`make logs JOB=` would tell another job's story by the request id of whoever came first."""

    async def ask() -> dict[str, Any]:
        return structlog.contextvars.get_contextvars()

    async def test() -> None:
        with structlog.contextvars.bound_contextvars(request_id="a"):
            assert await Shared(ask, 1).now() == {}

    run(test())
