"""What a handler may ask of the job that it works on."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, TypeVar
from uuid import UUID

import psycopg

from app.database import Database
from app.files.store import FileInfo, FileStore
from app.jobs import statements
from app.settings import Settings
from worker import shutdown
from worker.errors import Cancelled, HandBack, LeaseLost, refused, storable
from worker.heartbeat import Heartbeat, Lease
from worker.time_limit import SoftLimit

T = TypeVar("T")


class Context:
    """One attempt at one job. `checkpoint`, `progress`, `sleep` and `once` are the places where a job can be ended."""

    def __init__(
        self,
        *,
        job_id: UUID,
        attempt: int,
        max_attempts: int,
        database: Database,
        files: FileStore,
        heartbeat: Heartbeat,
        lease: Lease,
        limit: SoftLimit,
        settings: Settings,
    ) -> None:
        self.job_id = job_id
        self.attempt = attempt
        self.max_attempts = max_attempts
        self.settings = settings
        self._database = database
        self._files = files
        self._heartbeat = heartbeat
        self._lease = lease
        self._limit = limit
        self._steps: dict[str, Any] | None = None

    @property
    def cancelled(self) -> bool:
        """Whether a cancel was recorded, as of the last heartbeat."""
        return self._lease.cancelled_at is not None

    def checkpoint(self) -> None:
        """Ends the handler here if the job was cancelled or taken away, or if the worker is stopping.

        Raises:
            Cancelled, LeaseLost, HandBack: not to be caught. SoftTimeLimitExceeded: time is up.
        """
        if self._lease.lost:
            raise LeaseLost
        if self.cancelled:
            raise Cancelled
        if shutdown.hands_back(self.settings):
            raise HandBack
        self._limit.check()

    def progress(self, current: float, total: float | None = None, message: str | None = None) -> None:
        """Reports how far the job is; written at most twice a second. Also a checkpoint."""
        report = {
            "current": _number(current),
            "total": None if total is None else _number(total),
            "message": None if message is None else storable(message),
        }
        # Disarmed: a strike between taking the heartbeat's lock and giving it back would keep it for ever.
        with self._limit.disarmed():
            self._heartbeat.report(self._lease, report)
        self.checkpoint()

    def sleep(self, seconds: float) -> None:
        """Sleeps, but wakes up for a cancel or a shutdown."""
        end = time.monotonic() + seconds
        while True:
            self.checkpoint()
            left = end - time.monotonic()
            if left <= 0:
                return
            # Short slices, since the parent's shutdown flag is memory and can't wake anybody.
            self._lease.attention.wait(min(left, 0.5))

    def once(self, name: str, call: Callable[[], T]) -> T:
        """The result of `call`, which runs only if no attempt has recorded this step yet.

        The result must be JSON. Between the call and its record lies one commit: give the other side `step_key(name)`
        as its idempotency key to close that gap.
        """
        steps = self._recorded_steps()
        if name not in steps:
            self.checkpoint()
            result = call()
            with self._limit.disarmed():
                steps[name] = self._record(name, result)
        value: T = steps[name]
        return value

    def _record(self, name: str, result: Any) -> Any:
        step = {"id": self.job_id, "name": name}
        as_json = json.dumps(result, allow_nan=False)
        try:
            rows = self._database.run_until_answered(statements.RECORD_STEP, {**step, "result": as_json})
        except psycopg.Error as error:
            raise refused(f"the result of the step {name[:100]!r}", error) from error
        # No row: another attempt was first, and both go on with its result.
        rows = rows or self._database.run_until_answered(statements.READ_STEP, step)
        return rows[0]["result"]

    def step_key(self, name: str) -> str:
        """An idempotency key for a provider: the same on every attempt at this job."""
        return f"{self.job_id}:{name}"

    def file_info(self, file_id: UUID) -> FileInfo:
        """Name, size, content type and checksum of a file. Raises FileNotFoundError."""
        with self._limit.disarmed():
            return self._files.info(self._database, file_id)

    @contextmanager
    def open_file(self, file_id: UUID) -> Iterator[BinaryIO]:
        """A file's bytes, seekable and read in ranges: a file of any size needs little memory."""
        self.file_info(file_id)
        with self._files.open(file_id) as stream:
            yield stream

    def save_file(self, name: str, data: bytes, content_type: str, step: str | None = None) -> UUID:
        """Keeps a result as a file that belongs to this job, once: a later attempt gets the same id."""

        def save() -> str:
            with self._limit.disarmed():
                return str(self._files.save(self._database, self.job_id, name, data, content_type))

        return UUID(self.once(step or f"file:{name}", save))

    def _recorded_steps(self) -> dict[str, Any]:
        if self._steps is None:
            with self._limit.disarmed():
                rows = self._database.run_until_answered(statements.STEPS, {"id": self.job_id})
            self._steps = {row["name"]: row["result"] for row in rows}
        return self._steps


def _number(value: float) -> float:
    """As JSON has them: refused here, where it is the handler's error, and not where all leases are renewed."""
    if not math.isfinite(value):
        raise ValueError(f"{value} is not JSON compliant, and no progress")
    return value if type(value) is int else float(value)
