"""The parent's part when a child dies or meets its hard limit: moves exactly that claim, before Celery acts."""

import json
import os
from contextlib import suppress
from signal import SIGKILL
from typing import Any

from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery.worker import state
from celery.worker.request import Request
from psycopg import Error as DatabaseError

from app import logs
from app.database import Database
from app.jobs import dispatch, messages, statements
from app.jobs.stats import Stats
from app.settings import get_settings
from worker import shutdown
from worker.runner import NODE

log = logs.get(__name__)


class TaskRequest(Request):
    """For every task, see `worker/__main__.py`."""

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        if isinstance(error, MemoryError):
            # Celery raises it again here, and ends the worker for what went wrong in a child.
            exc_info.exception = RuntimeError("MemoryError")
        return super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)


class JobRequest(TaskRequest):
    """A message that a child is working on, as the parent sees it."""

    worker_pid: Any  # the child's

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """Celery calls this with the child's exception, and for children that can't raise one any more."""
        # A child's own exception comes wrapped with its traceback; those that the pool makes don't.
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        if isinstance(error, WorkerLostError):
            # Celery puts the message back right after this, but behind all that waits: one of ours goes ahead.
            self._release("WorkerLostError", f"the worker process died: {_cause(error)}")
        elif isinstance(error, TimeLimitExceeded):
            with suppress(ProcessLookupError):  # before the job can run again; Celery would be nicer to it, and later
                os.kill(self.worker_pid, SIGKILL)
            hard = self.time_limits[0]
            self._release("TimeLimitExceeded", f"the job took longer than its hard time limit of {hard} s")
        elif isinstance(error, Terminated):
            self._release("Terminated", "the worker process was stopped by a remote command")
        else:
            return super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)
        # It is in the log, without a traceback of the pool's own code.
        return super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=True)

    # A child at work does not end by SIGTERM, see `shutdown.left_to_the_parent`.
    def terminate(self, pool: Any, signal: Any = None) -> None:
        super().terminate(pool, signal=SIGKILL)

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        super().cancel(pool, signal=SIGKILL, emit_retry=emit_retry)

    def _release(self, error_type: str, message: str) -> None:
        """If PostgreSQL can't be reached now, the lease runs out and rescue does the same later."""
        settings = get_settings()
        stopping = shutdown.claims_nothing() or state.should_terminate is not None
        # Opened for this moment only: a connection that lives in the parent would be inherited by every new child.
        database = Database(settings, "worker-parent", statement_seconds=3)
        try:
            rows = database.run(
                # A child that ends with its worker is no failure of its job.
                statements.HAND_BACK_CHILD if stopping else statements.CHILD_DIED,
                {
                    "node": NODE,
                    "pid": self.worker_pid,
                    "error": json.dumps({"type": error_type, "message": message}),
                    "progress": None,
                    "retry_in": 0,
                    "published": True,
                },
            )
            for row in rows:
                named = {name: row.get(name) for name in ("kind", "attempt", "request_id")}
                log.warning("child_ended", job_id=str(row["id"]), **named, error=message, outcome=row["status"])
            again = [row for row in rows if row["status"] == "queued"]
            if again and not stopping:
                with messages.connect(settings) as client:
                    dispatch.send(again, client, settings, ahead=True)
            stats = Stats(self.hostname)
            stats.count_ends(rows, error_type)
            stats.flush(database)
        except (DatabaseError, *messages.REDIS_ERRORS) as problem:
            log.warning("release_failed", error=str(problem).strip(), note="left to rescue and repair")
        finally:
            database.close()


def hand_back_all() -> int:
    """Puts all claims of this worker back, uncounted; returns how many there were. Raises `CONNECTION_LOST`."""
    database = Database(get_settings(), "worker-parent", statement_seconds=3)
    rows = database.run(statements.HAND_BACK_NODE, {"node": NODE, "retry_in": 0, "progress": None})
    stats = Stats(NODE)
    stats.count_ends(rows)
    stats.flush(database)
    return len(rows)


def _cause(error: WorkerLostError) -> str:
    """'Worker exited prematurely: signal 9 (SIGKILL) Job: 3.' without the parts that say nothing to a user."""
    cause = str(error).partition(": ")[2].partition(" Job:")[0] or str(error)
    return f"{cause} (out of memory?)" if "SIGKILL" in cause else cause
