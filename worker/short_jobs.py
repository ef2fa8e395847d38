"""Jobs of milliseconds, by the hundred: claimed together, run one after the other, written down together.

What a job costs besides its handler (a message, two commits, their round trips) is shared; the promises are kept for
each one alone. docs/short-jobs.md says how.
"""

import os
import signal
import threading
import time
from collections import deque
from contextlib import suppress
from functools import partial
from typing import NamedTuple, Self

import psycopg
import redis

from app import logs
from app.database import CONNECTION_LOST
from app.jobs import dispatch, messages, statements
from worker import shutdown
from worker.heartbeat import Lease
from worker.runner import KEPT, LEASE_LOST, Claim, Runner

log = logs.get(__name__)

MOST_IN_GROUP = 100
# So long does one message keep its child, with jobs that other children could not begin in the meantime.
SLICE_SECONDS = 1.0
# What runs longer is not short: it loses its child, and runs alone, with its kind's own limits.
MOST_SECONDS = 60.0
# How long a result may wait for others to be written with.
WRITE_SECONDS = 0.1


def run(runner: Runner, client: redis.Redis, queue: str) -> None:
    """Runs due short jobs of `queue` for a slice of time. If there are more, another message takes over."""
    # Before the first look: whoever commits a job after it sends a wake-up of its own. Twice, since an idle connection
    # may have died; beyond that, the key expires.
    for _ in range(2):
        with suppress(*messages.REDIS_ERRORS):
            client.delete(messages.wake_key(queue))
            break
    try:
        with _Slice(runner, client, queue) as turn:
            while claims := turn.claim():
                turn.run(claims)
    except CONNECTION_LOST as error:
        # A group whose claim was not answered is rescued when its lease is over; dispatch wakes up for the others.
        log.warning("claim_failed", queue=queue, error=str(error).strip())


class _Done(NamedTuple):
    """A job that is over, and not yet written down as such."""

    claim: Claim
    lease: Lease
    result: str
    seconds: float


class _Slice:
    """The time that one message gives to short jobs.

    A handler may take longer than anybody thought. A thread sees to it that its neighbours don't wait: results are
    written all the same, and jobs that have not begun go to somebody else when the slice is over.
    """

    def __init__(self, runner: Runner, client: redis.Redis, queue: str) -> None:
        self._runner, self._client, self._queue = runner, client, queue
        self._end = float("inf")  # begins with the first group: a slow claim must not use it up
        self._began: float | None = None  # the job that runs
        self._shared = False
        self._waiting: deque[Claim] = deque()
        self._done: list[_Done] = []
        self._lock = threading.Lock()  # of the two above
        self._left = threading.Event()
        self._watch = threading.Thread(target=self._watch_over, name="short-jobs", daemon=True)

    def __enter__(self) -> Self:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever ended the slice: the message may be acknowledged only when nothing is left with us."""
        self._left.set()
        self._watch.join()
        try:
            self._write()
        finally:
            self._give_back()

    def claim(self) -> list[Claim]:
        """The next group; empty if there is none, or no time for one."""
        if self._is_over():
            self._wake()
            return []
        claims = self._runner.claim_short(self._queue, MOST_IN_GROUP)
        if len(claims) == MOST_IN_GROUP and not self._shared:
            self._shared = True
            self._wake()  # there is enough for another child, which will wake the next
        self._end = min(self._end, time.monotonic() + SLICE_SECONDS)
        return claims

    def run(self, claims: list[Claim]) -> None:
        with self._lock:
            self._waiting.extend(claims)
        while claim := self._next():
            self._began = began = time.monotonic()
            self._runner.run(claim, keep=partial(self._keep, began))
            self._began = None
        self._write()

    def _next(self) -> Claim | None:
        if self._is_over():
            self._give_back()
        with self._lock:
            return self._waiting.popleft() if self._waiting else None

    def _is_over(self) -> bool:
        return time.monotonic() >= self._end or shutdown.claims_nothing()

    def _keep(self, began: float, claim: Claim, lease: Lease, result: str) -> str:
        with self._lock:
            self._done.append(_Done(claim, lease, result, time.monotonic() - began))
        return KEPT

    def _watch_over(self) -> None:
        while not self._left.wait(WRITE_SECONDS):
            self._write()
            if self._is_over():
                self._give_back()
            began = self._began
            if began is not None and time.monotonic() - began > MOST_SECONDS:
                log.warning("not_short", queue=self._queue, seconds=MOST_SECONDS)
                os.kill(os.getpid(), signal.SIGKILL)  # the parent puts back what it was working on

    def _write(self) -> None:
        with self._lock:
            done, self._done = self._done, []
        if not done:
            return
        group = {
            "ids": [job.claim.id for job in done],
            "token": done[0].claim.lease_token,
            "results": [job.result for job in done],
            "progress": [job.lease.unwritten() for job in done],
        }
        try:
            rows = self._runner.database.run_until_answered(statements.FINISH_SHORT, group)
            if len(rows) < len(done):  # lost, or written by an earlier try whose answer never came
                rows += self._runner.database.run_until_answered(statements.OUTCOMES, group)
        except psycopg.Error:
            # One result spoilt it for all: each for itself.
            for job in done:
                self._runner.finish(job.claim, job.lease, job.result, job.seconds)
            return
        outcomes = {row["id"]: row["status"] for row in rows}
        for job in done:
            self._runner.log_end(job.claim, outcomes.get(job.claim.id, LEASE_LOST), job.seconds)

    def _give_back(self) -> None:
        """Jobs that have not begun: not counted, and still short."""
        with self._lock:
            claims, self._waiting = self._waiting, deque()
        if claims:
            ours = {"ids": [claim.id for claim in claims], "token": claims[0].lease_token, "progress": None}
            rows = self._runner.database.run_until_answered(statements.HAND_BACK_SHORT, ours | {"retry_in": 0})
            self._runner.stats.count_ends(row for row in rows if row["status"] == "cancelled")
            self._wake()

    def _wake(self) -> None:
        if not shutdown.claims_nothing():
            with suppress(*messages.REDIS_ERRORS):  # dispatch does it in two seconds
                dispatch.wake(self._client, self._runner.settings, [self._queue])
