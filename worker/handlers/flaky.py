"""Every way in which a handler can fail; the rest of the worker is there to survive them."""

import ctypes
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from app.jobs.kinds.flaky import Payload, Result
from worker.context import Context
from worker.errors import PermanentError, TransientError

MIB = 1024 * 1024
CGROUP = Path("/sys/fs/cgroup")


def run(payload: Payload, ctx: Context) -> Result:
    if ctx.attempt <= payload.failures:
        message = f"attempt {ctx.attempt} fails as asked for: {payload.error}"
        if payload.error == "transient":
            raise TransientError(message)
        if payload.error == "permanent":
            raise PermanentError(message)
        if ctx.settings.jobs_execution == "inline":
            raise PermanentError(f"JOBS_EXECUTION=inline has no child process to end by {payload.error}")
        _BLOWS[payload.error]()
    return Result(attempt=ctx.attempt)


def _crash() -> NoReturn:
    ctypes.string_at(0)  # reads address 0, as a bug in a C library does
    raise AssertionError("address 0 could be read")


def _exit() -> NoReturn:
    os._exit(1)  # no exception, no cleaning up: a C library's exit()


def _oom() -> NoReturn:
    """Fills its cgroup until the kernel kills it; where the kernel doesn't, it kills itself."""
    with suppress(OSError):  # be the one that the kernel picks, not the parent or a neighbour
        Path("/proc/self/oom_score_adj").write_text("1000")
    memory = bytearray()
    for _ in range(_bytes_to_fill() // (16 * MIB)):
        memory += b"\xff" * (16 * MIB)  # untouched pages would take no memory
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL came back")


def _bytes_to_fill() -> int:
    """The cgroup's limit; 512 MiB where there is none, or one so high that it must be a whole machine's."""
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup v2, v1
        with suppress(OSError, ValueError):  # ValueError: v2 writes "max" for none
            size = int((CGROUP / limit).read_text())
            if size <= 4096 * MIB:
                return size
    return 512 * MIB


def _hang() -> NoReturn:
    while True:
        try:
            time.sleep(3600)
        except Exception:  # noqa: BLE001, S112  the mistake to show: it swallows the soft time limit
            continue


_BLOWS: dict[str, Callable[[], NoReturn]] = {"crash": _crash, "exit": _exit, "oom": _oom, "hang": _hang}
