"""One thread a process renews the leases of its jobs, writes their progress, and brings back recorded cancels."""

import json
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from app import logs
from app.database import CONNECTION_LOST, Database
from app.jobs import statements
from app.jobs.stats import Stats
from app.settings import Settings

log = logs.get(__name__)

PROGRESS_SECONDS = 0.5  # at most two writes a second, however often a handler reports


@dataclass(eq=False)  # by identity: the leases of a group have one token
class Lease:
    """A claim that this process holds. Written by the heartbeat's thread, read by the job's."""

    job_id: UUID
    token: UUID
    renew_at: float
    progress_at: float  # when progress may be written
    progress: dict[str, Any] | None = None  # waits for that
    cancelled_at: float | None = None
    lost: bool = False
    # Set when `cancelled_at` or `lost` changes: ends a sleep.
    attention: threading.Event = field(default_factory=threading.Event)

    def unwritten(self) -> str | None:
        """The latest progress as JSON: made when it is written, since handlers report oftener than that."""
        progress = self.progress
        return None if progress is None else json.dumps(progress)


class Heartbeat:
    """Holds the leases of one process. Its thread starts with the first job, so never before a fork."""

    def __init__(self, database: Database, settings: Settings, stats: Stats, *, may_kill: bool) -> None:
        self._database = database
        self._settings = settings
        self._stats = stats
        self._flush_at = 0.0
        self._may_kill = may_kill
        self._leases: set[Lease] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def hold(self, job_id: UUID, token: UUID) -> Lease:
        now = time.monotonic()
        # The progress of a job shorter than half a second is written with its end only.
        lease = Lease(job_id, token, now + self._settings.job_heartbeat_seconds, now + PROGRESS_SECONDS)
        with self._changed:
            self._leases.add(lease)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
                self._thread.start()
            # No wake-up: the thread never sleeps longer than to the next heartbeat of a lease it knows or might get.
        return lease

    def drop(self, lease: Lease) -> None:
        with self._changed:
            self._leases.discard(lease)

    def report(self, lease: Lease, progress: dict[str, Any]) -> None:
        """Progress to be written soon; a newer report replaces one that waits."""
        with self._changed:
            if lease.progress is None and time.monotonic() >= lease.progress_at:
                self._changed.notify()
            lease.progress = progress

    def stop(self) -> None:
        """Leases are not renewed from now on. Waits for a statement that is under way."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        failing = False
        while not self._stopped:
            self._flush()
            with self._changed:
                now = time.monotonic()
                due = [lease for lease in self._leases if self._next(lease) <= now]
                if not due:
                    soonest = min(map(self._next, self._leases), default=float("inf"))
                    self._changed.wait(
                        min(PROGRESS_SECONDS, self._settings.job_heartbeat_seconds / 2, max(0.01, soonest - now))
                    )
                    continue
            try:
                self._beat(due)
            except Exception as error:
                if not failing:
                    expected = isinstance(error, CONNECTION_LOST)
                    log.warning("heartbeats_fail", error=str(error).strip(), exc_info=None if expected else error)
                failing = True
                time.sleep(0.5)
            else:
                if failing:
                    log.info("heartbeats_work_again")
                failing = False

    def _flush(self) -> None:
        """Statistics, every now and then."""
        if time.monotonic() >= self._flush_at:
            self._flush_at = time.monotonic() + self._settings.job_heartbeat_seconds
            self._stats.flush(self._database)

    @staticmethod
    def _next(lease: Lease) -> float:
        return min(lease.renew_at, lease.progress_at) if lease.progress is not None else lease.renew_at

    def _beat(self, leases: list[Lease]) -> None:
        reports = [(lease.progress, lease.unwritten()) for lease in leases]
        rows = self._database.run(
            statements.HEARTBEAT,
            {
                "ids": [lease.job_id for lease in leases],
                "tokens": [lease.token for lease in leases],
                "progress": [text for _, text in reports],
                "lease": self._settings.job_lease_seconds,
            },
        )
        cancelled = {(row["id"], row["lease_token"]): row["cancelled"] for row in rows}
        # Under the lock: a job's own thread cannot report more, nor end and begin another job, in between.
        with self._changed:
            for lease, (written, _) in zip(leases, reports, strict=True):
                if lease in self._leases:
                    self._note(lease, written, cancelled.get((lease.job_id, lease.token)))

    def _note(self, lease: Lease, written: dict[str, Any] | None, cancelled: bool | None) -> None:
        """What the database said of a lease; None: it is nobody's any more."""
        now = time.monotonic()
        lease.renew_at = now + self._settings.job_heartbeat_seconds
        lease.progress_at = now + PROGRESS_SECONDS
        if lease.progress is written:
            lease.progress = None
        if cancelled is None:
            # Finished by the job's own thread in this moment, or taken away: that thread finds out by its token.
            lease.lost = True
            self._leases.discard(lease)
            lease.attention.set()
            return
        if cancelled and lease.cancelled_at is None:
            lease.cancelled_at = now
            lease.attention.set()
        if lease.cancelled_at is not None and self._may_kill:
            kill_at = lease.cancelled_at + self._settings.cancel_grace_seconds
            if now >= kill_at:
                self._kill(lease)
            lease.renew_at = min(lease.renew_at, kill_at)

    def _kill(self, lease: Lease) -> None:
        """The handler never looked at its cancel: it ends with its process, which the pool replaces."""
        log.warning("cancelled_job_killed", job_id=str(lease.job_id))
        rows = self._database.run(
            statements.CANCELLED, {"id": lease.job_id, "token": lease.token, "progress": lease.unwritten()}
        )
        self._stats.count_ends(rows)
        self._stats.flush(self._database)
        os.kill(os.getpid(), signal.SIGKILL)
