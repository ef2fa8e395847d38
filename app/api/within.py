"""A time limit that holds even where cancelling would have to wait for the other side."""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from app.api.errors import away

T = TypeVar("T")

# With the pool's own limit the API answers, or says 503, in under five seconds.
SECONDS = 4.0


def taken(task: "asyncio.Future[Any]") -> None:
    """For tasks whose callers may all have given up: an error that nobody took is printed with its traceback."""
    if not task.cancelled():
        task.exception()


async def within(work: Awaitable[T], *, part: str = "PostgreSQL", seconds: float = SECONDS) -> T:
    """The result of `work`, or what it raises.

    asyncio.timeout() would cancel and then wait for psycopg to cancel the statement at a server that is frozen. Here
    the answer does not wait; the work is cancelled and ends by itself. A client that goes away cancels only
    its own wait.

    Raises:
        Problem: 503, `part` did not answer in time.
    """
    task = asyncio.ensure_future(work)
    task.add_done_callback(taken)
    done, _ = await asyncio.wait({task}, timeout=seconds)
    if not done:
        task.cancel()
        raise away(part, f"no answer within {seconds:g} s")
    return task.result()
