"""`python -m tests.integration.odd`: the worker, with one more kind that does what no decent handler does."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.jobs.kind import Kind, Model
from app.jobs.kinds import all_kinds
from worker import __main__ as worker_main
from worker import short_jobs
from worker.context import Context
from worker.errors import TransientError


class Payload(Model):
    do: str
    path: str = ""  # a file to leave traces in
    seconds: float = 0


class Result(Model):
    seen: Any = None


KIND = Kind("odd", Payload, Result, description="For tests.")


def run(payload: Payload, ctx: Context) -> Result:
    return Result(seen=DEEDS[payload.do](payload, ctx))


def trace(payload: Payload, ctx: Context) -> int:
    """Leaves a line, if there is a place for it; returns how many there are."""
    if not payload.path:
        return 0
    path = Path(payload.path)
    with path.open("a") as file:
        file.write(f"{ctx.attempt} {os.getpid()}\n")
    return len(path.read_text().splitlines())


def never_look(payload: Payload, ctx: Context) -> None:
    end = time.monotonic() + payload.seconds
    while time.monotonic() < end:
        time.sleep(0.05)


def once_then_crash(payload: Payload, ctx: Context) -> Any:
    first = ctx.once("paid", lambda: {"call": trace(payload, ctx), "key": ctx.step_key("paid")})
    if ctx.attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return [first, ctx.once("paid", lambda: "never called"), ctx.step_key("paid")]


def hold_the_interpreter(payload: Payload, ctx: Context) -> None:
    if ctx.attempt == 1:
        ctypes.PyDLL(None).usleep(int(payload.seconds * 1e6))  # PyDLL: without letting other threads run
    trace(payload, ctx)


def fail(error: BaseException) -> Callable[[Payload, Context], None]:
    def deed(payload: Payload, ctx: Context) -> None:
        if ctx.attempt == 1:
            raise error

    return deed


def recurse(payload: Payload, ctx: Context) -> None:
    recurse(payload, ctx)


def wait(payload: Payload, ctx: Context) -> None:
    trace(payload, ctx)
    ctx.sleep(payload.seconds)


DEEDS: dict[str, Callable[[Payload, Context], Any]] = {
    "wait": wait,
    "trace": trace,
    "never look": never_look,
    "once, then crash": once_then_crash,
    "hold the interpreter": hold_the_interpreter,
    "nul": lambda payload, ctx: "a\x00b",
    "nul in a step": lambda payload, ctx: ctx.once("paid", lambda: "a\x00b"),
    "SystemExit": fail(SystemExit(3)),
    "KeyboardInterrupt": fail(KeyboardInterrupt()),
    "MemoryError": fail(MemoryError()),
    "ValueError": fail(ValueError("a bug")),
    "RecursionError": recurse,
    "come back later": fail(TransientError("come back later", retry_after=45)),
}


def main() -> None:
    all_kinds()[KIND.name] = KIND
    sys.modules["worker.handlers.odd"] = sys.modules[__name__]
    short_jobs.MOST_SECONDS = 5
    short_jobs.SLICE_SECONDS = 3  # so long has a test to act on what waits behind a slow one
    worker_main.main()


if __name__ == "__main__":
    main()
