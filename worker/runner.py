"""From a claimed row to a finished one: runs the handler, and writes down how it ended."""

import importlib
import json
import os
import socket
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import psycopg
import structlog
from pydantic import ValidationError

from app import elsewhere, logs
from app.database import CONNECTION_LOST, Database
from app.files.store import FileStore
from app.jobs import statements
from app.jobs.kind import Kind, Model
from app.jobs.kinds import offered_kinds
from app.jobs.stats import HANDED_BACK, RETRY, Stats
from app.settings import Settings
from worker import errors
from worker.context import Context
from worker.heartbeat import Heartbeat, Lease
from worker.time_limit import SoftLimit

log = logs.get(__name__)

# One start of one worker: with a child's pid it names a claim, even if host names and pids come again. Made in the
# parent; children inherit it.
NODE = f"{socket.gethostname()}:{uuid4().hex[:12]}"
# A worker of an older release met a kind that it doesn't know: another one will, soon.
UNKNOWN_KIND_SECONDS = 30


class Claim(NamedTuple):
    """A row that is ours, as the claiming statement returned it."""

    id: UUID
    kind: str
    queue: str
    payload: dict[str, Any]
    attempt: int
    max_attempts: int
    request_id: str | None
    lease_token: UUID
    waited: float  # seconds, from when it was due

    def named(self) -> dict[str, Any]:
        """What stands in every line of the log that speaks of the job."""
        return {
            "job_id": str(self.id),
            "kind": self.kind,
            "attempt": self.attempt,
            "request_id": self.request_id,
        }


# Takes the result of a job, as JSON, and returns how its attempt ended.
Finish = Callable[[Claim, Lease, str], str]
KEPT = "kept"
LEASE_LOST = "lease lost"


class Runner:
    """Runs jobs in this process. One per process; threads may share it (inline mode)."""

    def __init__(self, settings: Settings, *, worker: str, may_kill: bool) -> None:
        self.settings = settings
        self.worker = worker
        self.database = Database(settings, "worker")
        self.files = FileStore(settings)
        self.stats = Stats(worker)
        self._heartbeat = Heartbeat(self.database, settings, self.stats, may_kill=may_kill)
        self._kinds = offered_kinds(settings)

    def close(self) -> None:
        """After the last job: writes what was counted, and leaves no thread and no connection. Raises nothing."""
        self._heartbeat.stop()
        self.stats.flush(self.database)
        self.database.close()

    def identity(self) -> dict[str, Any]:
        """The parameters of a claim: a new token, and who holds it."""
        return {
            "token": uuid4(),
            "worker": self.worker,
            "node": NODE,
            "pid": os.getpid(),
            "lease": self.settings.job_lease_seconds,
        }

    def claim(self, job_id: UUID, identity: dict[str, Any] | None = None) -> Claim | None:
        """The job, if it is due and nobody has it; None if the message was a duplicate, late or early."""
        ours = {"id": job_id, **(identity or self.identity())}
        # No row: somebody else's, or claimed by an earlier try whose answer never came.
        rows = self.database.run(statements.CLAIM, ours) or self.database.run(statements.CLAIMED, ours)
        return Claim(**rows[0]) if rows else None

    def claim_next(self, queues: list[str]) -> Claim | None:
        rows = self.database.run(statements.CLAIM_NEXT, {"queues": queues, **self.identity()})
        return Claim(**rows[0]) if rows else None

    def claim_short(self, queue: str, most: int) -> list[Claim]:
        """A group of short jobs, the oldest first; all with the same token."""
        rows = self.database.run(statements.CLAIM_SHORT, {"queue": queue, "limit": most, **self.identity()})
        rows.sort(key=lambda row: (row.pop("run_at"), row["id"]))
        return [Claim(**row) for row in rows]

    def run(self, claim: Claim, *, keep: Finish | None = None) -> str:
        """Runs a claimed job and returns how this attempt ended: a status, or `handed back` or `lease lost`.

        Args:
            keep: takes a result, instead of its being written down now, and returns KEPT.
        """
        lease = self._heartbeat.hold(claim.id, claim.lease_token)
        with structlog.contextvars.bound_contextvars(**claim.named()), elsewhere.job_span(self.settings) as ended:
            began = time.monotonic()
            try:
                outcome = self._run(claim, lease, keep or self._finish)
            except errors.LeaseLost:
                outcome = LEASE_LOST
            finally:
                self._heartbeat.drop(lease)
            if outcome != KEPT:
                ended(outcome)
                self.log_end(claim, outcome, time.monotonic() - began)
        return outcome

    def _run(self, claim: Claim, lease: Lease, finish: Finish) -> str:
        kind = self._kinds.get(claim.kind)
        if kind is None:
            log.warning("unknown_kind", hint="this worker runs an older release, or DEMO_JOBS is off")
            return self._hand_back(claim, lease, UNKNOWN_KIND_SECONDS)
        try:
            return finish(claim, lease, self._handle(kind, claim, lease))
        except errors.Cancelled:
            return self._end(statements.CANCELLED, claim, lease, {})
        except errors.HandBack:
            return self._hand_back(claim, lease, 0)
        except errors.LeaseLost:
            raise
        except BaseException as error:  # noqa: BLE001
            # Also SystemExit and KeyboardInterrupt from a handler: they must not end the worker.
            return self._fail(claim, lease, error)

    def _handle(self, kind: Kind, claim: Claim, lease: Lease) -> str:
        """The handler's result as JSON."""
        try:
            payload = kind.payload.model_validate(claim.payload)
        except ValidationError as error:
            # Without the values: a header may be a secret.
            wrong = "; ".join(f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors())
            message = f"the payload does not fit this release's {kind.name}: {wrong}"
            raise errors.PermanentError(message) from None
        handler = importlib.import_module(f"worker.handlers.{kind.name}").run
        with SoftLimit(kind.limits(self.settings)[0]) as limit:
            context = Context(
                job_id=claim.id,
                attempt=claim.attempt,
                max_attempts=claim.max_attempts,
                database=self.database,
                files=self.files,
                heartbeat=self._heartbeat,
                lease=lease,
                limit=limit,
                settings=self.settings,
            )
            result: Model = handler(payload, context)
        return kind.result.model_validate(result).model_dump_json()

    def finish(self, claim: Claim, lease: Lease, result: str, seconds: float) -> None:
        """Writes down what `run` was told to leave. Raises nothing: others wait behind it."""
        with structlog.contextvars.bound_contextvars(**claim.named()):
            try:
                try:
                    outcome = self._finish(claim, lease, result)
                except errors.PermanentError as error:
                    outcome = self._fail(claim, lease, error)
            except errors.LeaseLost:
                outcome = LEASE_LOST
            except psycopg.Error:
                log.exception("not_written", note="left to rescue")
                return
            self.log_end(claim, outcome, seconds)

    def log_end(self, claim: Claim, outcome: str, seconds: float) -> None:
        """Every attempt's end passes here."""
        log.info("job_ended", outcome=outcome, seconds=round(seconds, 3), **claim.named())
        if outcome != LEASE_LOST:  # who took it away has counted it
            self.stats.count(claim.queue, claim.kind, outcome, waited=claim.waited, ran=seconds)

    def _finish(self, claim: Claim, lease: Lease, result: str) -> str:
        try:
            return self._end(statements.FINISH, claim, lease, {"result": result})
        except psycopg.Error as error:
            raise errors.refused("the result", error) from error

    def _end(self, statement: str, claim: Claim, lease: Lease, values: dict[str, Any]) -> str:
        """Writes the end, however long PostgreSQL is away; the token decides whether it still counts."""
        ours = {"id": claim.id, "token": claim.lease_token, "progress": lease.unwritten()}
        rows = self.database.run_until_answered(statement, ours | values)
        # No row: lost, or written by an earlier try whose answer never came.
        rows = rows or self.database.run_until_answered(statements.OUTCOMES, ours | {"ids": [claim.id]})
        if not rows:
            raise errors.LeaseLost
        return str(rows[0]["status"])

    def _hand_back(self, claim: Claim, lease: Lease, seconds: float) -> str:
        outcome = self._end(statements.HAND_BACK, claim, lease, {"retry_in": seconds})
        return HANDED_BACK if outcome == "queued" else outcome

    def _fail(self, claim: Claim, lease: Lease, error: BaseException) -> str:
        delay = errors.retry_delay(error, claim.attempt)
        expected = isinstance(error, errors.PermanentError | errors.TransientError)
        log.warning(
            "attempt_failed",
            error=errors.describe(error),
            retry_in=delay,
            exc_info=None if expected else error,
        )
        outcome = self._end(
            statements.FAIL,
            claim,
            lease,
            {"error": json.dumps(errors.describe(error)), "retry_in": delay, "published": False},
        )
        if outcome in ("queued", "failed"):
            self.stats.count_error(claim.queue, claim.kind, type(error).__name__)
        return RETRY if outcome == "queued" else outcome

    def wait_and_claim(self, job_id: UUID, patience: float) -> Claim | None:
        """As `claim`, but waits up to `patience` seconds for PostgreSQL. After that the message is dropped: dispatch
        sends another once the database answers, and a worker must not hold messages that it can't act on."""
        end = time.monotonic() + patience
        identity = self.identity()
        while True:
            try:
                return self.claim(job_id, identity)
            except CONNECTION_LOST as error:
                if time.monotonic() > end:
                    log.warning("claim_failed", job_id=str(job_id), error=str(error).strip())
                    return None
                time.sleep(0.5)
