"""What the machine did besides: without it, nobody can tell a slow program from a busy machine."""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import psycopg

# More than this, in cores, and a measurement is marked in the report.
NOISY_CORES = 0.25


def _ours() -> float:
    """CPU seconds of this process, all below it, and all below it that ended."""
    seconds = 0.0
    with suppress(psutil.NoSuchProcess):
        for process in (me := psutil.Process(), *me.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


def _machine() -> tuple[float, float, float]:
    """CPU seconds of all cores together: busy, waiting for a disk, taken by other machines on the same host."""
    times = psutil.cpu_times()
    busy = times.user + times.system + times.nice + getattr(times, "irq", 0) + getattr(times, "softirq", 0)
    return busy, getattr(times, "iowait", 0.0), getattr(times, "steal", 0.0)


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Filled at the block's end, which must come before the processes in question do:

    `seconds`; `cpu_seconds` of ours, servers included; in cores: `foreign` (what others on this machine took), `iowait`
    and `steal`; `load`, the load average at the beginning.
    """
    found: dict[str, float] = {"load": os.getloadavg()[0]}
    began, ours, machine = time.perf_counter(), _ours(), _machine()
    yield found
    seconds, used = time.perf_counter() - began, _ours() - ours
    busy, iowait, steal = (after - before for before, after in zip(machine, _machine(), strict=True))
    found.update(
        seconds=seconds,
        cpu_seconds=used,
        foreign=max(0.0, busy - used) / seconds,
        iowait=iowait / seconds,
        steal=steal / seconds,
    )


def machine(db: psycopg.Connection[Any], redis_version: str) -> dict[str, Any]:
    """Where these figures come from."""
    model = platform.processor()
    with suppress(OSError, StopIteration):  # Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    libraries = ("celery", "kombu", "redis", "psycopg", "fastapi", "uvicorn", "sqlalchemy")
    return {
        "cpu": model,
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "postgresql": db.execute("SHOW server_version").fetchone()[0],  # type: ignore[index]
        "fsync": db.execute("SHOW fsync").fetchone()[0],  # type: ignore[index]
        "synchronous_commit": db.execute("SHOW synchronous_commit").fetchone()[0],  # type: ignore[index]
        "redis": redis_version,
        "libraries": {name: version(name) for name in libraries},
    }
