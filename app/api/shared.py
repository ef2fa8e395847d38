"""One answer for all who ask the same at about the same time."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, Generic, TypeVar

from app.api.within import taken

T = TypeVar("T")


class Shared(Generic[T]):
    """The answer of `ask`, never older than `seconds` before the call that gets it: 0 shows each caller what was done
    before he asked. One question at a time, however many wait for it."""

    def __init__(self, ask: Callable[[], Coroutine[Any, Any, T]], seconds: float) -> None:
        self._ask, self._seconds = ask, seconds
        self._task: asyncio.Task[T] | None = None
        self._began = 0.0

    async def now(self) -> T:
        oldest = time.monotonic() - self._seconds
        while self._task is not None and not self._task.done() and self._began < oldest:
            await asyncio.wait({self._task})
        task = self._task
        if task is None or self._began < oldest or (task.done() and (task.cancelled() or task.exception())):
            self._began = time.monotonic()
            # In no caller's context: his request's id would be in the log lines of what is done for all.
            task = self._task = asyncio.get_running_loop().create_task(self._ask(), context=Context())
            task.add_done_callback(taken)
        # Not awaited itself: a caller that gives up must not take the answer from the others.
        await asyncio.wait({task})
        return task.result()
