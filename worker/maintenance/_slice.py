"""How long a task may work at a stretch."""

import time
from collections.abc import Callable

# Long tasks stop here, say "unfinished", and are sent again at once: a deploy waits for nobody longer than this, and
# the tasks' hard limit of 120 s leaves room for one slow statement.
SLICE_SECONDS = 50


def slice_over() -> Callable[[], bool]:
    """Starts a slice; the answer says whether its time is up."""
    end = time.monotonic() + SLICE_SECONDS
    return lambda: time.monotonic() >= end
