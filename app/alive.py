"""Signs of life: a process touches its file while it does its work, and a health check looks how old that is.

Light on purpose: a check is a process of its own in every container, and most of what it costs is what it imports. Even
`pathlib` and `tempfile` would double that.
"""

import os
import sys
import time


def path(process: str) -> str:
    return f"{os.environ.get('JOBSTACK_RUN_DIR') or os.environ.get('TMPDIR') or '/tmp'}/jobstack-{process}.alive"  # noqa: S108


def touch(process: str) -> None:
    with open(path(process), "a") as file:  # noqa: PTH123
        os.utime(file.fileno())


def check(process: str, limit_seconds: float) -> None:
    """Ends this process: 0 if `process` gave a sign of life lately, 1 with a sentence if not."""
    try:
        age = time.time() - os.stat(path(process)).st_mtime  # noqa: PTH116
    except FileNotFoundError:
        sys.exit(f"{process} has not given a sign of life yet")
    if age > limit_seconds:
        sys.exit(f"{process} gave its last sign of life {age:.0f} s ago; {limit_seconds:.0f} s are allowed")
