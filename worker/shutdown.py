"""What a worker does after SIGTERM: let short jobs end, then hand the long ones back, and be gone in time.

The signal reaches the parent only. Its children see it through a page of memory that was made before the fork.
"""

import mmap
import os
import signal
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from app import logs
from app.database import CONNECTION_LOST
from app.settings import Settings

log = logs.get(__name__)

# Anonymous and shared: parent and children see the same bytes. Holds the monotonic time of SIGTERM, which is one clock
# for all processes of a machine; 0 means that nobody asked.
_began = mmap.mmap(-1, 8)


def begin(spent: float = 0) -> None:
    """SIGTERM has come; `spent` seconds of the grace count as over."""
    struct.pack_into("d", _began, 0, time.monotonic() - spent)


def reset() -> None:
    struct.pack_into("d", _began, 0, 0.0)


def seconds_since() -> float | None:
    """How long ago this worker was told to stop; None if it wasn't."""
    began: float = struct.unpack_from("d", _began, 0)[0]
    return time.monotonic() - began if began else None


def claims_nothing() -> bool:
    return seconds_since() is not None


def hands_back(settings: Settings) -> bool:
    """Whether a checkpoint should end the handler: half of the grace has passed."""
    since = seconds_since()
    return since is not None and since >= settings.shutdown_grace_seconds / 2


@contextmanager
def left_to_the_parent() -> Iterator[None]:
    """A child at work does not die of SIGTERM, which reaches children too if it is sent to a whole group or service.

    Who means a child's end sends SIGKILL. A handler that does nothing, and not SIG_IGN, which every program that a job
    starts would inherit.
    """
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def watch(settings: Settings, pool: Any, hand_back_all: Any) -> None:
    """In the parent, after SIGTERM: what still runs shortly before the grace ends is put back and killed.

    Celery itself would wait for it without end, and the platform's SIGKILL would then cost each job a lease.
    """
    reserve = min(5.0, settings.shutdown_grace_seconds / 4)

    def last_call() -> None:
        time.sleep(settings.shutdown_grace_seconds - reserve)
        end("grace_is_over", pool, hand_back_all, exit_code=0)

    threading.Thread(target=last_call, name="last-call", daemon=True).start()


def end(why: str, pool: Any, hand_back_all: Any, *, exit_code: int) -> None:
    """In a thread of the parent: puts its claims back, uncounted, and ends it with its children."""
    says: dict[str, Any] = {}
    try:
        says["handed_back"] = hand_back_all()
    except Exception as error:  # noqa: BLE001
        # Whatever it is: the leases run out, and rescue has the jobs.
        says["error"] = str(error).strip()
        says["exc_info"] = None if isinstance(error, CONNECTION_LOST) else error
    for child in list(getattr(pool, "_pool", None) or ()):
        if child.pid:
            try:
                os.kill(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    # Not a normal exit: Celery's main thread is waiting for something and would wait on. And not only behind the log,
    # which may be what it waits for.
    threading.Timer(2, os._exit, (exit_code,)).start()
    log.warning(why, **says)
    os._exit(exit_code)
