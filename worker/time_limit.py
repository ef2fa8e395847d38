"""The soft time limit: an exception in the handler when its time is up.

Celery's own would strike anywhere, in the middle of a commit too. This one covers the handler only and waits while a
step is recorded. The hard limit is the parent's, which kills the child.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from worker.errors import SoftTimeLimitExceeded


class SoftLimit:
    """Seconds for a `with` block; 0 is none. Outside the main thread, signals don't work: checkpoints look instead."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds if seconds else float("inf")
        self._by_signal = bool(seconds) and threading.current_thread() is threading.main_thread()
        self._disarmed = 0
        self._struck = False

    def __enter__(self) -> "SoftLimit":
        if self._by_signal:
            self._previous = signal.signal(signal.SIGALRM, self._strike)
            signal.setitimer(signal.ITIMER_REAL, self._seconds)
        return self

    def __exit__(self, *_: object) -> None:
        # First of all: a strike from here on only sets a flag.
        self._disarmed += 1
        if self._by_signal:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._previous)

    @contextmanager
    def disarmed(self) -> Iterator[None]:
        """No strike inside; one that came due strikes at the end."""
        self._disarmed += 1
        try:
            yield
        finally:
            self._disarmed -= 1
        if not self._disarmed:
            self.check()

    def check(self) -> None:
        """Raises SoftTimeLimitExceeded once, when the time is up."""
        if not self._struck and time.monotonic() >= self._deadline:
            self._raise()

    def _strike(self, signum: int, frame: FrameType | None) -> None:
        if not self._disarmed and not self._struck:
            self._raise()

    def _raise(self) -> None:
        self._struck = True
        raise SoftTimeLimitExceeded(f"the job took longer than its soft time limit of {self._seconds:g} s")
