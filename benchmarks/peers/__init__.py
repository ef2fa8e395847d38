"""The peers, one file each: a program with these commands, of which a peer has those that it can be measured by.

    python -m benchmarks.peers.NAME fill COUNT    leave COUNT no-op jobs, numbered from 0, for workers to come
    python -m benchmarks.peers.NAME work          become a worker with two processes
    python -m benchmarks.peers.NAME send COUNT    send COUNT jobs, GAP_SECONDS apart
    python -m benchmarks.peers.NAME serve         become an API on $PORT

Each command is a function of that name in the file, which ends with `main(globals())`. Its task calls `done`, and does
nothing else. $REDIS_URL and $DATABASE_URL say where the servers are; both are empty.

This module is imported by the peers' workers, so it imports nothing that they would not have anyway.
"""

import os
import struct
import sys
import time
from typing import Any

# Long enough for the job before to be over on a slow machine: what waits is not idle latency.
GAP_SECONDS = 0.04

_RECORD = struct.Struct("dqd")
_file: dict[int, int] = {}

# As this stack's workers are started: the same on all sides.
PROCESSES = 2
TASKS_PER_CHILD = int(os.environ.get("WORKER_MAX_TASKS_PER_CHILD") or 50)


def done(number: int, sent: float = 0.0) -> None:
    """Notes in a file that this job ran: a few microseconds, needed to find lost and doubled ones."""
    pid = os.getpid()
    if pid not in _file:
        _file[pid] = os.open(os.environ["BENCH_LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(_file[pid], _RECORD.pack(time.time(), number, sent))


def count(ledger: bytes | int) -> int:
    """How many jobs a ledger of this size, or with this content, tells of."""
    return (ledger if isinstance(ledger, int) else len(ledger)) // _RECORD.size


def read(ledger: bytes) -> list[tuple[float, int, float]]:
    """(when it ran, its number, when it was sent) of each run."""
    return list(_RECORD.iter_unpack(ledger))


def become(*command: str) -> None:
    """Goes on as another Python program, so that no process of ours stands above a peer's."""
    os.execv(sys.executable, [sys.executable, "-m", *command])


def main(commands: dict[str, Any]) -> None:
    if commands["__name__"] == "__main__":
        commands[sys.argv[1]](*map(int, sys.argv[2:]))
