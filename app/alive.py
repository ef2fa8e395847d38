"""Signs of life: a process touches its file while it does its work, and a health check looks how old that is.

Light on purpose: the check runs every few seconds in every container and must import nothing heavy.
"""

import os
import sys
import tempfile
import time
from pathlib import Path


def path(process: str) -> Path:
    return Path(os.environ.get("JOBSTACK_RUN_DIR") or tempfile.gettempdir()) / f"jobstack-{process}.alive"


def touch(process: str) -> None:
    path(process).touch()


def check(process: str, limit_seconds: float) -> None:
    """Ends this process: 0 if `process` gave a sign of life lately, 1 with a sentence if not."""
    try:
        age = time.time() - path(process).stat().st_mtime
    except FileNotFoundError:
        sys.exit(f"{process} has not given a sign of life yet")
    if age > limit_seconds:
        sys.exit(f"{process} gave its last sign of life {age:.0f} s ago; {limit_seconds:.0f} s are allowed")
